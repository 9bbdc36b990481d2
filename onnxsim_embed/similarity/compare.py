"""Exact cosine similarity: dense, sparse, top-k, pairs. numpy and scipy only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.similarity.memory import Estimate, MemoryBudget, Progress, estimate, pair_counter
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.scoring import dense_scores, exact_scores
from onnxsim_embed.similarity.selection import Pairs, RowPairs, TopK, TopPairs
from onnxsim_embed.similarity.sparse import build_matrix, symmetric_matrix
from onnxsim_embed.similarity.unit_rows import UnitRows, check_dims, unit_vectors
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.units import check_integer

__all__ = [
    "Pairs", "TopK", "check_threshold", "closest_pairs", "cos_sim", "estimate_similarity", "neighbours",
    "score_all", "score_pairs", "similar_pairs", "similarity_matrix", "sorted_pairs", "top_k", "unit_vectors",
]  # fmt: skip

TILE_BYTES = 8 << 20  # of scores per thread: products at full speed, read again from the caches


def cos_sim(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Return the cosine of every row of `a` with every row of `b`, as one dense array.

    :param a: (n, dim) or (dim,).
    :param b: (m, dim) or (dim,).
    :returns: float32 array (n, m); a zero row scores 0.
    """
    left, right = (unit_vectors(np.atleast_2d(np.asarray(x))) for x in (a, b))
    check_dims(left.shape[1], right.shape[1])
    return dense_scores(left, right)


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

    The result equals `dense > threshold` without computing the dense matrix. Comparing one set with
    itself computes half of it, and the matrix is bitwise symmetric.

    :param vectors: (n, dim), of any norm; a memory-mapped array larger than memory is read tile by tile.
    :param threshold: scores strictly above it are kept; from -1 to 1.
    :param other: (m, dim), a second set; None compares `vectors` with themselves.
    :param include_self: keep the diagonal (of one set).
    :param max_memory: maximum bytes to use beyond the input; None for 3/4 of the available memory.
    :param show_progress_bar: show a progress bar on standard error.
    :param block_bytes: bytes of a tile of scores per thread.
    :returns: float32 csr_array (n, n) or (n, m), sorted indices, no duplicates.
    :raises ValueError: for NaN or infinite values (naming the row), mismatched shapes, or a threshold
        outside -1 to 1.
    :raises TypeError: for a threshold that is not a number, such as a second set in its place.
    :raises MemoryError: if the result does not fit. `write_graph` has no such limit.
    """
    check_threshold(threshold)
    comparison = Comparison(vectors, other, max_memory, block_bytes)
    entries = 1.75 if other is None else 1  # parts and matrix: 24 bytes for each pair of one set
    with comparison.chunks(threshold, entries=entries, show=show_progress_bar) as chunks:
        if other is not None:
            return build_matrix(chunks, comparison.right.rows)
        diagonal = comparison.left.diagonal(threshold)
        if not include_self:
            diagonal[:] = np.nan
        return symmetric_matrix(chunks, diagonal)


def similar_pairs(
    vectors: npt.ArrayLike,
    threshold: float = 0.8,
    *,
    other: npt.ArrayLike | None = None,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    block_bytes: int = TILE_BYTES,
) -> Pairs:
    """Return every pair with a cosine above a threshold, in descending order of score.

    :param vectors: (n, dim), of any norm.
    :param threshold: pairs strictly above it are returned; from -1 to 1.
    :param other: (m, dim), a second set; None pairs `vectors` with themselves, each pair once.
    :param max_memory: as for `similarity_matrix`, as are the rest and the errors.
    """
    check_threshold(threshold)
    comparison = Comparison(vectors, other, max_memory, block_bytes)
    return sorted_pairs(comparison.above(threshold, entries=3, show=show_progress_bar))


def sorted_pairs(pairs: sparse.csr_array) -> Pairs:
    """Return the entries of a matrix as pairs in descending order of score, ties by row and column."""
    rows = np.repeat(np.arange(pairs.shape[0]), np.diff(pairs.indptr))
    order = np.argsort(-pairs.data, kind="stable")
    return Pairs(rows[order], pairs.indices[order].astype(np.int64), pairs.data[order])


def estimate_similarity(
    vectors: npt.ArrayLike,
    threshold: float = 0.5,
    *,
    other: npt.ArrayLike | None = None,
    k: int | None = None,
) -> Estimate:
    """Estimate the size of `similarity_matrix` and its time from a sample of rows.

    :param vectors: (n, dim).
    :param threshold: as for `similarity_matrix`.
    :param other: (m, dim), a second set; None for `vectors` with themselves.
    :param k: estimate `top_k` or `neighbours` with this k instead.
    :raises ValueError: as `similarity_matrix` or `top_k`.
    """
    check_threshold(threshold)
    comparison = Comparison(vectors, other)
    if k is not None:
        k = check_k(k, comparison.right.rows - (other is None))
    return estimate(comparison.left, comparison.right, threshold, k)


def top_k(
    queries: npt.ArrayLike,
    vectors: npt.ArrayLike,
    k: int = 10,
    *,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    block_bytes: int = TILE_BYTES,
) -> TopK:
    """Return the k nearest vectors of each query.

    :param queries: (n, dim) or (dim,).
    :param vectors: (m, dim), the vectors to search.
    :param k: number of nearest vectors, at most m.
    :param max_memory: as for `similarity_matrix`, as are the rest and the errors.
    :returns: arrays (n, k), in descending order of score, ties by lower index.
    :raises ValueError: if k is less than 1 or greater than m.
    """
    array = np.atleast_2d(np.asarray(queries))
    return Comparison(array, vectors, max_memory, block_bytes).top_k(k, show_progress_bar)


def neighbours(
    vectors: npt.ArrayLike,
    k: int = 10,
    *,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    block_bytes: int = TILE_BYTES,
) -> TopK:
    """Return the k nearest neighbours of each row among the other rows of the set.

    :param vectors: (n, dim).
    :param k: number of neighbours, at most n - 1.
    :param max_memory: as for `similarity_matrix`, as are the rest; errors as of `top_k`.
    :returns: arrays (n, k), in descending order of score, ties by lower index.
    """
    return Comparison(vectors, None, max_memory, block_bytes).top_k(k, show_progress_bar)


def closest_pairs(
    vectors: npt.ArrayLike, count: int = 10, *, max_memory: int | None = None
) -> Pairs:
    """Return the `count` closest pairs of one set, or all pairs if there are fewer.

    :param vectors: (n, dim).
    :param count: number of pairs.
    :param max_memory: as for `similarity_matrix`.
    """
    comparison = Comparison(vectors, None, max_memory)
    size = comparison.left.rows
    count = check_integer("count", count, 0)
    k = min(count, size - 1)
    if k < 1:
        return TopPairs(size, 0).result()
    # One of the `count` closest pairs is among the `count` nearest neighbours of each of its rows.
    nearest = comparison.top_k(k)
    best = TopPairs(size, count)
    best.add(np.repeat(np.arange(size), k), nearest.indices.ravel(), nearest.scores.ravel())
    return best.result()


def score_all(a: npt.ArrayLike, b: npt.ArrayLike, measure: str) -> Float32:
    """Return the score of every row of `a` with every row of `b` by a measure of sentence-transformers.

    :param measure: cosine, dot, euclidean or manhattan (the last two are negated distances).
    :returns: float32 array (n, m).
    :raises ValueError: for another measure.
    """
    if measure == "cosine":
        return cos_sim(a, b)
    left, right = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
    check_dims(left.shape[1], right.shape[1])
    if measure == "dot":
        return left @ right.T
    from scipy.spatial.distance import cdist  # in float64

    return np.asarray(-cdist(left, right, "minkowski", p=_distance_order(measure)), np.float32)


def score_pairs(a: npt.ArrayLike, b: npt.ArrayLike, measure: str) -> Float32:
    """Return the score of each row of `a` with the same row of `b`; see `score_all`.

    :returns: float32 array (n,).
    """
    left, right = (np.atleast_2d(np.asarray(x)) for x in (a, b))
    if left.shape != right.shape:
        raise ValueError(f"pairwise scores need equal shapes, got {left.shape} and {right.shape}")
    if measure == "cosine":
        rows = np.arange(len(left))
        return exact_scores(unit_vectors(left), unit_vectors(right), rows, rows)
    left, right = left.astype(np.float32), right.astype(np.float32)
    if measure == "dot":
        return np.asarray(np.einsum("ij,ij->i", left, right))
    return np.asarray(-np.linalg.norm(left - right, _distance_order(measure), axis=1), np.float32)


def _distance_order(measure: str) -> int:
    """Return the order of a distance's norm."""
    orders = {"euclidean": 2, "manhattan": 1}
    if measure not in orders:
        raise ValueError(f"similarity {measure!r} is not one of cosine, dot, euclidean, manhattan")
    return orders[measure]


