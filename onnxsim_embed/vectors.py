"""Number formats of finished vectors, as sentence-transformers' quantize_embeddings makes them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

OutputPrecision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]


def finish_vectors(
    vectors: npt.NDArray[np.float32],
    precision: OutputPrecision = "float32",
    ranges: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[Any]:
    """Convert vectors to another number format.

    int8 and uint8 spread each component's range over 256 steps; binary and ubinary keep one bit a
    component (above zero or not), eight to a byte. Formats equal sentence-transformers'
    `quantize_embeddings`.

    :param vectors: float32 array (n, dim).
    :param precision: the format.
    :param ranges: float32 array (2, dim), smallest and largest value of each component, for int8 and
        uint8; None takes them from `vectors`, so that results depend on the whole set.
    :returns: array (n, dim); (n, dim / 8) for binary (int8) and ubinary (uint8).
    :raises ValueError: for an unknown format or ranges of another shape.
    """
    if precision == "float32":
        return vectors
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return (bits - 128).view(np.int8) if precision == "binary" else bits
    if precision in ("int8", "uint8"):
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
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    if ranges.shape != (2, vectors.shape[1]):
        raise ValueError(f"ranges must have shape (2, {vectors.shape[1]}), got {ranges.shape}")
    low, high = ranges
    steps = (high - low) / 255
    scaled = (vectors - low) / np.where(steps > 0, steps, 1)
    if precision == "uint8":
        return np.clip(scaled, 0, 255).astype(np.uint8)
    return np.clip(scaled - 128, -128, 127).astype(np.int8)
