"""Selection of the top-k, of top pairs and of pairs above bounds from scores. numpy only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Scores = npt.NDArray[Any]


class TopK(NamedTuple):
    """Top-k of each query in descending order of score; ties by lower index."""

    scores: Float32  # (queries, k)
    indices: Int64  # (queries, k), row numbers of the searched vectors


class RowPairs(NamedTuple):
    """Pairs of a chunk of rows, row by row, columns ascending."""

    counts: Int64  # (rows,), pairs of each row
    columns: Int64
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


class KthBounds:
    """For each row a score that at least k of its scores so far reach, and few more.

    Columns are divided into groups; the k-th largest of the groups' maxima is such a score, as k groups
    hold a score as large. It takes one pass at memory speed, where a partition of every row takes ten.
    """

    def __init__(self, rows: int, k: int) -> None:
        self.kth: Float64 = np.full(rows, -np.inf)
        self._k = k
        self._largest: Scores | None = None

    def add(self, scores: Scores) -> Scores:
        """Add a tile of scores, and return the maxima of its groups: g, g + groups, g + 2 groups, ..."""
        rows, columns = scores.shape
        size = self._group_size(columns)
        groups = columns // size
        maxima = scores[:, : groups * size].reshape(rows, size, groups).max(axis=1)
        largest = maxima if self._largest is None else np.hstack([self._largest, maxima])
        if largest.shape[1] > self._k:
            largest = np.partition(largest, largest.shape[1] - self._k, axis=1)[:, -self._k :]
        self._largest = largest
        if largest.shape[1] == self._k:
            self.kth = largest.min(axis=1).astype(np.float64)
        return maxima

    def _group_size(self, columns: int) -> int:
        # There are several times k groups.
        return 1 << max(0, min(64, columns // (4 * self._k)).bit_length() - 1)

    def positions_above(
        self, scores: Scores, maxima: Scores, bounds: Scores
    ) -> tuple[Int64, Int64]:
        """Return rows and columns of scores above their row's bound, columns of a row in any order."""
        # Few groups exceed a bound, and only those are searched: by positions in the flattened tile,
        # which numpy gathers several times as fast as by index pairs.
        size, groups = self._group_size(scores.shape[1]), maxima.shape[1]
        row, group = positions(maxima > bounds)
        first = row * scores.shape[1] + group
        values = scores.ravel().take(first[:, None] + groups * np.arange(size))
        hit, member = positions(values > bounds[row])
        rest_row, rest_column = positions(scores[:, groups * size :] > bounds)
        return (
            np.concatenate([row[hit], rest_row]),
            np.concatenate([group[hit] + groups * member, rest_column + groups * size]),
        )


def positions(mask: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Return the rows and columns where a 2-D mask is true; `np.nonzero`, but faster."""
    width = max(1, mask.shape[1])
    flat = np.flatnonzero(mask)
    row = flat // width
    return row, flat - row * width


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
