"""Out-of-core comparison, tile by tile, with results identical to the in-memory one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from onnxsim_embed.similarity.candidates import Float32Scorer
from onnxsim_embed.similarity.scoring import TiledComparison
from onnxsim_embed.similarity.selection import RowPairs, TopK, top_k_of_rows
from onnxsim_embed.similarity.unit_rows import TiledRows


class AllPairs:
    """A comparison of two sets, or of one with itself (left is right)."""

    def __init__(self, left: TiledRows, right: TiledRows, tile_bytes: int) -> None:
        self.left = left
        self.right = right
        self._tile_bytes = tile_bytes
        self._scorer_type: type[Float32Scorer] | None = None
        self._in_memory: TiledComparison | None = None
        if left.in_memory and right.in_memory:
            rows, columns = (units.load(slice(0, units.rows)) for units in (left, right))
            self._in_memory = TiledComparison(rows, columns, tile_bytes)

    def above(
        self,
        threshold: float,
        *,
        upper: bool,
        rows: slice | None = None,
        columns: slice | None = None,
        on_pairs: Callable[[RowPairs], object] = lambda pairs: None,
    ) -> Iterator[RowPairs]:
        """Yield the pairs above a threshold, chunk by chunk.

        :param upper: only columns greater than the row (of one set).
        :param columns: columns to compare the rows with; both are whole tiles.
        :param on_pairs: called with pairs as soon as they are found, before their chunk is complete.
        """
        rows = rows or slice(0, self.left.rows)
        if self._in_memory is not None and columns is None:
            for pairs in self._in_memory.above(threshold, upper=upper, rows=rows):
                on_pairs(pairs)
                yield pairs
            return
        columns = columns or slice(0, self.right.rows)
        for tile in self.left.tiles(rows.start, rows.stop):
            chunks: list[list[RowPairs]] = []
            first = max(columns.start, tile.start) if upper else columns.start
            for start, comparison in self._comparisons(tile, slice(first, columns.stop)):
                same = comparison.left is comparison.right
                for number, pairs in enumerate(comparison.above(threshold, upper=upper and same)):
                    on_pairs(pairs)
                    if number == len(chunks):
                        chunks.append([])
                    chunks[number].append(pairs._replace(columns=pairs.columns + start))
            yield from map(concatenate_pairs, chunks)

    def top_k(
        self, k: int, *, skip_self: bool, rows: slice | None = None, columns: slice | None = None
    ) -> Iterator[TopK]:
        """Yield the top-k of each row among some columns, or all if they are fewer, chunk by chunk."""
        rows = rows or slice(0, self.left.rows)
        if self._in_memory is not None and columns is None:
            yield from self._in_memory.top_k(k, skip_self=skip_self, rows=rows)
            return
        columns = columns or slice(0, self.right.rows)
        for tile in self.left.tiles(rows.start, rows.stop):
            height = tile.stop - tile.start
            top = TopK(np.zeros((height, 0), np.float32), np.zeros((height, 0), np.int64))
            for start, comparison in self._comparisons(tile, columns):
                own = skip_self and comparison.left is comparison.right
                available = min(k, len(comparison.right) - own)
                if available:
                    scores, indices = zip(*comparison.top_k(available, skip_self=own), strict=True)
                    top = top_k_of_rows(
                        np.hstack([top.scores, np.concatenate(scores)]),
                        k,
                        np.hstack([top.indices, np.concatenate(indices) + start]),
                    )
            yield top

    def _comparisons(self, tile: slice, columns: slice) -> Iterator[tuple[int, TiledComparison]]:
        """Yield the first column and a comparison for each tile of some columns."""
        left = self.left.load(tile)
        start, stop = columns.start, columns.stop
        tiles = list(self.right.tiles(start, stop)) or [slice(0, 0)]
        if self.left is self.right and start <= tile.start < stop:
            before, after = (start, tile.start), (tile.stop, stop)
            tiles = [*self.right.tiles(*before), tile, *self.right.tiles(*after)]
        for other in tiles:
            same = self.left is self.right and other == tile
            right = left if same else self.right.load(other)
            scorer = self._scorer_type(left, right) if self._scorer_type else None
            comparison = TiledComparison(left, right, self._tile_bytes, scorer)
            yield other.start, comparison
            if self._scorer_type is None and comparison.scorer is not None:
                self._scorer_type = type(comparison.scorer)


def concatenate_pairs(tiles: list[RowPairs]) -> RowPairs:
    """Return the pairs of a chunk of rows from its tiles, whose columns rise from one to the next."""
    height = len(tiles[0].counts)
    row = np.concatenate([np.repeat(np.arange(height), pairs.counts) for pairs in tiles])
    order = np.argsort(row, kind="stable")
    columns = np.concatenate([pairs.columns for pairs in tiles])[order]
    scores = np.concatenate([pairs.scores for pairs in tiles])[order]
    return RowPairs(np.bincount(row, minlength=height), columns, scores)
