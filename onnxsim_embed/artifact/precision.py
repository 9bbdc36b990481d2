"""The weight precision to load: explicit, or the fastest one that is accurate on this machine."""

from __future__ import annotations

import logging
from functools import lru_cache

from onnxsim_embed.artifact.manifest import MODEL_FILES, Artifact
from onnxsim_embed.system.hardware import (
    CPU_PROVIDER,
    GPU_PROVIDERS,
    bf16_supported,
    int8_supported,
)

logger = logging.getLogger(__name__)


def choose_precision(artifact: Artifact, precision: str, provider: str = CPU_PROVIDER) -> str:
    """Return the weight precision to load on an execution provider: the requested one, or for "auto" the best.

    :raises ValueError: for a precision that the artifact does not hold; for bf16 on processors without
        bfloat16 products; for int8 on other providers than the CPU, which have no kernels for its
        operators; for fp16 on other providers than a GPU, where it is slower and no more accurate.
    """
    available = artifact.manifest.precisions
    on_cpu, on_gpu = provider == CPU_PROVIDER, provider in GPU_PROVIDERS
    if precision == "auto":
        if on_gpu and "fp16" in available:
            return "fp16"
        if "int8" not in available or not on_cpu:
            return "fp32"
        supported, reason = int8_supported()
        if not supported:
            logger.warning("using fp32: %s", reason)
        return "int8" if supported else "fp32"
    if precision not in available and precision != "bf16":
        raise ValueError(_unavailable(artifact, precision))
    if precision == "int8" and not on_cpu:
        raise ValueError(
            f"precision 'int8' runs on the CPU only, got provider {provider}: use precision='fp32', "
            "or device='cpu'"
        )
    if precision == "fp16" and not on_gpu:
        raise ValueError(
            f"precision 'fp16' runs on GPUs only; {provider} would compute it in float32, only "
            "slower: use precision='auto', or device='cuda'"
        )
    supported, reason = bf16_supported() if precision == "bf16" else int8_supported()
    if precision == "bf16" and not supported:
        raise ValueError(f"precision 'bf16' cannot be used here: {reason}; use precision='auto'")
    if precision == "int8" and not supported:
        _warn_once(
            f"precision='int8' was requested although {reason}: embeddings are less accurate than the "
            "verification of the model states, and differ from those of processors with VNNI; "
            "precision='auto' chooses fp32 here"
        )
    return precision


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _unavailable(artifact: Artifact, precision: str) -> str:
    manifest = artifact.manifest
    held = ", ".join(manifest.precisions)
    message = f"precision {precision!r} is not in {artifact.directory}, which holds {held}"
    if problems := manifest.verification.get(precision, {}).get("problems"):
        return f"{message}: the export skipped it because {'; '.join(problems)}"
    if precision not in MODEL_FILES:
        return (
            f"{message}; allowed are auto, {', '.join(MODEL_FILES)}, bf16 (the dtype of embeddings is an "
            "argument of encode: float32, float16, int8, uint8, binary, ubinary)"
        )
    return (
        f"{message}; export the model again with precisions={[*manifest.precisions, precision]} "
        "and force=True"
    )
