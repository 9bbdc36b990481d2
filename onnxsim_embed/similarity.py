"""Exact cosine similarity in blocks: dense, sparse, top-k, pairs. numpy and scipy only."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.blocks import Search
from onnxsim_embed.csr import matrix_of, symmetric_matrix

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Bytes of one thread's block of rough scores: large enough for matrix products at full speed, small
# enough to read again for the comparison before it leaves the caches.
BLOCK_BYTES = 8 << 20


class TopK(NamedTuple):
    """The k best of each query, best first; equal scores by lower index.

    :param scores: float32 array (queries, k).
    :param indices: int64 array (queries, k), rows of the searched vectors.
    """

    scores: Float32
    indices: Int64


class Pairs(NamedTuple):
    """Pairs of rows, best first; equal scores by lower left, then right index.

    :param left: int64 array (pairs,).
    :param right: int64 array (pairs,); above `left` where one set was compared with itself.
    :param scores: float32 array (pairs,).
    """

    left: Int64
    right: Int64
    scores: Float32


def cos_sim(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Return the cosine of every row of `a` with every row of `b`, as one dense array.

    :param a: (n, dim) or (dim,).
    :param b: (m, dim) or (dim,).
    :returns: float32 array (n, m); a zero row scores 0.
    """
    left, right = (
        unit_vectors(np.atleast_2d(np.asarray(a))),
        unit_vectors(np.atleast_2d(np.asarray(b))),
    )
    _check_pair(left, right)
    return np.clip(left @ right.T, np.float32(-1), np.float32(1))


def similarity_matrix(
    vectors: npt.ArrayLike,
    threshold: float = 0.5,
    *,
    other: npt.ArrayLike | None = None,
    include_self: bool = True,
    block_bytes: int = BLOCK_BYTES,
) -> sparse.csr_array:
    """Return every cosine above a threshold as a sparse matrix.

    The result equals `dense > threshold` on the dense matrix without ever holding it. Comparing one
    set with itself computes half of it, and the matrix is symmetric to the bit.

    :param vectors: (n, dim), of any norm.
    :param threshold: entries strictly above it are kept; from -1 to 1.
    :param other: (m, dim), a second set; None compares `vectors` with themselves.
    :param include_self: keep the diagonal (of one set only).
    :param block_bytes: bytes of scores held at a time.
    :returns: float32 csr_array (n, n) or (n, m), sorted indices, no duplicates; `scipy.sparse.save_npz`
        writes it and `load_npz` reads it.
    :raises ValueError: for NaN or infinite values (naming the row), shapes that do not fit, or a
        threshold outside -1 to 1.
    """
    check_threshold(threshold)
    left = unit_vectors(vectors)
    if other is not None:
        right = unit_vectors(other)
        _check_pair(left, right)
        return matrix_of(Search(left, right, block_bytes).above(threshold, upper=False), len(right))
    above = matrix_of(Search(left, left, block_bytes).above(threshold, upper=True), len(left))
    # A row with itself: 1 for any direction, 0 for a zero row, whatever the rounding of a product.
    diagonal = np.any(left != 0, axis=1).astype(np.float32)
    diagonal[~(diagonal > threshold) | (not include_self)] = np.nan
    return symmetric_matrix(above, diagonal)


