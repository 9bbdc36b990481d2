"""Blocks of scores, and what is taken out of them. numpy and scipy only.

Strips of rows run side by side on threads that use one BLAS thread each: products scale as well as with
BLAS's own threads, and all else scales with them. A strip goes through its columns block by block, keeps
the pairs that may count by their rough scores, and computes those exactly, each by itself: a score is
the same bit for bit whatever the blocks, the threads and the kind of rough scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from onnxsim_embed.rough import Float32Rough, Int8Rough, Rough, int8_serves, rounding
from onnxsim_embed.strips import STRIP_ROWS, map_strips, strips

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Pairs scored at once: two gathered copies of so many 384-wide rows stay in a second-level cache.
PAIRS = 256

# Fewer pairs or strips than these are not worth a trial of the two kinds of rough scores, for which all
# columns are turned into int8 and a strip is done twice.
TRIAL_PAIRS = 1 << 24
TRIAL_STRIPS = 24


class Found(NamedTuple):
    """Pairs of a strip, row by row, columns ascending.

    :param counts: int64 array (rows,), pairs of each row.
    :param columns: int64 array (pairs,).
    :param scores: float32 array (pairs,).
    """

    counts: Int64
    columns: Int64
    scores: Float32


def block_shape(block_bytes: int) -> tuple[int, int]:
    """Return rows and columns of a block of at most so many bytes of scores, four each.

    :raises ValueError: if `block_bytes` is not positive.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be positive, got {block_bytes}")
    height = max(1, min(STRIP_ROWS, int((block_bytes / 4) ** 0.5)))
    return height, max(1, block_bytes // (4 * height))


def exact_scores(left: Float32, right: Float32, rows: Int64, columns: Int64) -> Float32:
    """Return the score of each pair, computed by itself in float32.

    :param rows: int64 array (pairs,), rows of `left`.
    :param columns: int64 array (pairs,), rows of `right`.
    :returns: float32 array (pairs,), from -1 to 1: rounding may pass them, a cosine never does.
    """
    scores = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), PAIRS):
        part = slice(first, first + PAIRS)
        a, b = left.take(rows[part], axis=0), right.take(columns[part], axis=0)
        np.einsum("ij,ij->i", a, b, out=scores[part])
    return np.clip(scores, np.float32(-1), np.float32(1), out=scores)


