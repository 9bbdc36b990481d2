"""From a name to a running model: its artifact, precision, provider, tokenizer and session."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import Artifact, is_artifact
from onnxsim_embed.artifact.precision import choose_precision
from onnxsim_embed.artifact.recipes import cache_directory
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.batching import GPU_CALLERS
from onnxsim_embed.runtime.cuda import CudaSession
from onnxsim_embed.runtime.engine import Engine
from onnxsim_embed.runtime.pipeline import Pipeline
from onnxsim_embed.runtime.pooling import Head, load_head
from onnxsim_embed.runtime.session import Session, first_provider
from onnxsim_embed.runtime.tokenization import Tokenizer
from onnxsim_embed.system.hardware import CPU_PROVIDER, CUDA_PROVIDER, available_cpus
from onnxsim_embed.system.onnx_session import Device

logger = logging.getLogger(__name__)

ENGINES = ("auto", "onnxruntime", "openvino")


class LoadedModel(NamedTuple):
    """An artifact, the modules after its encoder, the weight precision, and the rest running."""

    artifact: Artifact
    head: Head
    precision: str
    pipeline: Pipeline


def load_model(
    model: Artifact | str | Path,
    precision: str,
    device: Device,
    threads: int | None,
    engine: str = "auto",
    **source: Any,  # noqa: ANN401 - arguments of `locate_artifact`
) -> LoadedModel:
    """Load a model; for arguments and errors see `Embedder`. A damaged one in the cache is exported again."""
    if isinstance(model, Artifact):
        return _load(model, precision, device, threads, engine)
    from onnxsim_embed.artifact.cache import is_cached, locate_artifact

    artifact = locate_artifact(model, **source)
    try:
        return _load(artifact, precision, device, threads, engine)
    except ArtifactError:
        if not is_cached(artifact):
            raise
        artifact = locate_artifact(model, **source, rebuild=True)
        return _load(artifact, precision, device, threads, engine)


def _load(
    artifact: Artifact, precision: str, device: Device, threads: int | None, engine: str
) -> LoadedModel:
    """Load an artifact on a device, or on the CPU if the device is "auto" and CUDA does not start."""
    openvino = uses_openvino(engine, precision, device)
    head = load_head(artifact)
    for tried in ("cpu",) if openvino else (device, "cpu"):
        provider = first_provider(tried)
        chosen = choose_precision(artifact, precision, provider)
        pipeline = _make_pipeline(artifact, head, chosen, tried, threads, openvino)
        if openvino or device != "auto" or pipeline.engine.provider == provider:
            break
        logger.warning("using the CPU: %s could not be started", provider)
    return LoadedModel(artifact, head, chosen, pipeline)


def _make_pipeline(
    artifact: Artifact,
    head: Head,
    precision: str,
    device: Device,
    threads: int | None,
    openvino: bool,
) -> Pipeline:
    manifest = artifact.manifest
    provider = first_provider(device)

    def checked_file() -> Path:
        encoder = manifest.entry(precision).encoder
        file = artifact.open_file(precision)  # holds the weights of the encoder too
        ours = provider == CPU_PROVIDER or (provider == CUDA_PROVIDER and precision == "fp16")
        return artifact.file(encoder) if ours and encoder else file

    with ThreadPoolExecutor(1) as checker:  # computes digests while the tokenizer loads
        file = checker.submit(checked_file)
        tokenizer = Tokenizer(
            artifact.file("tokenizer.json"),
            manifest.max_seq_length,
            manifest.do_lower_case,
            manifest.pad_token_id,
        )
    on_gpu = provider == CUDA_PROVIDER
    if threads is None:
        threads = GPU_CALLERS if on_gpu else available_cpus()
    make_engine: Callable[[int], Engine]
    if on_gpu:
        make_engine = partial(CudaSession, file.result(), device, head=head)
    elif not openvino:
        make_engine = partial(Session, file.result(), device)
    else:
        from onnxsim_embed.runtime.openvino_engine import OpenVINOEngine

        # Other versions of this package may read the same file in other ways.
        digests = [__version__, *(entry.sha256 for entry in manifest.files.values())]
        key = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        cache = cache_directory() / "openvino" / key
        make_engine = partial(OpenVINOEngine, file.result(), cache, precision, threads)
    return Pipeline(tokenizer, make_engine, threads)


def uses_openvino(engine: str, precision: str, device: Device) -> bool:
    """Return whether OpenVINO runs a model; "auto" chooses it for bf16, and ONNX Runtime otherwise.

    :raises ValueError: for an unknown engine, or a precision or device that it does not have.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; allowed are {', '.join(ENGINES)}")
    if engine == "onnxruntime" and precision == "bf16":
        raise ValueError("precision 'bf16' runs on OpenVINO: use engine='openvino' or 'auto'")
    chosen = engine == "openvino" or precision == "bf16"
    if chosen and device not in ("auto", "cpu"):
        raise ValueError(f"OpenVINO runs on the CPU here, got device {device!r}: use device='cpu'")
    return chosen


def load_pickled(kind: Callable[..., Any], artifact: Artifact, settings: dict[str, Any]) -> Any:  # noqa: ANN401
    """Load the model of a pickle, which holds the path of its artifact, not the weights."""
    if not is_artifact(artifact.directory):
        raise ArtifactError(
            f"a pickled Embedder holds the path of its model, {artifact.directory}, where there is "
            "none now: load the model from where it is, and pickle it again"
        )
    return kind(artifact, **settings)
