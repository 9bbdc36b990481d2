"""The top-k of each row, exactly: candidates of a tile are scored at once, and raise the bounds for the next.

Scores of candidates are one-sided bounds, so that only exact scores tell what may still be among the top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.scoring import TRIAL_COLUMNS, TiledComparison, exact_scores
from onnxsim_embed.similarity.selection import (
    BestOfRows,
    Float32,
    Int64,
    TopK,
    kth_bounds,
    narrow,
    positions,
)
from onnxsim_embed.system.threads import CHUNK_ROWS, map_chunks, row_chunks

# Rows for each row by which similar ones are found, and the most there are.
PIVOT_ROWS, MAX_PIVOTS = 256, 512

PREFIX_PAIRS = 1 << 32  # from which on prefixes are tried: only close neighbours make them pay
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
    both = comparison.left is comparison.right and len(best.bounds) == total
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
    if 4 * best.k <= TRIAL_COLUMNS:
        comparison.choose_scorer(lambda trial: top_k(trial, best.k, skip_self=False), PREFIX_PAIRS)
    same = comparison.left is comparison.right
    if both and same:
        order = by_similarity(comparison.left)
        comparison = comparison.reordered(order)
        numbers = numbers[0][order], numbers[1][order]
    add = partial(_add_tile, comparison, best, numbers, skip_self=skip_self and same)
    chunks = comparison.chunks(rows)

    def add_square(chunk: slice) -> None:
        for tile in comparison.column_tiles(chunk.start, chunk.stop):
            add(chunk, tile, both=False)

    def add_rest(chunk: slice) -> int:
        start = chunk.stop if both and same else 0
        for tile in comparison.column_tiles(start, len(comparison.right)):
            add(chunk, tile, both=both)
        return chunk.stop - chunk.start

    # Of a set with itself, the squares on the diagonal, of similar rows, give all rows a first bound.
    for _ in map_chunks(add_square, chunks if both and same else []):
        pass
    for done in map_chunks(add_rest, chunks):
        on_rows(done)


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

    def find(mask: npt.NDArray[np.bool_]) -> tuple[Int64, Int64, Float32]:
        mask[own - chunk.start, own - tile.start] = False
        row, column = positions(mask)
        return row, column, exact_scores(left, right, row, column)

    bounds = best.bounds[rows]
    if np.isneginf(bounds).any() and len(columns) > best.k:
        seeds = BestOfRows(len(rows), best.k)
        seeds.add(*find(scores >= kth_bounds(scores, best.k + 1)))
        bounds = np.maximum(bounds, seeds.bounds)
    least = scorer.bounds(bounds)[:, None]
    other = scorer.bounds(best.bounds[columns]) if both else least
    mask = np.empty(scores.shape, np.bool_)
    for part in row_chunks(len(rows), MASK_ROWS):
        lower = np.minimum(least[part], other) if both else least[part]
        np.greater(scores[part], lower, out=mask[part])
    row, column, exact = find(mask)
    best.add(rows[row], columns[column], exact)
    if both:
        order = np.argsort(narrow(column, len(columns)), kind="stable")
        best.add(columns[column[order]], rows[row[order]], exact[order])


def by_similarity(rows: Float32) -> Int64:
    """Return an order of unit rows in which similar ones are close: by the most similar of some pivots."""
    step = max(PIVOT_ROWS, len(rows) // MAX_PIVOTS)
    pivots = rows[::step]

    def nearest(chunk: slice) -> Int64:
        return np.argmax(rows[chunk] @ pivots.T, axis=1)

    found = map_chunks(nearest, row_chunks(len(rows), CHUNK_ROWS))
    numbers = np.concatenate([np.zeros(0, np.int64), *found])
    return np.argsort(narrow(numbers, len(pivots)), kind="stable")
