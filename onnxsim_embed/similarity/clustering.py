"""Communities, components and top pairs of a set of vectors. Exact; numpy and scipy only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csgraph

from onnxsim_embed.similarity import selection
from onnxsim_embed.similarity.candidates import rounding_bound
from onnxsim_embed.similarity.compare import TILE_BYTES, Comparison, similarity_matrix
from onnxsim_embed.similarity.duplicates import below_one, rows_by_label
from onnxsim_embed.similarity.nearest import top_k
from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.similarity.selection import Pairs, Scores, TopPairs
from onnxsim_embed.similarity.tiles import TiledComparison
from onnxsim_embed.similarity.unit_rows import UnitRows, unit_vectors
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.units import check_integer

CHAINED_ROWS = 100  # from which on a component of most rows is worth a warning
FEW_ROWS = 256  # whose pairs are scored directly
CHUNK_BYTES = 16 << 20  # of a chunk of scores: selection from it takes several times as much

Vectors: TypeAlias = Any  # arrays, tensors or lists, which a score function takes by slices
Shape: TypeAlias = tuple[int, int]  # most rows and columns of one call of a score function
ScoreFunction: TypeAlias = Callable[[Vectors, Vectors], Any]


def _units(unit: Float32) -> UnitRows:
    return UnitRows(unit, normalized=True)


def communities(vectors: npt.ArrayLike, threshold: float = 0.75, min_size: int = 10) -> list[Int64]:
    """Find groups of rows around central rows, as sentence-transformers' `community_detection` does.

    The neighbourhood of a row are the rows whose cosine with it is at least the threshold (not strictly
    above, unlike elsewhere in this package), itself included. The row with the largest neighbourhood,
    the lowest of equals, forms a community with all of it; then the next row that is in no community
    yet forms one with its neighbours that are in none, if they are at least `min_size`; and so on.
    Memory grows with the number of scores that reach the threshold.

    :param vectors: (n, dim), of any norm.
    :param threshold: above -1, at most 1.
    :param min_size: minimum number of rows of a community, at least 1.
    :returns: int64 arrays of rows, largest first, of equal size in the order they were formed. Each
        begins with its central row; the others follow in descending order of cosine with it.
    :raises ValueError: for such a threshold or size, or as `similarity_matrix`.
    """
    if not -1 < threshold <= 1:
        raise ValueError(f"threshold must be above -1 and at most 1, got {threshold}")
    min_size = check_integer("min_size", min_size)
    # The matrix holds what is strictly above: the float32 just below includes the threshold itself.
    exclusive = float(np.nextafter(np.float32(threshold), np.float32(-2)))
    matrix = similarity_matrix(vectors, exclusive)
    sizes = np.diff(matrix.indptr)
    assigned = np.zeros(len(sizes), np.bool_)
    groups: list[Int64] = []
    order = np.argsort(-sizes, kind="stable")
    for centre in order[: np.count_nonzero(sizes >= min_size)]:
        if assigned[centre]:
            continue
        entries = slice(matrix.indptr[centre], matrix.indptr[centre + 1])
        similar = matrix.indices[entries]
        free = ~assigned[similar]
        if np.count_nonzero(free) < min_size:
            continue
        members = similar[free]
        by_score = np.lexsort((members, -matrix.data[entries][free], members != centre))
        groups.append(members[by_score].astype(np.int64))
        assigned[members] = True
    return sorted(groups, key=len, reverse=True)


def components(vectors: npt.ArrayLike, threshold: float = 0.75) -> Int64:
    """Label the connected components of the graph of pairs above a threshold.

    Rows of one component need not be similar: each is only similar to some other row of it. Memory
    grows with the number of scores above the threshold.

    :param vectors: (n, dim), of any norm.
    :param threshold: pairs strictly above it are connected, at 1 those of score 1; from -1 to 1.
    :returns: int64 array (n,), the component of each row, numbered from 0 by their first rows.
    :raises ValueError: as `similarity_matrix`.
    :warns UserWarning: if one component holds most of 100 rows or more.
    """
    threshold = below_one(threshold)
    matrix = Comparison(vectors).above(threshold)
    _, labels = csgraph.connected_components(matrix, directed=False)
    _, first, position = np.unique(labels, return_index=True, return_inverse=True)
    largest = np.bincount(labels).max(initial=0)
    if len(labels) >= CHAINED_ROWS and largest > len(labels) / 2:
        warnings.warn(
            f"one component holds {largest:,} of {len(labels):,} rows, connected by chains of pairs above "
            f"{threshold:.6g}: raise the threshold, or use communities, whose rows resemble a central one",
            stacklevel=2,
        )
    return np.argsort(np.argsort(first))[position].astype(np.int64)


def component_groups(
    vectors: npt.ArrayLike, threshold: float = 0.75, min_size: int = 1
) -> list[Int64]:
    """Return the components as lists of rows, ordered like `communities`.

    :param vectors: as for `components`, as is `threshold`.
    :param min_size: minimum number of rows of a component that is returned.
    :returns: int64 arrays of rows, largest first, of equal size by first row; the rows of each in
        descending order of cosine with the mean of its unit vectors, ties by lower row.
    """
    min_size = check_integer("min_size", min_size, 0)
    labels = components(vectors, threshold)
    unit = unit_vectors(vectors)

    def by_centrality(rows: Int64) -> Int64:
        members = unit[rows]
        return rows[np.argsort(-np.einsum("ij,j->i", members, members.mean(axis=0)), kind="stable")]

    groups = [by_centrality(rows) for rows in rows_by_label(labels) if len(rows) >= min_size]
    return sorted(groups, key=len, reverse=True)


def least_similarities(vectors: npt.ArrayLike, groups: Sequence[Int64]) -> Float32:
    """Return the least cosine of two rows of each group: how far a cluster reaches.

    :param vectors: (n, dim), of any norm.
    :param groups: arrays of rows, such as those of `communities` or `component_groups`.
    :returns: float32 (groups,), bitwise the scores of `similar_pairs`; 1 for a single row.
    """
    unit = unit_vectors(vectors)

    def least(rows: Int64) -> float:
        members = unit[rows]
        if len(rows) <= FEW_ROWS:
            scores = exact_scores(members, members, *np.triu_indices(len(rows), 1))
            return float(scores.min(initial=1))
        # The least similar row is the nearest neighbour of the opposite one.
        opposite = TiledComparison(-members, members, TILE_BYTES)
        columns = top_k(opposite, 1, skip_self=False).indices[:, 0]
        return float(exact_scores(members, members, np.arange(len(rows)), columns).min())

    return np.array([least(rows) for rows in groups], np.float32)


def score_chunks(
    left: Vectors, right: Vectors, score: ScoreFunction, chunks: Shape, upper: bool = False
) -> Iterator[tuple[int, Scores]]:
    """Yield each chunk's first row and scores; `upper` omits columns before the row (of one set)."""
    chunks = check_integer("chunk size", chunks[0]), check_integer("chunk size", chunks[1])
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
    rows: Vectors, limit: int | None, k: int | None, score: ScoreFunction | None, chunks: Shape
) -> Pairs:
    """Return the top pairs by a symmetric score, or by the exact cosine of unit rows.

    With `k`, only pairs in which one row is among the top-k of the other.
    """
    size = len(rows)
    best = TopPairs(size, limit)
    if k is not None and score is None:
        top = Comparison(_units(rows)).top_k(k)
        best.add(np.repeat(np.arange(size), k), top.indices.ravel(), top.scores.ravel())
    elif k is not None and score is not None:
        for start, scores in score_chunks(rows, rows, score, chunks):
            top = selection.top_k_of_rows(scores, k + 1)
            row = np.arange(start, start + len(scores))
            other = top.indices != row[:, None]
            other[other.all(axis=1), k] = False  # the row itself is not among the k + 1
            best.add(np.repeat(row, k), top.indices[other], top.scores[other])
    else:
        slack = rounding_bound(rows.shape[1]) if score is None else 0.0
        tiles = (size, size) if score is None else chunks
        for start, scores in score_chunks(
            rows, rows, score or (lambda a, b: a @ b.T), tiles, upper=True
        ):
            above = scores > best.bound - slack
            square = above[:, : len(scores)]
            square &= np.triu(np.ones(square.shape, np.bool_), 1)
            row, column = np.divmod(np.flatnonzero(above), scores.shape[1])
            values = scores[row, column]
            row, column = row + start, column + start
            best.add(row, column, values if score else exact_scores(rows, rows, row, column))
    return best.result()
