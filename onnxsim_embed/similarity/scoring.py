"""Exact scores of candidate pairs: comparison of two sets of unit rows in memory, tile by tile.

Approximate scores select the candidates, which are then scored one pair at a time: a score has the same
bits for every tile size, number of threads and candidate scorer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from onnxsim_embed.similarity import candidates, selection
from onnxsim_embed.similarity.candidates import Float32Scorer, Int8Scorer
from onnxsim_embed.similarity.selection import Float32, Int64, KthBounds, RowPairs, Scores, TopK
from onnxsim_embed.system.threads import MIN_CHUNK_ROWS, chunk_height, map_chunks, row_chunks
from onnxsim_embed.system.units import check_integer

PAIRS = 256  # scored at once: two copies of 384-dimensional rows stay in a second-level cache

# A trial of both candidate scorers on a chunk's first columns costs more than it saves below these.
TRIAL_PAIRS, TRIAL_CHUNKS, TRIAL_COLUMNS = 1 << 24, 24, 8192


def exact_scores(left: Float32, right: Float32, rows: Int64, columns: Int64) -> Float32:
    """Return the score of each pair, computed on its own; fastest if pairs are sorted by column."""
    scores = np.empty(len(rows), np.float32)
    shape = (min(PAIRS, len(rows)), left.shape[1])
    a, b = np.empty(shape, np.float32), np.empty(shape, np.float32)
    lowest = 1 - candidates.rounding_bound(left.shape[1])
    for first in range(0, len(rows), PAIRS):
        out = scores[first : first + PAIRS]
        x, y = a[: len(out)], b[: len(out)]
        left.take(rows[first : first + PAIRS], axis=0, out=x, mode="clip")
        right.take(columns[first : first + PAIRS], axis=0, out=y, mode="clip")
        # A row times a column, pair by pair: BLAS's dot product, which depends on nothing else.
        np.matmul(x[:, None, :], y[:, :, None], out=out[:, None, None])
        near = np.flatnonzero(out > lowest)
        out[near[(x[near] == y[near]).all(axis=1)]] = 1  # whatever the rounding, as is the clipping
    return np.clip(scores, np.float32(-1), np.float32(1), out=scores)


def dense_scores(left: Float32, right: Float32) -> Float32:
    """Return the scores of all pairs, in the range of a cosine, and 1 for equal rows."""
    scores = np.clip(left @ right.T, np.float32(-1), np.float32(1))
    near = scores > 1 - candidates.rounding_bound(left.shape[1])
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    if len(rows):
        both = np.concatenate([left[rows], right[columns]]) + np.float32(0)  # no negative zeros
        _, equal = np.unique(both.view(f"V{both[0].nbytes}")[:, 0], return_inverse=True)
        first, second = np.nonzero(equal[: len(rows), None] == equal[len(rows) :])
        scores[rows[first], columns[second]] = 1
    return scores


class TiledComparison:
    """A comparison of two sets of unit rows, or of one with itself (left is right).

    :param tile_bytes: bytes of approximate scores per thread.
    :param scorer: candidate scorer; None tries both kinds and takes the faster.
    """

    def __init__(
        self, left: Float32, right: Float32, tile_bytes: int, scorer: Float32Scorer | None = None
    ) -> None:
        self.left = left
        self.right = right
        self.scorer = scorer
        tile_bytes = check_integer("block_bytes", tile_bytes)
        # Scores take four bytes each.
        self._height = max(1, min(chunk_height(len(left)), int((tile_bytes / 4) ** 0.5)))
        self._width = max(1, tile_bytes // (4 * self._height))

    def above(
        self, threshold: float, *, upper: bool, rows: slice | None = None
    ) -> Iterator[RowPairs]:
        """Yield the pairs of some rows above a threshold, chunk by chunk; `upper`: only column > row."""
        scorer = self._choose_scorer(lambda trial: trial.above(threshold, upper=False))
        above = partial(self._above, scorer, threshold=threshold, upper=upper)
        yield from map_chunks(above, self._chunks(rows))

    def top_k(self, k: int, *, skip_self: bool, rows: slice | None = None) -> Iterator[TopK]:
        """Yield the top-k of some rows, chunk by chunk; `skip_self` excludes each row itself."""
        scorer = self._choose_scorer(lambda trial: trial.top_k(k, skip_self=False), 4 * k)
        top_k = partial(self._top_k, scorer, k=k, skip_self=skip_self)
        yield from map_chunks(top_k, self._chunks(rows))

    def _chunks(self, rows: slice | None) -> list[slice]:
        rows = rows or slice(0, len(self.left))
        return row_chunks(rows.stop, self._height, rows.start)

    def _choose_scorer(
        self, run: Callable[[TiledComparison], Iterator[object]], min_columns: int = 1
    ) -> Float32Scorer:
        """Return the scorer; on the first call, choose the kind with which `run` is faster."""
        if self.scorer is None:
            int8 = min_columns <= TRIAL_COLUMNS and self._int8_is_faster(run)
            self.scorer = (Int8Scorer if int8 else Float32Scorer)(self.left, self.right)
        return self.scorer

    def _int8_is_faster(self, run: Callable[[TiledComparison], Iterator[object]]) -> bool:
        rows, columns = len(self.left), len(self.right)
        if (
            rows * columns < TRIAL_PAIRS
            or rows < TRIAL_CHUNKS * MIN_CHUNK_ROWS
            or not candidates.int8_scoring_supported(self.left.shape[1])
        ):
            return False
        left = self.left[rows // 2 : rows // 2 + MIN_CHUNK_ROWS]
        right = self.right[:TRIAL_COLUMNS]

        def seconds(kind: type[Float32Scorer]) -> float:
            scorer = kind(left, right)
            scorer.scores(slice(0, 1), slice(0, 1))
            trial = TiledComparison(left, right, 4 * self._height * self._width, scorer)
            started = time.perf_counter()
            for _ in run(trial):
                pass
            return time.perf_counter() - started

        return seconds(Float32Scorer) > seconds(Int8Scorer)

    def _column_tiles(self, scorer: Float32Scorer, start: int) -> Iterator[slice]:
        """Yield the tiles of columns from `start` on, none of which crosses a block's edge."""
        total = len(self.right)
        block = scorer.block_columns or max(1, total)
        while start < total:
            stop = min(start + self._width, (start // block + 1) * block, total)
            yield slice(start, stop)
            start = stop

    def _above(
        self, scorer: Float32Scorer, chunk: slice, threshold: float, upper: bool
    ) -> RowPairs:
        bounds = scorer.lower_bounds(chunk, threshold)
        pairs = [(np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for tile in self._column_tiles(scorer, chunk.start if upper else 0):
            row, column = selection.positions(scorer.scores(chunk, tile) > bounds)
            # numpy sorts 16-bit integers by their digits, ten times faster than others.
            narrow = column.astype(np.uint16) if tile.stop - tile.start <= 1 << 16 else column
            order = np.argsort(narrow, kind="stable")
            row, column = row[order], column[order] + tile.start
            if upper:
                greater = column > row + chunk.start
                row, column = row[greater], column[greater]
            scores = exact_scores(self.left, self.right, row + chunk.start, column)
            above = scores > np.float32(threshold)
            pairs.append((row[above].astype(np.int16), column[above], scores[above]))
        row, column, scores = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        order = np.argsort(row, kind="stable")  # the pairs of a row come in order of columns
        counts = np.bincount(row, minlength=chunk.stop - chunk.start)
        return RowPairs(counts, column[order], scores[order])

    def _top_k(self, scorer: Float32Scorer, chunk: slice, k: int, skip_self: bool) -> TopK:
        height = chunk.stop - chunk.start
        bounds, own = KthBounds(height, k), np.arange(height)

        def lower_bounds() -> Scores:
            # The approximate scores above which lie all that may be among the top-k.
            return scorer.lower_bounds(chunk, scorer.exact_lower_bounds(chunk, bounds.kth))

        parts = []
        for tile in self._column_tiles(scorer, 0):
            scores = scorer.scores(chunk, tile)
            if skip_self:
                mine = (own + chunk.start >= tile.start) & (own + chunk.start < tile.stop)
                lowest = np.iinfo(np.int32).min if scores.dtype == np.int32 else -np.inf
                scores[own[mine], own[mine] + chunk.start - tile.start] = lowest
            maxima = bounds.add(scores)
            row, column = bounds.positions_above(scores, maxima, lower_bounds())
            parts.append((row, column + tile.start, scores[row, column]))
        row, column, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        above = scores > lower_bounds()[row, 0]
        row, column = row[above], column[above]
        exact = exact_scores(self.left, self.right, row + chunk.start, column)
        return selection.select_top_k(row, column, exact, height, k)
