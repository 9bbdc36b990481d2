"""Comparison of two sets of unit rows in memory, tile by tile.

Approximate scores select the candidates, which are then scored one pair at a time: a score has the same
bits for every tile size, number of threads and candidate scorer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

import numpy as np

from onnxsim_embed.similarity.candidates import Float32Scorer
from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.similarity.selection import RowPairs, positions
from onnxsim_embed.similarity.trial import Limits, MakeScorer, choose_scorer
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import CHUNKS_PER_CPU, chunk_height, map_chunks, row_chunks
from onnxsim_embed.system.units import check_integer

# Heights of a chunk whose candidates by prefixes are scored together: each row of a tile is then read from
# memory once for several candidates.
PREFIX_HEIGHTS = 4


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
        self.choose_scorer(lambda *_: threshold, prefix=True)
        above = partial(self._above, threshold=threshold, upper=upper)
        chunks = self.chunks(rows)
        if self.scorer.prefix:
            heights = len(chunks) // (CHUNKS_PER_CPU * available_cpus())
            chunks = self.chunks(rows, max(1, min(heights, PREFIX_HEIGHTS)))
        yield from map_chunks(above, chunks)

    def reordered(self, order: Int64) -> TiledComparison:
        """Return the comparison of a set with itself with its rows in another order."""
        rows = self.left[order]
        return TiledComparison(rows, rows, self._tile_bytes, self.make_scorer)

    def chunks(self, rows: slice | None = None, heights: int = 1) -> list[slice]:
        """Return chunks of some rows, each of `heights` times the height of a tile."""
        rows = rows or slice(0, len(self.left))
        return row_chunks(rows.stop, heights * self._height, rows.start)

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

    def choose_scorer(self, limits: Limits, *, prefix: bool = False) -> None:
        """Choose the fastest scorer, unless there is one; see `trial.choose_scorer`."""
        if self.make_scorer is None:
            self.make_scorer = choose_scorer(self.left, self.right, limits, prefix=prefix)

    def with_prefix(self, limits: Limits, rows: slice) -> TiledComparison:
        """Return the comparison by rotated prefixes if they pay for these rows, else itself."""
        make = choose_scorer(
            self.left[rows], self.right, limits, prefix=True, kind=self.make_scorer
        )
        if make is self.make_scorer:
            return self
        return TiledComparison(self.left, self.right, self._tile_bytes, make)

    def _above(self, chunk: slice, threshold: float, upper: bool) -> RowPairs:
        scorer = self.scorer
        bound = scorer.bounds(threshold)
        left = self.left[chunk]
        pairs = [(np.zeros(0, np.uint16), np.zeros(0, np.int32), np.zeros(0, np.float32))]
        for tile in self.column_tiles(chunk.start if upper else 0, len(self.right)):
            found = [  # part by part, while its scores are in the caches
                positions(scorer.scores(part, tile) > bound)
                for part in self.chunks(chunk)
                if not upper or part.start < tile.stop
            ]
            row = np.concatenate([rows + i * self._height for i, (rows, _) in enumerate(found)])
            column = np.concatenate([columns for _, columns in found])
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