def similar_pairs(
    vectors: npt.ArrayLike,
    threshold: float = 0.8,
    *,
    other: npt.ArrayLike | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Pairs:
    """Return every pair with a cosine above a threshold, best first.

    :param vectors: (n, dim), of any norm.
    :param threshold: pairs strictly above it are returned; from -1 to 1.
    :param other: (m, dim), a second set; None pairs `vectors` with themselves, each pair once.
    :param block_bytes: bytes of scores held at a time.
    :raises ValueError: as `similarity_matrix`.
    """
    check_threshold(threshold)
    left = unit_vectors(vectors)
    right = left if other is None else unit_vectors(other)
    _check_pair(left, right)
    found = matrix_of(
        Search(left, right, block_bytes).above(threshold, upper=other is None), len(right)
    )
    rows = np.repeat(np.arange(len(left)), np.diff(found.indptr))
    order = np.argsort(-found.data, kind="stable")  # pairs come row by row
    return Pairs(rows[order], found.indices[order].astype(np.int64), found.data[order])


def top_k(
    queries: npt.ArrayLike,
    vectors: npt.ArrayLike,
    k: int = 10,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> TopK:
    """Return the k vectors closest to each query.

    :param queries: (n, dim) or (dim,).
    :param vectors: (m, dim), the set to search.
    :param k: how many; at most m.
    :param block_bytes: bytes of scores held at a time.
    :returns: arrays (n, k), best first, equal scores by lower index.
    :raises ValueError: if k is below 1 or above m, or for values and shapes as `similarity_matrix`.
    """
    left, right = unit_vectors(np.atleast_2d(np.asarray(queries))), unit_vectors(vectors)
    _check_pair(left, right)
    return _top_k(left, right, k, block_bytes, skip_self=False)


def neighbours(vectors: npt.ArrayLike, k: int = 10, *, block_bytes: int = BLOCK_BYTES) -> TopK:
    """Return the k closest other rows of each row of one set.

    :param vectors: (n, dim).
    :param k: how many; at most n - 1.
    :returns: arrays (n, k), best first, equal scores by lower index.
    """
    unit = unit_vectors(vectors)
    return _top_k(unit, unit, k, block_bytes, skip_self=True)


def closest_pairs(vectors: npt.ArrayLike, count: int = 10) -> Pairs:
    """Return the `count` closest pairs of one set, or all pairs where there are fewer.

    :param vectors: (n, dim).
    :param count: how many pairs.
    """
    unit = unit_vectors(vectors)
    k = min(count, len(unit) - 1)
    if k < 1:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    # A pair among the best `count` of all is among the best `count` of each of its rows.
    best = _top_k(unit, unit, k, BLOCK_BYTES, skip_self=True)
    left = np.repeat(np.arange(len(unit)), k)
    right, scores = best.indices.ravel(), best.scores.ravel()
    low, high = np.minimum(left, right), np.maximum(left, right)
    _, first = np.unique(low * len(unit) + high, return_index=True)
    low, high, scores = low[first], high[first], scores[first]
    order = np.lexsort((high, low, -scores))[:count]
    return Pairs(low[order], high[order], scores[order])


def score_all(a: npt.ArrayLike, b: npt.ArrayLike, measure: str) -> Float32:
    """Return the score of every row of `a` with every row of `b` by sentence-transformers' measures.

    :param measure: cosine, dot, euclidean or manhattan (the last two negated distances).
    :returns: float32 array (n, m).
    :raises ValueError: for another measure.
    """
    if measure == "cosine":
        return cos_sim(a, b)
    left, right = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
    _check_pair(left, right)
    if measure == "dot":
        return left @ right.T
    from scipy.spatial.distance import cdist

    return np.asarray(
        -cdist(left.astype(np.float64), right.astype(np.float64), _metric(measure)), np.float32
    )


def score_pairs(a: npt.ArrayLike, b: npt.ArrayLike, measure: str) -> Float32:
    """Return the score of each row of `a` with the same row of `b`; see `score_all`.

    :returns: float32 array (n,).
    """
    left, right = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
    if left.shape != right.shape:
        raise ValueError(
            f"pairwise scores need two equal shapes, got {left.shape} and {right.shape}"
        )
    if measure in ("cosine", "dot"):
        if measure == "cosine":
            left, right = unit_vectors(left), unit_vectors(right)
        return np.asarray(np.einsum("ij,ij->i", left, right))
    order = {"cityblock": 1, "euclidean": 2}[_metric(measure)]
    return np.asarray(-np.linalg.norm(left - right, ord=order, axis=1), np.float32)


def _metric(measure: str) -> Literal["euclidean", "cityblock"]:
    names: dict[str, Literal["euclidean", "cityblock"]] = {
        "euclidean": "euclidean",
        "manhattan": "cityblock",
    }
    if measure not in names:
        raise ValueError(f"similarity {measure!r} is not one of cosine, dot, euclidean, manhattan")
    return names[measure]


def unit_vectors(vectors: npt.ArrayLike) -> Float32:
    """Return vectors as float32 rows of L2 norm 1; zero rows stay zero.

    :param vectors: (n, dim), float16, float32, float64 or integers.
    :raises ValueError: naming the first row with NaN or infinity, or the shape if it is not 2-D.
    """
    array = np.asarray(vectors)
    if array.ndim != 2:
        raise ValueError(f"vectors must have shape (n, dim), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"vectors must be numbers, got dtype {array.dtype}")
    # As float64 while it matters: what is beyond float32 there has a direction nevertheless.
    wide: npt.NDArray[Any] = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    # The largest component first: the square of a huge or tiny one leaves float32's range.
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest[:, 0]))[0])
        raise ValueError(f"vectors hold NaN or infinity, first in row {row}")
    wide /= np.where(largest > 0, largest, np.float32(1))
    values: Float32 = wide.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))[:, None]
    values /= np.where(norms > 0, norms, np.float32(1))
    return values


def _check_pair(left: Float32, right: Float32) -> None:
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"vectors have different widths: {left.shape[1]} and {right.shape[1]}")


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that no cosine can pass or miss.

    :raises ValueError: if it is not from -1 to 1.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be from -1 to 1, got {threshold}")


def _top_k(left: Float32, right: Float32, k: int, block_bytes: int, skip_self: bool) -> TopK:
    most = len(right) - skip_self
    if most < 1:
        raise ValueError(f"there are no vectors to choose {k} from")
    if not 1 <= k <= most:
        raise ValueError(
            f"k must be from 1 to {most} (the number of vectors to choose from), got {k}"
        )
    return TopK(*Search(left, right, block_bytes).best(k, skip_self=skip_self))