class Search:
    """A comparison of two sets, or of one with itself.

    :param left: float32 unit vectors (n, dim).
    :param right: float32 unit vectors (m, dim).
    :param block_bytes: bytes of rough scores that a thread holds at a time.
    :param rough: kind of rough scores; None tries both on a part and takes the faster.
    """

    def __init__(
        self, left: Float32, right: Float32, block_bytes: int, rough: Rough | None = None
    ) -> None:
        self.left = left
        self.right = right
        self._given = rough
        self._height, self._width = block_shape(block_bytes)

    def above(self, threshold: float, *, upper: bool) -> Iterator[Found]:
        """Yield the pairs above a threshold, strip by strip.

        :param upper: take only columns beyond the row (left and right are one set).
        """
        rough = self._given or self._faster(
            lambda kind, part: self._above(kind, part, threshold, 0)
        )

        def take(part: slice) -> Found:
            return self._above(rough, part, threshold, part.start if upper else None)

        yield from map_strips(take, strips(len(self.left), self._height))

    def best(self, k: int, *, skip_self: bool) -> tuple[Float32, Int64]:
        """Return scores and columns of the k best of each row, best first, ties by lower column.

        :param k: from 1 to the number of right vectors (one less with `skip_self`).
        :param skip_self: a row is none of its own best (left and right are one set).
        """
        scores = np.empty((len(self.left), k), np.float32)
        indices = np.empty((len(self.left), k), np.int64)
        rough = self._given or self._faster(lambda kind, part: self._best(kind, part, k, skip_self))

        def take(part: slice) -> None:
            scores[part], indices[part] = self._best(rough, part, k, skip_self)

        for _ in map_strips(take, strips(len(self.left), self._height)):
            pass
        return scores, indices

    def _faster(self, run: Callable[[Rough, slice], object]) -> Rough:
        """Return the kind of rough scores that did a strip in the middle faster."""
        plain = Float32Rough(self.left, self.right)
        pairs = len(self.left) * len(self.right)
        if (
            pairs < TRIAL_PAIRS
            or len(self.left) < TRIAL_STRIPS * self._height
            or not int8_serves(self.left.shape[1])
        ):
            return plain
        whole = Int8Rough(self.left, self.right)
        middle = len(self.left) // 2
        seconds = []
        with threadpool_limits(1, "blas"):
            for kind in (plain, whole):
                run(kind, slice(0, 1))
                started = time.perf_counter()
                run(kind, slice(middle, middle + self._height))
                seconds.append(time.perf_counter() - started)
        return whole if seconds[1] < seconds[0] else plain

    def _columns(self, rough: Rough, start: int) -> Iterator[slice]:
        """Yield the blocks of columns from `start` on, none of which crosses the edge of a stored one."""
        total = len(self.right)
        while start < total:
            edge = total if rough.stored is None else (start // rough.stored + 1) * rough.stored
            stop = min(start + self._width, edge, total)
            yield slice(start, stop)
            start = stop

    def _above(self, rough: Rough, part: slice, threshold: float, upper: int | None) -> Found:
        """Return a strip's pairs; with `upper`, those beyond the row, from that column on."""
        height = part.stop - part.start
        limits = rough.limits(part, threshold)
        rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for block in self._columns(rough, upper or 0):
            found = np.flatnonzero(rough.block(part, block) > limits)
            row = found // (block.stop - block.start)
            rows.append(row)
            columns.append(found - row * (block.stop - block.start) + block.start)
        row, column = np.concatenate(rows), np.concatenate(columns)
        if len(rough.apart):
            known = ~np.isin(column, rough.apart)
            near = np.argwhere(
                self.left[part] @ self.right[rough.apart].T
                > np.float32(threshold - rounding(self.left.shape[1]))
            )
            row = np.concatenate([row[known], near[:, 0]])
            column = np.concatenate([column[known], rough.apart[near[:, 1]]])
        if upper is not None and self.left is self.right:
            beyond = column > row + part.start
            row, column = row[beyond], column[beyond]
        order = np.lexsort((column, row))
        row, column = row[order], column[order]
        scores = exact_scores(self.left, self.right, row + part.start, column)
        above = scores > np.float32(threshold)
        return Found(np.bincount(row[above], minlength=height), column[above], scores[above])

    def _best(self, rough: Rough, part: slice, k: int, skip_self: bool) -> tuple[Float32, Int64]:
        """Return scores and columns of a strip's k best."""
        height = part.stop - part.start
        own = np.arange(height)
        bound: npt.NDArray[np.float64] = np.full(height, -np.inf)
        rows, columns, values = [], [], []
        for block in self._columns(rough, 0):
            scores = rough.block(part, block)
            whole = scores.dtype == np.int32
            lowest = np.iinfo(np.int32).min if whole else np.finfo(np.float32).min
            if skip_self:
                mine = (own + part.start >= block.start) & (own + part.start < block.stop)
                scores[own[mine], own[mine] + part.start - block.start] = lowest
            apart = rough.apart[(rough.apart >= block.start) & (rough.apart < block.stop)]
            scores[:, apart - block.start] = lowest
            if scores.shape[1] >= k:
                bound = np.maximum(bound, _kth_bound(scores, k))
            found = np.flatnonzero(scores > np.maximum(rough.below(part, bound), lowest))
            row = found // scores.shape[1]
            rows.append(row)
            columns.append(found - row * scores.shape[1] + block.start)
            values.append(scores.ravel()[found])
        row, column = np.concatenate(rows), np.concatenate(columns)
        value = np.concatenate(values)
        bound = _kth_of_rows(row, value, k, bound)
        near = value > rough.below(part, bound)[row, 0]
        row, column = row[near], column[near]
        if len(rough.apart):
            close = self.left[part] @ self.right[rough.apart].T
            if skip_self:
                close[own[:, None] + part.start == rough.apart] = -np.inf
            least = rough.exact_below(part, bound) - np.float32(rounding(self.left.shape[1]))
            more = np.argwhere((close >= least) & (close > -np.inf))
            row = np.concatenate([row, more[:, 0]])
            column = np.concatenate([column, rough.apart[more[:, 1]]])
        exact = exact_scores(self.left, self.right, row + part.start, column)
        order = np.lexsort((column, -exact, row))
        counts = np.bincount(row, minlength=height)
        chosen = order[(np.cumsum(counts) - counts)[:, None] + np.arange(k)]
        return exact[chosen], column[chosen]


def _kth_bound(scores: npt.NDArray[np.generic], k: int) -> npt.NDArray[np.float64]:
    """Return for each row a value that at least k of its scores reach, and few more.

    The k-th largest of the maxima of groups of columns is one: k groups hold a score as large. Finding
    it costs one pass at the speed of memory, where a partition of every row costs ten.
    """
    size = min(64, scores.shape[1] // (4 * k))
    if size < 2:
        size, groups = 1, scores.shape[1]
    else:
        groups = scores.shape[1] // size
    maxima = scores[:, : groups * size].reshape(len(scores), size, groups).max(axis=1)
    return np.asarray(np.partition(maxima, groups - k, axis=1)[:, groups - k], np.float64)


def _kth_of_rows(
    row: Int64, value: npt.NDArray[np.generic], k: int, bound: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the k-th largest value of each row, or `bound` where there are fewer."""
    order = np.lexsort((-value.astype(np.float64), row))
    counts = np.bincount(row, minlength=len(bound))
    enough = counts >= k
    kth = (np.cumsum(counts) - counts + k - 1)[enough]
    sharper = bound.copy()
    sharper[enough] = np.maximum(bound[enough], value[order[kth]].astype(np.float64))
    return sharper
