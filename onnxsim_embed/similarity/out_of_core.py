"""Out-of-core comparison, tile by tile, with results identical to the in-memory one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from onnxsim_embed.similarity.nearest import OnRows, add_top_k, top_k
from onnxsim_embed.similarity.selection import BestOfRows, RowPairs, TopK, narrow
from onnxsim_embed.similarity.tiles import TiledComparison
from onnxsim_embed.similarity.trial import MakeScorer
from onnxsim_embed.similarity.unit_rows import TiledRows


class AllPairs:
    """A comparison of two sets, or of one with itself (left is right)."""

    def __init__(self, left: TiledRows, right: TiledRows, tile_bytes: int) -> None:
        self.left = left
        self.right = right
        self._tile_bytes = tile_bytes
        self._make_scorer: MakeScorer | None = None
        self._in_memory: TiledComparison | None = None
        if left.in_memory and right.in_memory:
            rows = left.load(slice(0, left.rows))
            columns = rows if left is right else right.load(slice(0, right.rows))
            self._in_memory = TiledComparison(rows, columns, tile_bytes)

    def above(
        self,
        threshold: float,
        *,
        upper: bool,
        rows: slice | None = None,
        on_pairs: Callable[[RowPairs], object] = lambda pairs: None,
    ) -> Iterator[RowPairs]:
        """Yield the pairs above a threshold, chunk by chunk.

        :param upper: only columns greater than the row (of one set).
        :param rows: rows to compare; None for all.
        :param on_pairs: called with pairs as soon as they are found, before their chunk is complete.
        """
        rows = rows or slice(0, self.left.rows)
        if self._in_memory is not None:
            for pairs in self._in_memory.above(threshold, upper=upper, rows=rows):
                on_pairs(pairs)
                yield pairs
            return
        for tile in self.left.tiles(rows.start, rows.stop):
            chunks: list[list[RowPairs]] = []
            columns = slice(tile.start if upper else 0, self.right.rows)
            for start, comparison in self._comparisons(tile, columns):
                same = comparison.left is comparison.right
                for number, pairs in enumerate(comparison.above(threshold, upper=upper and same)):
                    on_pairs(pairs)
                    if number == len(chunks):
                        chunks.append([])
                    chunks[number].append(pairs._replace(columns=pairs.columns + start))
            yield from map(concatenate_pairs, chunks)

    def top_k(
        self,
        k: int,
        *,
        skip_self: bool,
        rows: slice | None = None,
        on_rows: OnRows = lambda rows: None,
    ) -> TopK:
        """Return the top-k of each row, or all columns if they are fewer."""
        both = self.left is self.right and rows is None
        rows = rows or slice(0, self.left.rows)
        if self._in_memory is not None:
            return top_k(self._in_memory, k, skip_self=skip_self, rows=rows, on_rows=on_rows)
        columns = slice(0, self.right.rows)
        own = skip_self and rows.start < columns.stop
        best = BestOfRows(rows.stop - rows.start, min(k, columns.stop - own))
        tiles = self.left.tiles(rows.start, rows.stop) if best.k else []
        parts = [(tile, columns) for tile in tiles]
        if both:  # first each tile with itself: similar rows give each other the first bounds
            rest = [(tile, slice(tile.stop, columns.stop)) for tile in tiles]
            parts = [*zip(tiles, tiles, strict=True), *rest]
        for tile, others in parts:
            compared = self._comparisons(tile, others) if others.start < others.stop else ()
            for start, comparison in compared:
                own_numbers = np.arange(tile.start, tile.stop) - rows.start
                numbers = own_numbers, np.arange(len(comparison.right)) + start
                add_top_k(comparison, best, numbers, both=both, skip_self=skip_self)
            if others is not tile:
                on_rows(tile.stop - tile.start)
        return best.top()

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
            comparison = TiledComparison(left, right, self._tile_bytes, self._make_scorer)
            yield other.start, comparison
            self._make_scorer = comparison.make_scorer


def concatenate_pairs(tiles: list[RowPairs]) -> RowPairs:
    """Return the pairs of a chunk of rows from its tiles, whose columns rise from one to the next."""
    height = len(tiles[0].counts)
    row = np.concatenate([np.repeat(np.arange(height), pairs.counts) for pairs in tiles])
    order = np.argsort(narrow(row, height), kind="stable")
    columns = np.concatenate([pairs.columns for pairs in tiles])[order]
    scores = np.concatenate([pairs.scores for pairs in tiles])[order]
    return RowPairs(np.bincount(row, minlength=height), columns, scores)
