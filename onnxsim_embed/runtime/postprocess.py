"""Hidden states -> results: pooling, truncation, normalization, output dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.options import RANGED, EncodeOptions, OutputPrecision, check_ranges
from onnxsim_embed.runtime.pooling import Head, normalize
from onnxsim_embed.runtime.windows import Windows, WindowSplitter
from onnxsim_embed.system.arrays import Float32, Int64

Mask = Int64 | None
Merge = Callable[[Windows, Float32], npt.NDArray[Any]]


class Output(NamedTuple):
    """The function that turns hidden states into results, and the shape and dtype of one text's result.

    :param finish: maps hidden, float32 (batch, tokens, hidden), and its mask to one result a row.
    :param pooled: whether `finish` may be given the model's own embeddings (batch, dim) instead.
    :param long_texts: for long_texts="mean": what splits texts, the output of their windows, and what
        maps the vectors of windows, float32 (windows, dim), to one result a text.
    """

    finish: Callable[[Float32, Mask], npt.NDArray[Any]]
    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    pooled: bool = False
    long_texts: tuple[WindowSplitter, Output, Merge] | None = None


def make_output(
    head: Head,
    dim: int,
    options: EncodeOptions,
    skip: int = 0,
    splitter: WindowSplitter | None = None,
) -> Output:
    """Return the output stage of a model for some options.

    :param skip: number of tokens at the beginning of each text that are not pooled.
    :param splitter: splits long texts into windows; None if they are truncated.
    :raises ValueError: for dimensions that the model does not have, or missing ranges.
    """
    kept = check_truncation(options.truncate_dim, dim)
    if options.output_value == "token_embeddings":
        return Output(_token_vectors, (), object)
    if options.precision in RANGED and options.ranges is None:
        raise ValueError(
            f"precision {options.precision!r} needs ranges here: an array (2, {kept}), the minimum "
            "and maximum of each dimension in a representative set of float32 vectors"
        )
    # Quantizing no rows yields the shape and dtype of a row, and checks the ranges.
    sample = quantize_vectors(np.zeros((0, kept), np.float32), options.precision, options.ranges)

    def finish(hidden: Float32, mask: Mask) -> npt.NDArray[Any]:
        vectors = hidden if hidden.ndim == 2 else head(hidden, mask, skip)
        return finish_vectors(vectors, options)

    def merge(windows: Windows, vectors: Float32) -> npt.NDArray[Any]:
        return finish_vectors(windows.mean(vectors, head.normalizes), options)

    output = Output(finish, sample.shape[1:], sample.dtype, pooled=not skip)
    if splitter is None:
        return output
    of_windows = make_output(head, dim, EncodeOptions(), skip)
    return output._replace(long_texts=(splitter, of_windows, merge))


def check_truncation(truncate_dim: int | None, dim: int) -> int:
    """Return the dimension of vectors after truncation; ValueError if it exceeds `dim`."""
    if truncate_dim is not None and truncate_dim > dim:
        raise ValueError(f"truncate_dim must be from 1 to {dim}, got {truncate_dim}")
    return dim if truncate_dim is None else int(truncate_dim)


def finish_vectors(vectors: Float32, options: EncodeOptions) -> npt.NDArray[Any]:
    """Truncate, normalize and quantize vectors (n, dim) as the options say."""
    if options.truncate_dim is not None:
        vectors = np.ascontiguousarray(vectors[:, : options.truncate_dim])
    if options.normalize_embeddings:
        vectors = normalize(vectors)
    return quantize_vectors(vectors, options.precision, options.ranges)


def quantize_vectors(
    vectors: Float32, precision: OutputPrecision, ranges: npt.ArrayLike | None = None
) -> npt.NDArray[Any]:
    """Convert vectors to another dtype, exactly as sentence-transformers' `quantize_embeddings`.

    int8 and uint8 map the range of each dimension to 256 steps; binary and ubinary keep one bit per
    dimension (positive or not), eight to a byte.

    :param vectors: float32 array (n, dim).
    :param ranges: minimum and maximum of each dimension (2, dim), for int8 and uint8; None computes
        them from `vectors`, so that results depend on the whole set.
    :returns: array (n, dim); (n, dim / 8) for binary (int8) and ubinary (uint8).
    :raises ValueError: for an unknown precision or invalid ranges.
    """
    if precision == "float32":
        return vectors
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return (bits - 128).view(np.int8) if precision == "binary" else bits
    EncodeOptions(precision=precision)  # raises for an unknown one
    if ranges is None:
        if len(vectors) == 0:
            return vectors.astype(precision)
        if len(vectors) == 1:
            raise ValueError(
                f"{precision} needs ranges: those of one vector are empty; encode several texts, or "
                "pass ranges of a representative set"
            )
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    low, high = check_ranges(ranges, vectors.shape[1])
    steps = (high - low) / 255
    scaled = np.clip(np.floor((vectors - low) / np.where(steps > 0, steps, 1)), 0, 255)
    return scaled.astype(np.uint8) if precision == "uint8" else (scaled - 128).astype(np.int8)


def as_tensors(result: Any) -> Any:  # noqa: ANN401 - an array or a list of arrays
    """Return an array as a PyTorch tensor that shares its memory, or a list of arrays as tensors."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError(
            "PyTorch tensors were requested, and PyTorch is not installed: pip install torch, or use "
            "the numpy arrays that encode returns by default"
        ) from None
    if isinstance(result, list):
        return [torch.from_numpy(row) for row in result]
    return torch.from_numpy(result)


def _token_vectors(hidden: Float32, mask: Mask) -> npt.NDArray[Any]:
    """Return an object array (batch,) of float32 arrays (tokens, hidden), without padding."""
    rows = np.empty(len(hidden), object)
    for row, states in enumerate(hidden):
        rows[row] = np.array(states if mask is None else states[mask[row] == 1])
    return rows
