"""The pairs of a set with the highest scores, by the cosine or any other function. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from onnxsim_embed.similarity.candidates import rounding_bound
from onnxsim_embed.similarity.compare import Comparison
from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.similarity.selection import Scores, TopPairs, top_k_of_rows
from onnxsim_embed.similarity.unit_rows import UnitRows

ScoreFunction: TypeAlias = Callable[[Any, Any], Any]

# Bytes of one chunk of scores: selection from it takes several times as much.
CHUNK_BYTES = 16 << 20


def score_chunks(
    left: Any,  # noqa: ANN401
    right: Any,  # noqa: ANN401
    score: ScoreFunction,
    chunks: tuple[int, int],
    *,
    upper: bool = False,
) -> Iterator[tuple[int, Scores]]:
    """Yield the first row and the scores of each chunk of rows, by any function of two chunks.

    :param left: anything that can be sliced and that `score` takes.
    :param chunks: maximum rows and columns of one call.
    :param upper: omit columns before the chunk's first row (of one set).
    """
    if min(chunks) < 1:
        raise ValueError(f"chunk sizes must be positive, got {chunks}")
    height = max(1, min(chunks[0], CHUNK_BYTES // (4 * max(1, len(right)))))
    for start in range(0, len(left), height):
        rows = left[start : start + height]
        columns = range(start if upper else 0, len(right), chunks[1])
        tiles = [np.asarray(score(rows, right[i : i + chunks[1]])) for i in columns]
        scores = tiles[0] if len(tiles) == 1 else np.concatenate(tiles, axis=1)
        expected = (len(rows), len(right) - columns.start)
        if scores.shape != expected or np.isnan(scores).any():
            raise ValueError(
                f"the score function must return {expected} numbers, got shape {scores.shape}"
                f"{' with NaN' if scores.shape == expected else ''}"
            )
        yield start, scores


def top_pairs(
    rows: Any,  # noqa: ANN401
    limit: int | None,
    score: ScoreFunction | None,
    chunks: tuple[int, int],
) -> TopPairs:
    """Return the top pairs by a symmetric score; None for the exact cosine of unit rows."""
    size = len(rows)
    best = TopPairs(size, limit)
    slack, approximate = 0.0, score
    if approximate is None:
        slack, chunks = rounding_bound(rows.shape[1]), (size, size)
        approximate = _dot
    for start, scores in score_chunks(rows, rows, approximate, chunks, upper=True):
        above = scores > best.bound - slack
        square = above[:, : len(scores)]
        square &= np.triu(np.ones(square.shape, np.bool_), 1)
        row, column = np.divmod(np.flatnonzero(above), scores.shape[1])
        values = scores[row, column]
        row, column = row + start, column + start
        best.add(row, column, exact_scores(rows, rows, row, column) if score is None else values)
    return best


def _dot(a: Scores, b: Scores) -> Scores:
    return np.asarray(a @ b.T)


def top_pairs_of_neighbours(
    rows: Any,  # noqa: ANN401
    k: int,
    limit: int | None,
    score: ScoreFunction | None,
    chunks: tuple[int, int],
) -> TopPairs:
    """Return the top pairs in which one row is among the top-k of the other; see `top_pairs`."""
    size = len(rows)
    best = TopPairs(size, limit)
    if score is None:
        top = Comparison(UnitRows(rows, normalized=True)).top_k(k)
        best.add(np.repeat(np.arange(size), k), top.indices.ravel(), top.scores.ravel())
        return best
    for start, scores in score_chunks(rows, rows, score, chunks):
        top = top_k_of_rows(scores, k + 1)
        row = np.arange(start, start + len(scores))
        other = top.indices != row[:, None]
        other[other.all(axis=1), k] = False  # the row itself is not among the k + 1
        best.add(np.repeat(row, k), top.indices[other], top.scores[other])
    return best
