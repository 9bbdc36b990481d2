"""The only module that imports onnxruntime at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

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
    """Return onnxruntime's session of a file or of a model's bytes.

    :param intra_op_threads: threads inside one call.
    :param spin: let them wait awake for the next call for a while.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=providers)
