"""onnxruntime sessions. No other module imports onnxruntime; they take it from here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from io import StringIO
from typing import Any

from onnxsim_embed.errors import MissingExtraError

# Some releases send telemetry and start a thread that keeps a forked child from exiting. The variable
# is read at import; disable_telemetry_events() comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as onnxruntime
except ModuleNotFoundError:
    # With an NVIDIA card the extra is gpu, and never both: their wheels overwrite each other.
    raise MissingExtraError("running a model", "cpu", "onnxruntime") from None

Provider = str | tuple[str, Mapping[str, Any]]
Device = str | Sequence[Provider]

RUNTIME_VERSION: str = onnxruntime.__version__


def start_session(
    model: str | bytes,
    providers: Sequence[Provider],
    intra_op_threads: int = 1,
    *,
    spin: bool = True,
) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """Return an onnxruntime session."""
    if any("CUDA" in str(provider) for provider in providers):
        _load_cuda_libraries()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=providers)


@lru_cache(maxsize=1)
def _load_cuda_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's Python packages, where onnxruntime alone does not look."""
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        with redirect_stdout(StringIO()):  # it prints what it does not find, which may be elsewhere
            onnxruntime.preload_dlls()
