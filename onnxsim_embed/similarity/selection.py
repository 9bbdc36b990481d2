"""Selection of the top-k, of top pairs and of pairs above bounds from scores. numpy only."""

from __future__ import annotations

from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxsim_embed.system.arrays import Float32, Int64

Float64 = npt.NDArray[np.float64]
Scores = npt.NDArray[Any]


class TopK(NamedTuple):
    """Top-k of each query in descending order of score; ties by lower index."""

    scores: Float32  # (queries, k)
    indices: Int64  # (queries, k), row numbers of the searched vectors


class RowPairs(NamedTuple):
    """Pairs of a chunk of rows, row by row, columns ascending."""

    counts: Int64  # (rows,), pairs of each row
    columns: npt.NDArray[np.integer[Any]]  # int32 or int64
    scores: Float32


class Pairs(NamedTuple):
    """Pairs of rows in descending order of score; ties by lower left, then right index."""

    left: Int64  # (pairs,)
    right: Int64  # (pairs,), greater than `left` if one set was compared with itself
    scores: Float32  # (pairs,)


def select_top_k(row: Int64, column: Int64, scores: Scores, rows: int, k: int) -> TopK:
    """Return the top-k of each row from pairs in any order, at least k for each row."""
    order = np.lexsort((column, -scores, row))
    counts = np.bincount(row, minlength=rows)
    chosen = order[(np.cumsum(counts) - counts)[:, None] + np.arange(k)]
    return TopK(scores[chosen], column[chosen])


def top_k_of_rows(scores: Scores, k: int, columns: Int64 | None = None) -> TopK:
    """Return the top-k of each row of dense scores, or all; `columns`: their numbers if not 0, 1, ..."""
    k = min(k, scores.shape[1])
    if not scores.size or not k:
        return TopK(scores[:, :k], np.zeros((len(scores), k), np.int64))
    kth = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    row, column = np.nonzero(scores >= kth)
    numbers = column if columns is None else columns[row, column]
    return select_top_k(row, numbers, scores[row, column], len(scores), k)


# A key that sorts pairs by descending score, then ascending column: -inf, and no column.
NO_PAIR = (0x7F800000 << 32) | 0xFFFFFFFF


class BestOfRows:
    """The top-k of each row, collected from pairs by several threads; each pair may be added once."""

    def __init__(self, rows: int, k: int) -> None:
        self.k = k
        self.bounds = np.full(rows, -np.inf, np.float32)  # the k-th best scores so far
        self._keys = np.full((rows, k), NO_PAIR, np.int64)
        self._lock = Lock()

    def add(self, row: Int64, column: Int64, scores: Float32) -> None:
        """Add pairs, sorted by row; those below the bound of their row are ignored."""
        useful = scores >= self.bounds[row]
        row, column, scores = row[useful], column[useful], scores[useful]
        if not len(row):
            return
        starts = np.concatenate([[0], np.flatnonzero(np.diff(row)) + 1])
        counts = np.diff(starts, append=len(row))
        rows, line = row[starts], np.repeat(np.arange(len(starts)), counts)
        k = self.k
        keys = np.full((len(rows), k + counts.max()), NO_PAIR, np.int64)
        keys[line, k + np.arange(len(row)) - starts[line]] = _keys(scores, column)
        with self._lock:
            keys[:, :k] = self._keys[rows]
            keys.sort(axis=1)
            self._keys[rows] = keys[:, :k]
            self.bounds[rows] = _scores_of(keys[:, k - 1])

    def top(self) -> TopK:
        """Return the top-k of all rows."""
        return TopK(_scores_of(self._keys), self._keys & 0xFFFFFFFF)


def _keys(scores: Float32, column: Int64) -> Int64:
    bits = (scores + np.float32(0)).view(np.int32)  # not -0
    ascending = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (~ascending).astype(np.int64) << 32 | column


def _scores_of(keys: Int64) -> Float32:
    ascending = ~(keys >> 32).astype(np.int32)
    return np.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).view(np.float32)


def kth_bounds(scores: Scores, k: int) -> Scores:
    """Return for each row (rows, 1) of a tile a score that at least k of its scores reach, and few more.

    Columns are divided into groups; the k-th largest of the groups' maxima is such a score. It takes one
    pass at memory speed, where a partition of every row takes ten.
    """
    rows, columns = scores.shape
    if columns < k:
        return np.full((rows, 1), -np.inf, np.float32)
    size = 1 << max(0, min(64, columns // (4 * k)).bit_length() - 1)  # several times k groups
    groups = columns // size
    maxima = scores[:, : groups * size].reshape(rows, size, groups).max(axis=1)
    return np.partition(maxima, groups - k, axis=1)[:, groups - k, None]


def positions(mask: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Return the rows and columns where a 2-D mask is true; `np.nonzero`, but faster."""
    width = max(1, mask.shape[1])
    flat = np.flatnonzero(mask)
    row = flat // width
    return row, flat - row * width


def narrow(numbers: Int64, count: int) -> npt.NDArray[Any]:
    """Return numbers below `count` in 16 bits if they fit: numpy sorts those ten times faster."""
    return numbers.astype(np.uint16) if count <= 1 << 16 else numbers


class TopPairs:
    """The pairs of a set with the highest scores, collected in bounded memory.

    Of equal scores, pairs with lower rows are kept; of a pair that is added twice, the first score.
    """

    def __init__(self, size: int, limit: int | None) -> None:
        self.bound = -np.inf
        self._size = size
        self._limit = limit
        self._added: list[tuple[Int64, Scores]] = [(np.zeros(0, np.int64), np.zeros(0, np.float32))]
        self._pending = 0

    def add(self, a: Int64, b: Int64, scores: Scores) -> None:
        """Add pairs of rows in any order; those below `bound` are ignored."""
        kept = scores >= self.bound
        keys = np.minimum(a, b) * self._size + np.maximum(a, b)
        self._added.append((keys[kept], scores[kept]))
        self._pending += int(np.count_nonzero(kept))
        if self._limit is not None and self._pending > self._limit:
            self._added = [self._top()]
            self._pending = 0

    def result(self) -> Pairs:
        """Return the top pairs so far."""
        keys, scores = self._top()
        order = np.argsort(-scores, kind="stable")  # keys ascend, so ties go by lower rows
        return Pairs(*np.divmod(keys[order], max(1, self._size)), scores[order])

    def _top(self) -> tuple[Int64, Scores]:
        """Return the keys, ascending, and the scores of the top pairs; raise the bound."""
        keys, scores = (np.concatenate(arrays) for arrays in zip(*self._added, strict=True))
        if (np.diff(keys) <= 0).any():
            keys, first = np.unique(keys, return_index=True)
            scores = scores[first]
        if self._limit is None or len(keys) <= self._limit:
            return keys, scores
        self.bound = np.partition(scores, len(scores) - self._limit)[len(scores) - self._limit]
        chosen = scores > self.bound
        ties = np.flatnonzero(scores == self.bound)
        chosen[ties[: self._limit - np.count_nonzero(chosen)]] = True
        return keys[chosen], scores[chosen]