def check_threshold(threshold: float) -> None:
    """Raise TypeError unless the threshold is a number, ValueError unless it is from -1 to 1."""
    if not isinstance(threshold, Real):
        raise TypeError(
            f"threshold must be a number from -1 to 1, got {type(threshold).__name__}; a second set of "
            "vectors is the argument `other`, and cos_sim returns all scores"
        )
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be from -1 to 1, got {threshold}")


def check_k(k: int, available: int) -> int:
    """Return k as int; raise ValueError unless k of the available vectors can be chosen."""
    if available < 1:
        raise ValueError(f"there are no vectors to choose {k} from")
    return check_integer("k", k, 1, available, "the number of vectors to choose from")


class Comparison:
    """A comparison of two sets of vectors or unit rows, or of one with itself, within a memory budget."""

    def __init__(
        self,
        vectors: npt.ArrayLike | UnitRows,
        other: npt.ArrayLike | UnitRows | None = None,
        max_memory: int | None = None,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        self._budget = MemoryBudget(max_memory)
        self._alone = other is None
        size = self._budget.vector_bytes
        arrays = [x for x in (vectors, None if other is vectors else other) if x is not None]
        sets = [x if isinstance(x, UnitRows) else UnitRows(x, size) for x in arrays]
        self.left, self.right = sets[0], sets[-1]
        check_dims(self.left.dim, self.right.dim)
        self._pairs = AllPairs(self.left, self.right, tile_bytes)

    @contextmanager
    def chunks(
        self, threshold: float, *, entries: float = 1, show: bool = False
    ) -> Iterator[Iterator[RowPairs]]:
        """Give the pairs above a threshold, chunk by chunk; of one set, only the upper triangle.

        :param entries: of PEAK_ENTRY_BYTES that the result takes for each pair.
        """
        self._budget.check_above(self.left, self.right, threshold)
        max_pairs = int(self._budget.max_entries(self.left, self.right) / entries)
        counter = pair_counter(max_pairs, threshold)
        chunks = self._pairs.above(threshold, upper=self._alone, on_pairs=counter)
        with Progress(self.left.rows, show) as progress:
            yield map(progress.count, chunks)

    def above(
        self, threshold: float, *, entries: float = 1, show: bool = False
    ) -> sparse.csr_array:
        """Return the matrix of `chunks`."""
        with self.chunks(threshold, entries=entries, show=show) as chunks:
            return build_matrix(chunks, self.right.rows)

    def top_k(self, k: int, show: bool = False) -> TopK:
        """Return the top-k of each row; of one set, without the row itself."""
        k = check_k(k, self.right.rows - self._alone)
        self._budget.check_top_k(self.left, self.right, k)
        with Progress(self.left.rows, show) as progress:
            return self._pairs.top_k(k, skip_self=self._alone, on_rows=progress.add)
