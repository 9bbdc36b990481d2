"""Comparisons of sets that memory need not hold: tile by tile, with the results of one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.candidates import CandidateScorer
from onnxsim_embed.similarity.scoring import RowPairs, TiledComparison, TopK
from onnxsim_embed.similarity.unit_rows import Float32, TiledRows

Int64 = npt.NDArray[np.int64]


class AllPairs:
    """A comparison of two sets, or of one with itself.

    :param left: the rows.
    :param right: the columns; the same object for a set with itself.
    :param block_bytes: bytes of scorer scores that a thread holds at a time.
    """

    def __init__(self, left: TiledRows, right: TiledRows, block_bytes: int) -> None:
        self.left = left
        self.right = right
        self._block_bytes = block_bytes
        self._kind: type[CandidateScorer] | None = None
        self._search: TiledComparison | None = None
        if left.in_memory and right.in_memory:
            rows, columns = (part.load(slice(0, part.rows)) for part in (left, right))
            self._search = TiledComparison(rows, columns, block_bytes)

    def above(
        self,
        threshold: float,
        *,
        upper: bool,
        rows: slice | None = None,
        columns: slice | None = None,
        on_pairs: Callable[[RowPairs], object] = lambda part: None,
    ) -> Iterator[RowPairs]:
        """Yield the pairs above a threshold, strip by strip.

        :param upper: take only columns beyond the row (left and right are one set).
        :param rows: rows to compare; None for all.
        :param columns: columns to compare them with, None for all; of rows and columns whole tiles.
        :param on_pairs: called with pairs when they are found, which is before the strip is whole.
        """
        rows = rows or slice(0, self.left.rows)
        if self._search is not None and columns is None:
            for part in self._search.above(threshold, upper=upper, rows=rows):
                on_pairs(part)
                yield part
            return
        columns = columns or slice(0, self.right.rows)
        for tile in self.left.tiles(rows.start, rows.stop):
            strips: list[list[RowPairs]] = []
            first = max(columns.start, tile.start) if upper else columns.start
            for start, search in self._searches(tile, slice(first, columns.stop)):
                found = search.above(threshold, upper=upper and search.left is search.right)
                for number, part in enumerate(found):
                    on_pairs(part)
                    if number == len(strips):
                        strips.append([])
                    strips[number].append(part._replace(columns=part.columns + start))
            yield from map(concatenate_pairs, strips)

    def top_k(
        self,
        k: int,
        *,
        skip_self: bool,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Iterator[TopK]:
        """Yield the k best of each row, strip by strip; see `TiledComparison.best`.

        :param columns: as for `above`; where they are fewer than k, all of them are yielded.
        """
        rows = rows or slice(0, self.left.rows)
        if self._search is not None and columns is None:
            yield from self._search.top_k(k, skip_self=skip_self, rows=rows)
            return
        columns = columns or slice(0, self.right.rows)
        for tile in self.left.tiles(rows.start, rows.stop):
            scores = np.empty((tile.stop - tile.start, 0), np.float32)
            places = np.empty(scores.shape, np.int64)
            for start, search in self._searches(tile, columns):
                own = skip_self and search.left is search.right
                most = min(k, len(search.right) - own)
                if most:
                    found = list(search.top_k(most, skip_self=own))
                    more = np.concatenate([part.scores for part in found])
                    others = np.concatenate([part.indices for part in found]) + start
                    scores, places = merge_top_k(
                        np.hstack([scores, more]), np.hstack([places, others]), k
                    )
            yield TopK(scores, places)

    def _searches(self, tile: slice, columns: slice) -> Iterator[tuple[int, TiledComparison]]:
        """Yield the first column and a search for each tile of some columns."""
        left = self.left.load(tile)
        start, stop = columns.start, columns.stop
        if self.left is self.right and start <= tile.start < stop:
            parts = [*self.right.tiles(start, tile.start), tile]
            parts += self.right.tiles(tile.stop, stop)
        else:
            parts = list(self.right.tiles(start, stop)) or [slice(0, 0)]
        for part in parts:
            same = self.left is self.right and part == tile
            right = left if same else self.right.load(part)
            search = TiledComparison(
                left, right, self._block_bytes, self._kind(left, right) if self._kind else None
            )
            yield part.start, search
            self._kind = self._kind or search.kind


def concatenate_pairs(parts: list[RowPairs]) -> RowPairs:
    """Return the pairs of a strip with several tiles, whose columns rise from one to the next."""
    height = len(parts[0].counts)
    row = np.concatenate([np.repeat(np.arange(height), part.counts) for part in parts])
    order = np.argsort(row, kind="stable")
    columns = np.concatenate([part.columns for part in parts])[order]
    scores = np.concatenate([part.scores for part in parts])[order]
    return RowPairs(np.bincount(row, minlength=height), columns, scores)


def merge_top_k(scores: Float32, columns: Int64, k: int) -> tuple[Float32, Int64]:
    """Return the k best of each row, or all where there are fewer; ties by lower column."""
    order = np.lexsort((columns, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(columns, order, axis=1)
