"""Exact cosine similarity in blocks: dense, sparse, top-k, pairs. numpy and scipy only."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.similarity.memory import (
    Estimate,
    MemoryBudget,
    PairCounter,
    Progress,
    check_result_size,
    estimate_best,
    estimate_entries,
)
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.scoring import TopK
from onnxsim_embed.similarity.sparse import build_matrix, symmetric_matrix
from onnxsim_embed.similarity.unit_rows import Float32, UnitRows, check_dims, unit_vectors

__all__ = [
    "Pairs",
    "TopK",
    "check_threshold",
    "closest_pairs",
    "cos_sim",
    "estimate_similarity",
    "neighbours",
    "score_all",
    "score_pairs",
    "similar_pairs",
    "similarity_matrix",
    "top_k",
    "unit_vectors",
]

Int64 = npt.NDArray[np.int64]

# Bytes of one thread's block of scorer scores: large enough for matrix products at full speed, small
# enough to read again for the comparison before it leaves the caches.
TILE_BYTES = 8 << 20


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
    check_dims(left.shape[1], right.shape[1])
    return np.clip(left @ right.T, np.float32(-1), np.float32(1))


def similarity_matrix(
    vectors: npt.ArrayLike,
    threshold: float = 0.5,
    *,
    other: npt.ArrayLike | None = None,
    include_self: bool = True,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    block_bytes: int = TILE_BYTES,
) -> sparse.csr_array:
    """Return every cosine above a threshold as a sparse matrix.

    The result equals `dense > threshold` on the dense matrix without ever holding it. Comparing one
    set with itself computes half of it, and the matrix is symmetric to the bit.

    :param vectors: (n, dim), of any norm; a memory-mapped array that memory does not hold is read in
        parts.
    :param threshold: entries strictly above it are kept; from -1 to 1.
    :param other: (m, dim), a second set; None compares `vectors` with themselves.
    :param include_self: keep the diagonal (of one set only).
    :param max_memory: most bytes to use beyond the input; None for three quarters of what is free.
    :param show_progress_bar: show one on standard error.
    :param block_bytes: bytes of scores held at a time by each thread.
    :returns: float32 csr_array (n, n) or (n, m), sorted indices, no duplicates; `scipy.sparse.save_npz`
        writes it and `load_npz` reads it.
    :raises ValueError: for NaN or infinite values (naming the row), shapes that do not fit, or a
        threshold outside -1 to 1.
    :raises MemoryError: if the result does not fit; early where a sample of the rows shows it.
        `write_graph` takes any size.
    """
    check_threshold(threshold)
    work = _Work(vectors, other, max_memory, block_bytes)
    alone = other is None
    above = work.above(threshold, upper=alone, entries=2 if alone else 1, bar=show_progress_bar)
    if not alone:
        return above
    diagonal = work.left.diagonal(threshold)
    if not include_self:
        diagonal[:] = np.nan
    return symmetric_matrix(above, diagonal)


def similar_pairs(
    vectors: npt.ArrayLike,
    threshold: float = 0.8,
    *,
    other: npt.ArrayLike | None = None,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    block_bytes: int = TILE_BYTES,
) -> Pairs:
    """Return every pair with a cosine above a threshold, best first.

    :param vectors: (n, dim), of any norm.
    :param threshold: pairs strictly above it are returned; from -1 to 1.
    :param other: (m, dim), a second set; None pairs `vectors` with themselves, each pair once.
    :param max_memory: as for `similarity_matrix`, as are the rest.
    :raises ValueError: as `similarity_matrix`.
    :raises MemoryError: as `similarity_matrix`.
    """
    check_threshold(threshold)
    work = _Work(vectors, other, max_memory, block_bytes)
    found = work.above(threshold, upper=other is None, entries=2, bar=show_progress_bar)
    rows = np.repeat(np.arange(work.left.rows), np.diff(found.indptr))
    order = np.argsort(-found.data, kind="stable")  # pairs come row by row
    return Pairs(rows[order], found.indices[order].astype(np.int64), found.data[order])


def estimate_similarity(
    vectors: npt.ArrayLike,
    threshold: float = 0.5,
    *,
    other: npt.ArrayLike | None = None,
    k: int | None = None,
) -> Estimate:
    """Return how large `similarity_matrix` would be and how long it would take, from a sample of rows.

    :param vectors: (n, dim).
    :param threshold: as for `similarity_matrix`.
    :param other: (m, dim), a second set; None for `vectors` with themselves.
    :param k: estimate `top_k` or `neighbours` instead, so many of each row.
    :raises ValueError: as `similarity_matrix` or `top_k`.
    """
    check_threshold(threshold)
    work = _Work(vectors, other, None, TILE_BYTES)
    if k is not None:
        work.check_k(k, skip_self=other is None)
        return estimate_best(work.left, work.right, k)
    return estimate_entries(work.left, work.right, threshold)


def top_k(
    queries: npt.ArrayLike,
    vectors: npt.ArrayLike,
    k: int = 10,
    *,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    block_bytes: int = TILE_BYTES,
) -> TopK:
    """Return the k vectors closest to each query.

    :param queries: (n, dim) or (dim,).
    :param vectors: (m, dim), the set to search.
    :param k: how many; at most m.
    :param max_memory: as for `similarity_matrix`, as are the rest.
    :returns: arrays (n, k), best first, equal scores by lower index.
    :raises ValueError: if k is below 1 or above m, or for values and shapes as `similarity_matrix`.
    :raises MemoryError: if the result does not fit.
    """
    work = _Work(np.atleast_2d(np.asarray(queries)), vectors, max_memory, block_bytes)
    return work.best(k, skip_self=False, bar=show_progress_bar)


def neighbours(
    vectors: npt.ArrayLike,
    k: int = 10,
    *,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    block_bytes: int = TILE_BYTES,
) -> TopK:
    """Return the k closest other rows of each row of one set.

    :param vectors: (n, dim).
    :param k: how many; at most n - 1.
    :param max_memory: as for `similarity_matrix`, as are the rest.
    :returns: arrays (n, k), best first, equal scores by lower index.
    :raises ValueError: as `top_k`.
    :raises MemoryError: as `top_k`.
    """
    work = _Work(vectors, None, max_memory, block_bytes)
    return work.best(k, skip_self=True, bar=show_progress_bar)


def closest_pairs(
    vectors: npt.ArrayLike, count: int = 10, *, max_memory: int | None = None
) -> Pairs:
    """Return the `count` closest pairs of one set, or all pairs where there are fewer.

    :param vectors: (n, dim).
    :param count: how many pairs.
    :param max_memory: as for `similarity_matrix`.
    """
    work = _Work(vectors, None, max_memory, TILE_BYTES)
    size = work.left.rows
    k = min(count, size - 1)
    if k < 1:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    # A pair among the best `count` of all is among the best `count` of each of its rows.
    best = work.best(k, skip_self=True)
    left = np.repeat(np.arange(size), k)
    right, scores = best.indices.ravel(), best.scores.ravel()
    low, high = np.minimum(left, right), np.maximum(left, right)
    _, first = np.unique(low * size + high, return_index=True)
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
    check_dims(left.shape[1], right.shape[1])
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


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that no cosine can pass or miss.

    :raises ValueError: if it is not from -1 to 1.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be from -1 to 1, got {threshold}")


class _Work:
    """Two sets, or one with itself, and the memory for comparing them.

    :param vectors: (n, dim).
    :param other: (m, dim), or None.
    """

    def __init__(
        self,
        vectors: npt.ArrayLike,
        other: npt.ArrayLike | None,
        max_memory: int | None,
        block_bytes: int,
    ) -> None:
        self._budget = MemoryBudget(max_memory)
        self.left = UnitRows(vectors, self._budget.vector_bytes)
        self.right = self.left
        if other is not None:
            self.right = UnitRows(other, self._budget.vector_bytes)
            check_dims(self.left.dim, self.right.dim)
        self._pairs = AllPairs(self.left, self.right, block_bytes)

    def above(self, threshold: float, *, upper: bool, entries: int, bar: bool) -> sparse.csr_array:
        """Return the pairs above a threshold.

        :param entries: entries of the result that a pair makes.
        """
        most = self._budget.max_entries(self.left, self.right)
        check_result_size(self.left, self.right, threshold, most)
        limit = PairCounter(most // entries, threshold)
        found = self._pairs.above(threshold, upper=upper, on_pairs=limit)
        with Progress(self.left.rows, bar, upper) as progress:
            return build_matrix((progress.count(part) for part in found), self.right.rows)

    def check_k(self, k: int, skip_self: bool) -> None:
        """Refuse a k that is not there.

        :raises ValueError: naming those that are.
        """
        most = self.right.rows - skip_self
        if most < 1:
            raise ValueError(f"there are no vectors to choose {k} from")
        if not 1 <= k <= most:
            raise ValueError(
                f"k must be from 1 to {most} (the number of vectors to choose from), got {k}"
            )

    def best(self, k: int, *, skip_self: bool, bar: bool = False) -> TopK:
        """Return the k best of each row."""
        self.check_k(k, skip_self)
        self._budget.check_top_k(self.left, self.right, k)
        scores = np.empty((self.left.rows, k), np.float32)
        indices = np.empty(scores.shape, np.int64)
        done = 0
        with Progress(self.left.rows, bar, upper=False) as progress:
            for part in self._pairs.top_k(k, skip_self=skip_self):
                rows = slice(done, done + len(part.scores))
                scores[rows], indices[rows] = part.scores, part.indices
                done = rows.stop
                progress.add(len(part.scores))
        return TopK(scores, indices)
