"""Blocks of scores, and what is taken out of them. numpy and scipy only.

Strips of rows run side by side on threads that use one BLAS thread each: products scale as well as with
BLAS's own threads, and all else scales with them. A strip goes through its columns block by block, keeps
the pairs that may count by their scorer scores, and computes those exactly, each by itself: a score is
the same bit for bit whatever the blocks, the threads and the kind of scorer scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.candidates import (
    CandidateScorer,
    Float32Scorer,
    Int8Scorer,
    int8_scoring_supported,
    rounding,
)
from onnxsim_embed.system.threads import (
    MIN_CHUNK_ROWS,
    chunk_height,
    map_chunks,
    row_chunks,
    single_blas_thread,
)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Scores = npt.NDArray[Any]

# Pairs scored at once: two gathered copies of so many 384-wide rows stay in a second-level cache.
PAIRS = 256

# Fewer pairs or strips than these are not worth a trial of the two kinds of scorer scores, which does a
# strip's first columns with each.
TRIAL_PAIRS = 1 << 24
TRIAL_CHUNKS = 24
TRIAL_COLUMNS = 8192


class RowPairs(NamedTuple):
    """Pairs of a strip, row by row, columns ascending.

    :param counts: int64 array (rows,), pairs of each row.
    :param columns: int64 array (pairs,).
    :param scores: float32 array (pairs,).
    """

    counts: Int64
    columns: Int64
    scores: Float32


class TopK(NamedTuple):
    """Top-k of each query in descending order of score; ties by lower index.

    :param scores: float32 array (queries, k).
    :param indices: int64 array (queries, k), row numbers of the searched vectors.
    """

    scores: Float32
    indices: Int64


def block_shape(block_bytes: int, rows: int) -> tuple[int, int]:
    """Return rows and columns of a block of at most so many bytes of scores, four each.

    :param rows: rows of the whole comparison.
    :raises ValueError: if `block_bytes` is not positive.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be positive, got {block_bytes}")
    height = max(1, min(chunk_height(rows), int((block_bytes / 4) ** 0.5)))
    return height, max(1, block_bytes // (4 * height))


def exact_scores(left: Float32, right: Float32, rows: Int64, columns: Int64) -> Float32:
    """Return the score of each pair, computed by itself in float32.

    Fastest where pairs come by rising column, so that rows of `right` are read in order and repeats
    come from a cache.

    :param rows: int64 array (pairs,), rows of `left`.
    :param columns: int64 array (pairs,), rows of `right`.
    :returns: float32 array (pairs,), from -1 to 1: rounding may pass them, a cosine never does.
    """
    scores = np.empty(len(rows), np.float32)
    shape = (min(PAIRS, len(rows)), left.shape[1])
    a, b = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for first in range(0, len(rows), PAIRS):
        out = scores[first : first + PAIRS]
        x, y = a[: len(out)], b[: len(out)]
        left.take(rows[first : first + PAIRS], axis=0, out=x, mode="clip")
        right.take(columns[first : first + PAIRS], axis=0, out=y, mode="clip")
        # A row times a column, pair by pair: BLAS's dot product, of which nothing depends on the rest.
        np.matmul(x[:, None, :], y[:, :, None], out=out[:, None, None])
    return np.clip(scores, np.float32(-1), np.float32(1), out=scores)


Trial = Callable[["TiledComparison", CandidateScorer], object]


class TiledComparison:
    """A comparison of two sets, or of one with itself.

    :param left: float32 unit vectors (n, dim).
    :param right: float32 unit vectors (m, dim).
    :param block_bytes: bytes of scorer scores that a thread holds at a time.
    :param scorer: scorer scores; None tries both kinds on a part and takes the faster.
    """

    def __init__(
        self, left: Float32, right: Float32, block_bytes: int, scorer: CandidateScorer | None = None
    ) -> None:
        self.left = left
        self.right = right
        self._rough = scorer
        self._height, self._width = block_shape(block_bytes, len(left))

    @property
    def kind(self) -> type[CandidateScorer] | None:
        """The kind of scorer scores, once it is chosen."""
        return None if self._rough is None else type(self._rough)

    def above(
        self, threshold: float, *, upper: bool, rows: slice | None = None
    ) -> Iterator[RowPairs]:
        """Yield the pairs above a threshold, strip by strip.

        :param upper: take only columns beyond the row (left and right are one set).
        :param rows: rows to compare; None for all.
        """
        scorer = self._chosen(lambda part, kind: part._above(kind, part.rows, threshold, None))

        def take(part: slice) -> RowPairs:
            return self._above(scorer, part, threshold, part.start if upper else None)

        yield from map_chunks(take, self._strips(rows))

    def top_k(self, k: int, *, skip_self: bool, rows: slice | None = None) -> Iterator[TopK]:
        """Yield the k best of each row, strip by strip.

        :param k: from 1 to the number of right vectors (one less with `skip_self`).
        :param skip_self: a row is none of its own best (left and right are one set).
        :param rows: rows to compare; None for all.
        """
        scorer = self._chosen(lambda part, kind: part._best(kind, part.rows, k, False), 4 * k)

        def take(part: slice) -> TopK:
            return self._best(scorer, part, k, skip_self)

        yield from map_chunks(take, self._strips(rows))

    def _strips(self, rows: slice | None) -> list[slice]:
        start, stop = (0, len(self.left)) if rows is None else (rows.start, rows.stop)
        parts = row_chunks(stop - start, self._height)
        return [slice(part.start + start, part.stop + start) for part in parts]

    @property
    def rows(self) -> slice:
        """All rows."""
        return slice(0, len(self.left))

    def _chosen(self, run: Trial, least_columns: int = 1) -> CandidateScorer:
        """Return the scorer scores given or chosen before, else of the kind that does a part faster.

        :param run: does a part with a kind of scorer scores.
        :param least_columns: columns without which a part says nothing.
        """
        if self._rough is None:
            whole = self._int8_is_faster(run) if least_columns <= TRIAL_COLUMNS else False
            self._rough = (Int8Scorer if whole else Float32Scorer)(self.left, self.right)
        return self._rough

    def _int8_is_faster(self, run: Trial) -> bool:
        rows, columns = len(self.left), len(self.right)
        if (
            rows * columns < TRIAL_PAIRS
            or rows < TRIAL_CHUNKS * MIN_CHUNK_ROWS
            or not int8_scoring_supported(self.left.shape[1])
        ):
            return False
        middle = rows // 2
        part = TiledComparison(
            self.left[middle : middle + MIN_CHUNK_ROWS],
            self.right[:TRIAL_COLUMNS],
            4 * self._height * self._width,
        )
        seconds = []
        with single_blas_thread():
            for kind in (Float32Scorer, Int8Scorer):
                scorer = kind(part.left, part.right)
                scorer.block(slice(0, 1), slice(0, 1))
                started = time.perf_counter()
                run(part, scorer)
                seconds.append(time.perf_counter() - started)
        return seconds[1] < seconds[0]

    def _columns(self, scorer: CandidateScorer, start: int) -> Iterator[slice]:
        """Yield the blocks of columns from `start` on, none of which crosses the edge of a stored one."""
        total = len(self.right)
        while start < total:
            edge = total if scorer.stored is None else (start // scorer.stored + 1) * scorer.stored
            stop = min(start + self._width, edge, total)
            yield slice(start, stop)
            start = stop

    def _above(
        self, scorer: CandidateScorer, part: slice, threshold: float, upper: int | None
    ) -> RowPairs:
        """Return a strip's pairs; with `upper`, those beyond the row, from that column on."""
        height = part.stop - part.start
        limits = scorer.limits(part, threshold)
        found = [(np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros(0, np.float32))]

        def keep(row: Int64, column: Int64) -> None:
            if upper is not None:
                beyond = column > row + part.start
                row, column = row[beyond], column[beyond]
            scores = exact_scores(self.left, self.right, row + part.start, column)
            above = scores > np.float32(threshold)
            found.append((row[above].astype(np.int16), column[above], scores[above]))

        for block in self._columns(scorer, upper or 0):
            width = block.stop - block.start
            row, column = _places(_scores(scorer, part, block) > limits)
            by_column = _order(column, width)
            keep(row[by_column], column[by_column] + block.start)
        if len(scorer.outliers):
            near = np.argwhere(
                self.left[part] @ self.right[scorer.outliers].T
                > np.float32(threshold - rounding(self.left.shape[1]))
            )
            keep(near[:, 0], scorer.outliers[near[:, 1]])
        row, column, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        # Blocks come with rising columns, and so do the pairs of each row, but for the columns outliers.
        order = (
            np.lexsort((column, row)) if len(scorer.outliers) else np.argsort(row, kind="stable")
        )
        return RowPairs(np.bincount(row, minlength=height), column[order], scores[order])

    def _best(self, scorer: CandidateScorer, part: slice, k: int, skip_self: bool) -> TopK:
        """Return a strip's k best."""
        height = part.stop - part.start
        own = np.arange(height)
        bounds = Bounds(height, k)
        rows, columns, values = [], [], []
        for block in self._columns(scorer, 0):
            scores = _scores(scorer, part, block)
            lowest = _lowest(scores.dtype)
            if skip_self:
                mine = (own + part.start >= block.start) & (own + part.start < block.stop)
                scores[own[mine], own[mine] + part.start - block.start] = lowest
            maxima = bounds.add(scores)
            limits = np.maximum(scorer.below(part, bounds.kth), lowest)
            row, column = _above_limits(scores, maxima, _group_size(scores.shape[1], k), limits)
            rows.append(row)
            columns.append(column + block.start)
            values.append(scores[row, column])
        row, column = np.concatenate(rows), np.concatenate(columns)
        near = np.concatenate(values) > scorer.below(part, bounds.kth)[row, 0]
        row, column = row[near], column[near]
        if len(scorer.outliers):
            close = self.left[part] @ self.right[scorer.outliers].T
            if skip_self:
                close[own[:, None] + part.start == scorer.outliers] = -np.inf
            least = scorer.exact_below(part, bounds.kth) - np.float32(rounding(self.left.shape[1]))
            more = np.argwhere((close >= least) & (close > -np.inf))
            row = np.concatenate([row, more[:, 0]])
            column = np.concatenate([column, scorer.outliers[more[:, 1]]])
        exact = exact_scores(self.left, self.right, row + part.start, column)
        return select_top_k(row, column, exact, height, k)


def select_top_k(row: Int64, column: Int64, scores: Float32, rows: int, k: int) -> TopK:
    """Return the k best of each row from pairs in any order, of which each row has at least k.

    :param row: int64 array (pairs,), from 0 up to `rows`.
    :param column: int64 array (pairs,).
    :param scores: float32 array (pairs,).
    """
    order = np.lexsort((column, -scores, row))
    counts = np.bincount(row, minlength=rows)
    chosen = order[(np.cumsum(counts) - counts)[:, None] + np.arange(k)]
    return TopK(scores[chosen], column[chosen])


class Bounds:
    """For each row a value that at least k of its scores so far reach, and few more.

    Columns go into groups; the k-th largest of the groups' maxima is such a value, as k groups hold a score
    as large. Finding it costs one pass at the speed of memory, where a partition of every row costs ten.

    :param rows: rows of a block.
    """

    def __init__(self, rows: int, k: int) -> None:
        self.kth: npt.NDArray[np.float64] = np.full(rows, -np.inf)
        self._k = k
        self._largest: Scores | None = None

    def add(self, scores: Scores) -> Scores:
        """Take in a block of scores, (rows, columns), and return its groups' maxima, (rows, groups).

        Group g holds the columns g, g + groups, g + 2 groups, and so on; those left over are in none.
        """
        rows, columns = scores.shape
        size = _group_size(columns, self._k)
        groups = columns // size
        maxima = scores[:, : groups * size].reshape(rows, size, groups).max(axis=1)
        known = maxima if self._largest is None else np.hstack([self._largest, maxima])
        if known.shape[1] > self._k:
            known = np.partition(known, known.shape[1] - self._k, axis=1)[:, -self._k :]
        self._largest = known
        if known.shape[1] == self._k:
            self.kth = known.min(axis=1).astype(np.float64)
        return maxima


def _group_size(columns: int, k: int) -> int:
    """Return how many columns to put into a group, so that there are several times k groups."""
    return 1 << max(0, min(64, columns // (4 * k)).bit_length() - 1)


def _above_limits(scores: Scores, maxima: Scores, size: int, limits: Scores) -> tuple[Int64, Int64]:
    """Return rows and columns of scores above a limit of each row, columns of a row in any order.

    :param maxima: of the groups of columns that `Bounds.add` makes: few reach a limit, and only these
        are looked into.
    :param size: columns of a group.
    :param limits: (rows, 1).
    """
    groups = maxima.shape[1]
    row, group = _places(maxima > limits)
    # By their places in the flat block, which numpy finds and takes several times as fast as by two numbers.
    first = row * scores.shape[1] + group
    values = scores.ravel().take(first[:, None] + groups * np.arange(size))
    hit, member = _places(values > limits[row])
    over_row, over_column = _places(scores[:, groups * size :] > limits)
    return (
        np.concatenate([row[hit], over_row]),
        np.concatenate([group[hit] + groups * member, over_column + groups * size]),
    )


def _places(mask: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Return the rows and columns where a two-dimensional mask is true."""
    width = max(1, mask.shape[1])
    flat = np.flatnonzero(mask)
    row = flat // width
    return row, flat - row * width


def _scores(scorer: CandidateScorer, rows: slice, columns: slice) -> Scores:
    """Return a block of scorer scores, of which those that say nothing are the lowest."""
    scores = scorer.block(rows, columns)
    first, last = np.searchsorted(scorer.outliers, (columns.start, columns.stop))
    scores[:, scorer.outliers[first:last] - columns.start] = _lowest(scores.dtype)
    return scores


def _lowest(dtype: np.dtype[Any]) -> float:
    """Return what no score is below."""
    return np.iinfo(dtype).min if dtype.kind == "i" else float(np.finfo(dtype).min)


def _order(values: Int64, stop: int) -> Int64:
    """Return the stable order of whole numbers from 0 up to `stop`."""
    # numpy sorts numbers of 16 bits by their digits, ten times faster than others.
    narrow = values.astype(np.uint16) if stop <= 1 << 16 else values
    return np.argsort(narrow, kind="stable")
