"""The top-k of each row, exactly: candidates of a tile are scored at once, and raise the bounds for the next.

Scores of candidates are one-sided bounds, so that only exact scores tell what may still be among the top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.similarity.selection import BestOfRows, TopK, kth_bounds, narrow, positions
from onnxsim_embed.similarity.tiles import TiledComparison
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.threads import CHUNK_ROWS, map_chunks, row_chunks

# Rows for each row by which similar ones are found, and the most there are.
PIVOT_ROWS, MAX_PIVOTS = 256, 512

# Of a set, from which on computing each tile once, with the bounds of its rows and columns, is faster.
TRIANGLE_ROWS = 4096

# Pairs from which on prefixes are tried: only close neighbours make them pay. What all rows must exceed
# is then found on this share of the columns first.
PREFIX_PAIRS, FIRST_SHARE = 1 << 31, 1 / 8
MASK_ROWS = 128  # whose bounds, half a megabyte for 1,024 columns, stay in a second-level cache

OnRows = Callable[[int], object]  # called with the number of rows that are done
Numbers = tuple[Int64, Int64]  # of all rows and of all columns in the result


def top_k(
    comparison: TiledComparison,
    k: int,
    *,
    skip_self: bool,
    rows: slice | None = None,
    on_rows: OnRows = lambda rows: None,
) -> TopK:
    """Return the top-k of some rows; `skip_self` excludes each row itself."""
    total = len(comparison.left)
    rows = rows or slice(0, total)
    best = BestOfRows(rows.stop - rows.start, k)
    numbers = np.arange(total) - rows.start, np.arange(len(comparison.right))
    both = comparison.left is comparison.right and len(best.bounds) == total >= TRIANGLE_ROWS
    add_top_k(comparison, best, numbers, both=both, skip_self=skip_self, rows=rows, on_rows=on_rows)
    return best.top()


def add_top_k(
    comparison: TiledComparison,
    best: BestOfRows,
    numbers: Numbers,
    *,
    both: bool,
    skip_self: bool,
    rows: slice | None = None,
    on_rows: OnRows = lambda rows: None,
) -> None:
    """Add the pairs that may be among the top-k.

    :param both: a pair may be among the top-k of its row and of its column. Of a set with itself, each
        tile is then computed once.
    :param skip_self: of a set with itself, exclude each row itself.
    """
    total = len(comparison.right)
    same = comparison.left is comparison.right
    rows = rows or slice(0, len(comparison.left))
    large = (rows.stop - rows.start) * total >= PREFIX_PAIRS
    comparison.choose_scorer(partial(_kth_scores, best.k / max(1, total)))
    squares = both and same
    if squares:
        order = by_similarity(comparison.left)
        comparison = comparison.reordered(order)
        numbers = numbers[0][order], numbers[1][order]
    # The squares on the diagonal, of similar rows, give all rows of a set a first bound.
    first = int(FIRST_SHARE * total) if large and not both else 0

    def add(chunk: slice, columns: slice, *, both: bool) -> int:
        for tile in comparison.column_tiles(columns.start, columns.stop):
            _add_tile(
                comparison, best, numbers, chunk, tile, both=both, skip_self=skip_self and same
            )
        return chunk.stop - chunk.start

    def add_first(chunk: slice) -> int:
        return add(chunk, chunk if squares else slice(0, first), both=False)

    def add_rest(chunk: slice) -> int:
        return add(chunk, slice(chunk.stop if squares else first, total), both=both)

    chunks = comparison.chunks(rows)
    for _ in map_chunks(add_first, chunks if squares or first else []):
        pass
    if large:
        found = best.bounds[numbers[0][rows]]
        others = best.bounds[numbers[1]] if both else np.full(total, np.inf, np.float32)
        comparison = comparison.with_prefix(partial(_least_bounds, found, others), rows)
    for done in map_chunks(add_rest, chunks):
        on_rows(done)


def _kth_scores(share: float, rows: slice, columns: slice, scores: Float32) -> Float32:
    """Return the score that this share of a sample's scores reach, for each row."""
    width = scores.shape[1]
    k = min(width, math.ceil(share * width))
    return np.partition(scores, width - k, axis=1)[:, width - k, None]


def _least_bounds(
    row_bounds: Float32, column_bounds: Float32, rows: slice, columns: slice, scores: Float32
) -> Float32:
    """Return what the score of a pair must exceed to be among the top-k of its row or its column."""
    return np.minimum(row_bounds[rows][:, None], column_bounds[columns])


def _add_tile(
    comparison: TiledComparison,
    best: BestOfRows,
    numbers: Numbers,
    chunk: slice,
    tile: slice,
    *,
    both: bool,
    skip_self: bool,
) -> None:
    left, right = comparison.left[chunk], comparison.right[tile]
    rows, columns = numbers[0][chunk], numbers[1][tile]
    scorer = comparison.scorer
    scores = scorer.scores(chunk, tile)
    own = np.arange(max(chunk.start, tile.start), min(chunk.stop, tile.stop) * skip_self)

    def add(mask: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
        mask[own - chunk.start, own - tile.start] = False
        row, column = positions(mask)
        exact = exact_scores(left, right, row, column)
        best.add(rows[row], columns[column], exact)
        if both:
            order = np.argsort(narrow(column, len(columns)), kind="stable")
            best.add(columns[column[order]], rows[row[order]], exact[order])
        return row, column

    added = None
    if np.isneginf(best.bounds[rows]).any() and len(columns) > best.k:
        added = add(scores >= kth_bounds(scores, best.k + 1))
    least = scorer.bounds(best.bounds[rows])[:, None]
    other = scorer.bounds(best.bounds[columns]) if both else least
    mask = np.empty(scores.shape, np.bool_)
    for part in row_chunks(len(rows), MASK_ROWS):
        lower = np.minimum(least[part], other) if both else least[part]
        np.greater(scores[part], lower, out=mask[part])
    if added:
        mask[added] = False
    add(mask)


def by_similarity(rows: Float32) -> Int64:
    """Return an order of unit rows in which similar ones are close: by the most similar of some pivots."""
    step = max(PIVOT_ROWS, len(rows) // MAX_PIVOTS)
    pivots = rows[::step]

    def nearest(chunk: slice) -> Int64:
        return np.argmax(rows[chunk] @ pivots.T, axis=1)

    found = map_chunks(nearest, row_chunks(len(rows), CHUNK_ROWS))
    numbers = np.concatenate([np.zeros(0, np.int64), *found])
    return np.argsort(narrow(numbers, len(pivots)), kind="stable")
