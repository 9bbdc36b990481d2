"""Exact scores of candidate pairs: comparison of two sets of unit rows in memory, tile by tile.

Approximate scores select the candidates, which are then scored one pair at a time: a score has the same
bits for every tile size, number of threads and candidate scorer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import pairwise

import numpy as np

from onnxsim_embed.similarity import candidates, selection
from onnxsim_embed.similarity.candidates import Float32Scorer, Int8Scorer, PrefixRotation
from onnxsim_embed.similarity.selection import Float32, Int64, RowPairs
from onnxsim_embed.system.threads import MIN_CHUNK_ROWS, chunk_height, map_chunks, row_chunks
from onnxsim_embed.system.units import check_integer

PAIRS = 256  # scored at once: two copies of 384-dimensional rows stay in a second-level cache

# Pairs for each row of a tile from which on a product for each row, which copies only the columns, is
# faster; and the share of a tile from which on the products of all its pairs are, which need no copies.
ROW_PAIRS, DENSE_SHARE = 64, 0.25

# A trial of candidate scorers on a chunk's first columns costs more than it saves below these.
TRIAL_PAIRS, TRIAL_CHUNKS, TRIAL_COLUMNS = 1 << 24, 24, 4096
PREFIX_PAIRS, PREFIX_DIM = 1 << 27, 48  # from which on a trial of prefixes is worth their rotations
PREFIX_PARTS = (3, 6)  # of the dimension; the shorter one is tried if the longer one pays
SAMPLE_ROWS = 2048  # which a rotation is learnt from

MakeScorer = Callable[[Float32, Float32], Float32Scorer]


def exact_scores(left: Float32, right: Float32, rows: Int64, columns: Int64) -> Float32:
    """Return the score of each pair, computed on its own; fastest if pairs are sorted by row.

    It is BLAS's dot product of the two rows, in the range of a cosine, and 1 for equal rows.
    """
    by_row = len(rows) > ROW_PAIRS * len(left)
    if len(rows) > DENSE_SHARE * len(left) * len(right):
        tile = np.empty((len(left), len(right)), np.float32)
        scores = _dot(left[:, None], right[None], tile)[rows, columns]
    else:
        scores = np.empty(len(rows), np.float32)
        starts = np.flatnonzero(np.diff(rows, prepend=-1)) if by_row else range(0, len(rows), PAIRS)
        edges = [*map(int, starts), len(rows)]
        a, b = np.empty((2, max(PAIRS, len(right)), left.shape[1]), np.float32)
        for first, stop in pairwise(edges):
            x, y = left[rows[first]], b[: stop - first]
            right.take(columns[first:stop], axis=0, out=y, mode="clip")
            if not by_row:
                x = left.take(rows[first:stop], axis=0, out=a[: stop - first], mode="clip")
            _dot(x, y, scores[first:stop])
    near = np.flatnonzero(scores > 1 - candidates.rounding_bound(left.shape[1]))
    for pairs in row_chunks(len(near), PAIRS):
        chosen = near[pairs]
        equal = (left[rows[chosen]] == right[columns[chosen]]).all(axis=1)
        scores[chosen[equal]] = 1  # whatever the rounding, as is the clipping
    return np.clip(scores, np.float32(-1), np.float32(1), out=scores)


def _dot(left: Float32, right: Float32, out: Float32) -> Float32:
    # A row times a column, pair by pair: BLAS's dot product, which depends on nothing else.
    np.matmul(left[..., None, :], right[..., None], out=out[..., None, None])
    return out


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
    :param make_scorer: of candidates; None tries several and takes the fastest.
    """

    def __init__(
        self, left: Float32, right: Float32, tile_bytes: int, make_scorer: MakeScorer | None = None
    ) -> None:
        self.left = left
        self.right = right
        self.make_scorer = make_scorer
        self._tile_bytes = tile_bytes = check_integer("block_bytes", tile_bytes)
        # Scores take four bytes each.
        self._height = max(1, min(chunk_height(len(left)), int((tile_bytes / 4) ** 0.5)))
        self._width = max(1, tile_bytes // (4 * self._height))

    def above(
        self, threshold: float, *, upper: bool, rows: slice | None = None
    ) -> Iterator[RowPairs]:
        """Yield the pairs of some rows above a threshold, chunk by chunk; `upper`: only column > row."""
        self.choose_scorer(lambda trial: list(trial.above(threshold, upper=False)))
        above = partial(self._above, threshold=threshold, upper=upper)
        yield from map_chunks(above, self.chunks(rows))

    def reordered(self, order: Int64) -> TiledComparison:
        """Return the comparison of a set with itself with its rows in another order."""
        rows = self.left[order]
        return TiledComparison(rows, rows, self._tile_bytes, self.make_scorer)

    def chunks(self, rows: slice | None = None) -> list[slice]:
        """Return chunks of some rows."""
        rows = rows or slice(0, len(self.left))
        return row_chunks(rows.stop, self._height, rows.start)

    def column_tiles(self, start: int, stop: int) -> Iterator[slice]:
        """Yield the tiles of columns from `start` to `stop`, none of which crosses a block's edge."""
        block = self.scorer.block_columns or max(1, stop)
        while start < stop:
            end = min(start + self._width, (start // block + 1) * block, stop)
            yield slice(start, end)
            start = end

    @cached_property
    def scorer(self) -> Float32Scorer:
        """The scorer of candidates, which was given or chosen."""
        return (self.make_scorer or Float32Scorer)(self.left, self.right)

    def choose_scorer(
        self, run: Callable[[TiledComparison], object], prefix_pairs: int | None = None
    ) -> None:
        """Choose the scorer with which `run` is fastest, unless there is one.

        :param prefix_pairs: from which on prefixes are tried; None for PREFIX_PAIRS.
        """
        if self.make_scorer is None:
            self.make_scorer = self._fastest(run, prefix_pairs or PREFIX_PAIRS)

    def _fastest(self, run: Callable[[TiledComparison], object], prefix_pairs: int) -> MakeScorer:
        rows, columns, dim = len(self.left), len(self.right), self.left.shape[1]
        if rows * columns < TRIAL_PAIRS or rows < TRIAL_CHUNKS * MIN_CHUNK_ROWS:
            return Float32Scorer
        left = self.left[rows // 2 : rows // 2 + MIN_CHUNK_ROWS]
        right = self.right[:TRIAL_COLUMNS]

        def seconds(make_scorer: MakeScorer) -> float:
            trial = TiledComparison(left, right, self._tile_bytes, make_scorer)
            times = []
            for _ in range(3):  # the first one allocates, and starts onnxruntime
                started = time.process_time()  # waiting for a busy processor does not count
                run(trial)
                times.append(time.process_time() - started)
            return min(times)

        kinds = [Float32Scorer, *[Int8Scorer] * candidates.int8_scoring_supported(dim)]
        times: dict[MakeScorer, float] = {kind: seconds(kind) for kind in kinds}
        kind = min(kinds, key=times.__getitem__)
        fastest: MakeScorer = kind
        if rows * columns >= prefix_pairs and dim >= PREFIX_DIM:
            axes = candidates.principal_axes(self.right[:: -(-columns // SAMPLE_ROWS)])
            for part in PREFIX_PARTS:
                prefix = partial(kind, rotation=PrefixRotation(axes, dim // part))
                times[prefix] = seconds(prefix)
                if times[prefix] > times[fastest]:
                    break
                fastest = prefix
        return fastest

    def _above(self, chunk: slice, threshold: float, upper: bool) -> RowPairs:
        scorer = self.scorer
        bound = scorer.bounds(threshold)
        left = self.left[chunk]
        pairs = [(np.zeros(0, np.uint16), np.zeros(0, np.int32), np.zeros(0, np.float32))]
        for tile in self.column_tiles(chunk.start if upper else 0, len(self.right)):
            row, column = selection.positions(scorer.scores(chunk, tile) > bound)
            if upper and tile.start < chunk.stop:
                greater = column + tile.start > row + chunk.start
                row, column = row[greater], column[greater]
            scores = exact_scores(left, self.right[tile], row, column)
            above = scores > np.float32(threshold)
            pairs.append(
                (
                    row[above].astype(np.uint16),
                    column[above].astype(np.int32) + tile.start,
                    scores[above],
                )
            )
        row, column, scores = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        order = np.argsort(row, kind="stable")  # the pairs of a row come in order of columns
        counts = np.bincount(row, minlength=chunk.stop - chunk.start)
        return RowPairs(counts, column[order], scores[order])
