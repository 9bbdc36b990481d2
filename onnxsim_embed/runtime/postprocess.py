"""Number formats of finished vectors, as sentence-transformers' quantize_embeddings makes them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.pooling import normalize

OutputPrecision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

# Formats that spread the range of each component, which must be known.
SPREAD = ("int8", "uint8")


def finish_vectors(
    vectors: npt.NDArray[np.float32],
    precision: OutputPrecision = "float32",
    ranges: npt.NDArray[np.float32] | None = None,
    *,
    truncate_dim: int | None = None,
    normalizes: bool | None = None,
) -> npt.NDArray[Any]:
    """Shorten vectors, scale them to L2 norm 1 and convert them to another number format, as asked.

    int8 and uint8 spread each component's range over 256 steps; binary and ubinary keep one bit a
    component (above zero or not), eight to a byte. Formats equal sentence-transformers'
    `quantize_embeddings`.

    :param vectors: float32 array (n, dim).
    :param precision: the format.
    :param ranges: float32 array (2, dim), smallest and largest value of each component, for int8 and
        uint8; None takes them from `vectors`, so that results depend on the whole set.
    :param truncate_dim: keep only the first so many components.
    :param normalizes: scale what is kept to L2 norm 1.
    :returns: array (n, dim); (n, dim / 8) for binary (int8) and ubinary (uint8).
    :raises ValueError: for an unknown format or ranges of another shape.
    """
    if truncate_dim is not None:
        vectors = np.ascontiguousarray(vectors[:, :truncate_dim])
    if normalizes:
        vectors = normalize(vectors)
    if precision == "float32":
        return vectors
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return (bits - 128).view(np.int8) if precision == "binary" else bits
    if precision in SPREAD:
        return _spread(vectors, precision, ranges)
    raise ValueError(
        f"precision {precision!r} is not one of {', '.join(get_args(OutputPrecision))}"
    )


def _spread(
    vectors: npt.NDArray[np.float32], precision: str, ranges: npt.NDArray[np.float32] | None
) -> npt.NDArray[Any]:
    if ranges is None:
        if len(vectors) == 0:
            return vectors.astype(precision)
        if len(vectors) == 1:
            raise ValueError(
                f"{precision} needs ranges: those of one vector are empty; encode several texts, or "
                "pass ranges of a representative set"
            )
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    if ranges.shape != (2, vectors.shape[1]):
        raise ValueError(f"ranges must have shape (2, {vectors.shape[1]}), got {ranges.shape}")
    low, high = ranges
    steps = (high - low) / 255
    scaled = np.clip(np.floor((vectors - low) / np.where(steps > 0, steps, 1)), 0, 255)
    return scaled.astype(np.uint8) if precision == "uint8" else (scaled - 128).astype(np.int8)
