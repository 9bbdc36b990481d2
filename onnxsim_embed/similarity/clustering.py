"""What a set of vectors holds: duplicates, communities, components, best pairs. Exact; numpy and scipy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csgraph

from onnxsim_embed.similarity.compare import check_threshold, similarity_matrix, unit_vectors

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Scores = npt.NDArray[Any]

# Rows that `deduplicate` compares with each other at a time. Where all of them are alike every score is
# stored: 17 million, some 300 MB while the matrix is built, however many rows there are.
ROWS_AT_A_TIME = 4096

# Bytes of one strip of scores: what is picked from it takes several times as much while it is picked.
CHUNK_BYTES = 16 << 20


class Duplicates(NamedTuple):
    """Which rows stay, and for each row the one that stands for it.

    :param kept: int64 array, the rows that stay, in order.
    :param first: int64 array (n,), the kept row that each row belongs to; a kept row's own number.
    :param scores: float32 array (n,), the cosine of each row with that kept row; 1 for kept rows.
    """

    kept: Int64
    first: Int64
    scores: Float32

    def groups(self) -> list[Int64]:
        """Return the groups of two rows or more, each in order: the kept row, then those it stands for."""
        return [group for group in _split(self.first) if len(group) > 1]


def deduplicate(vectors: npt.ArrayLike, threshold: float = 0.95) -> Duplicates:
    """Keep the first of rows that say the same.

    Rows are taken in order. A row whose cosine with a row kept before it is strictly above the threshold
    is dropped and belongs to the earliest such row; every other row is kept. So no two kept rows are
    above the threshold, and every dropped row is above it with the row it belongs to. Likeness is not
    passed on: a row that is like a dropped row only is kept.

    Rows are compared in chunks, with the rows kept so far and among themselves, so that memory stays
    bounded where thousands are alike.

    :param vectors: (n, dim), of any norm. Zero rows score 0 with every row, each other included.
    :param threshold: from -1 to 1; at 1 nothing is above it and every row is kept.
    :raises ValueError: as `similarity_matrix`.
    """
    check_threshold(threshold)
    unit = unit_vectors(vectors)
    first = np.arange(len(unit))
    scores = np.ones(len(unit), np.float32)
    kept = np.zeros(0, np.int64)
    for start in range(0, len(unit), ROWS_AT_A_TIME):
        rows = np.arange(start, min(start + ROWS_AT_A_TIME, len(unit)))
        if len(kept):
            above = similarity_matrix(unit[rows], threshold, other=unit[kept])
            dropped = np.diff(above.indptr) > 0
            earliest = above.indptr[:-1][dropped]  # columns are sorted, and kept rows are in order
            first[rows[dropped]] = kept[above.indices[earliest]]
            scores[rows[dropped]] = above.data[earliest]
            rows = rows[~dropped]
        within, likeness = _keep_first(unit[rows], threshold)
        first[rows], scores[rows] = rows[within], likeness
        kept = np.concatenate([kept, rows[within == np.arange(len(rows))]])
    return Duplicates(kept, first, scores)


def _keep_first(unit: Float32, threshold: float) -> tuple[Int64, Float32]:
    """Return `first` and `scores` of `Duplicates` for rows that are compared all at once."""
    matrix = similarity_matrix(unit, threshold, include_self=False)
    first, scores = np.arange(len(unit)), np.ones(len(unit), np.float32)
    for row in np.flatnonzero(np.diff(matrix.indptr)):
        if first[row] == row:
            part = slice(matrix.indptr[row], matrix.indptr[row + 1])
            near = matrix.indices[part]
            free = (near > row) & (first[near] == near)
            first[near[free]] = row
            scores[near[free]] = matrix.data[part][free]
    return first, scores


def communities(vectors: npt.ArrayLike, threshold: float = 0.75, min_size: int = 10) -> list[Int64]:
    """Find groups of rows around central rows, as sentence-transformers' `community_detection` does.

    Around each row lie the rows whose cosine with it is at least the threshold (not strictly above, as
    elsewhere in this package), itself included. The row with the most of them, of equals the lowest,
    takes them all; then the next, if no earlier community holds it, takes those that none holds, if
    they are at least `min_size`; and so on. A row is in one community or in none.

    Memory grows with the number of scores that reach the threshold.

    :param vectors: (n, dim), of any norm.
    :param threshold: above -1, at most 1. Cosines are float32: at 1 the last bit decides whether even
        equal rows are together.
    :param min_size: least rows of a community, at least 1.
    :returns: int64 arrays of rows, the largest first, of equal size in the order they were taken. Each
        begins with its central row, the others follow by falling cosine with it, ties by lower row.
    :raises ValueError: for such a threshold or size, or for values as `similarity_matrix`.
    """
    if not -1 < threshold <= 1:
        raise ValueError(f"threshold must be above -1 and at most 1, got {threshold}")
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got {min_size}")
    # The matrix holds what is strictly above: the float32 just below lets the threshold itself in.
    reached = float(np.nextafter(np.float32(threshold), np.float32(-2)))
    matrix = similarity_matrix(vectors, reached)
    sizes = np.diff(matrix.indptr)
    used = np.zeros(len(sizes), np.bool_)
    found: list[Int64] = []
    order = np.argsort(-sizes, kind="stable")
    for centre in order[: np.count_nonzero(sizes >= min_size)]:
        if used[centre]:
            continue
        part = slice(matrix.indptr[centre], matrix.indptr[centre + 1])
        near = matrix.indices[part]
        free = ~used[near]
        if np.count_nonzero(free) < min_size:
            continue
        members = near[free]
        by_score = np.lexsort((members, -matrix.data[part][free], members != centre))
        found.append(members[by_score].astype(np.int64))
        used[members] = True
    return sorted(found, key=len, reverse=True)


def components(vectors: npt.ArrayLike, threshold: float = 0.75) -> Int64:
    """Label rows that chains of pairs above a threshold connect.

    Rows of one component need not be alike: each is only like some other of it.

    Memory grows with the number of scores above the threshold.

    :param vectors: (n, dim), of any norm.
    :param threshold: pairs strictly above it are connected; from -1 to 1.
    :returns: int64 array (n,), the number of each row's component, numbered from 0 by their first rows.
    :raises ValueError: as `similarity_matrix`.
    """
    matrix = similarity_matrix(vectors, threshold, include_self=False)
    _, labels = csgraph.connected_components(matrix, directed=False)
    _, first, place = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[place].astype(np.int64)


def component_groups(
    vectors: npt.ArrayLike, threshold: float = 0.75, min_size: int = 1
) -> list[Int64]:
    """Return the components as lists of rows, ordered as `communities` orders its own.

    :param vectors: (n, dim), of any norm.
    :param threshold: pairs strictly above it are connected; from -1 to 1.
    :param min_size: least rows of a component that is returned.
    :returns: int64 arrays of rows, the largest first, of equal size by first row. Each begins with the
        row closest to the mean of the component's unit vectors, the others follow by falling cosine
        with that mean, ties by lower row.
    :raises ValueError: as `similarity_matrix`.
    """
    unit = unit_vectors(vectors)
    groups = [rows for rows in _split(components(unit, threshold)) if len(rows) >= min_size]
    nearest = [rows[np.argsort(-_to_mean(unit[rows]), kind="stable")] for rows in groups]
    return sorted(nearest, key=len, reverse=True)


def _to_mean(unit: Float32) -> Float32:
    return np.asarray(np.einsum("ij,j->i", unit, unit.mean(axis=0)))


def _split(labels: npt.NDArray[Any]) -> list[Int64]:
    """Return the rows of each label, in order, by rising label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, starts) if len(order) else []


def score_chunks(
    left: Any,  # noqa: ANN401
    right: Any,  # noqa: ANN401
    score: Callable[[Any, Any], Any],
    chunks: tuple[int, int],
    *,
    upper: bool = False,
) -> Iterator[tuple[int, Scores]]:
    """Yield strips of the scores of all rows of two sets, by any function.

    :param left: (n, dim), an array or whatever else can be sliced and `score` takes.
    :param right: (m, dim).
    :param score: takes a chunk of each and returns an array (rows, columns).
    :param chunks: most rows and most columns of one call.
    :param upper: leave out columns before the strip's first row (left and right are one set).
    :returns: the first row of each strip, and its scores.
    :raises ValueError: if chunks are not positive, or `score` returns another shape or NaN.
    """
    if min(chunks) < 1:
        raise ValueError(f"chunk sizes must be positive, got {chunks}")
    height = max(1, min(chunks[0], CHUNK_BYTES // (4 * max(1, len(right)))))
    for start in range(0, len(left), height):
        rows = left[start : start + height]
        columns = range(start if upper else 0, len(right), chunks[1])
        parts = [np.asarray(score(rows, right[i : i + chunks[1]])) for i in columns]
        scores = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        expected = (len(rows), len(right) - columns.start)
        if scores.shape != expected or np.isnan(scores).any():
            raise ValueError(
                f"the score function must return {expected} numbers, got shape {scores.shape}"
                f"{' with NaN' if scores.shape == expected else ''}"
            )
        yield start, scores


def best_of_rows(scores: Scores, k: int) -> tuple[Int64, Scores]:
    """Return columns and scores of the k best of each row, best first, ties by lower column.

    :param scores: array (rows, columns) without NaN.
    :param k: from 1 to the number of columns.
    """
    bound = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    rows, columns = np.nonzero(scores >= bound)
    order = np.lexsort((columns, -scores[rows, columns], rows))
    starts = np.searchsorted(rows, np.arange(len(scores)))
    best = columns[order[starts[:, None] + np.arange(k)]]
    return best, np.take_along_axis(scores, best, axis=1)


class BestPairs:
    """The best of many pairs of n rows, gathered part by part in bounded memory.

    A pair is the key `row * n + column`, row below column. Of equal scores the lower keys are kept; of a
    pair that comes twice, the score that came first.

    :param limit: most pairs kept; None keeps all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._parts: list[tuple[Int64, Scores]] = []
        self._waiting = 0
        self._bound = -np.inf

    def add(self, keys: Int64, scores: Scores) -> None:
        """Add pairs in any order."""
        good = scores >= self._bound
        self._parts.append((keys[good], scores[good]))
        self._waiting += int(np.count_nonzero(good))
        if self.limit is not None and self._waiting > self.limit:
            self._parts = [self.result()]
            self._waiting = 0

    def add_upper(self, start: int, scores: Scores, size: int) -> None:
        """Add the pairs of a strip of `score_chunks(upper=True)`, strips in order.

        :param start: the strip's first row.
        :param size: n.
        """
        # Strips come in the order of keys, so a score that only equals the bound comes too late.
        better = scores > self._bound
        square = better[:, : len(scores)]
        square &= np.triu(np.ones(square.shape, np.bool_), 1)
        found = np.flatnonzero(better)
        rows, columns = np.divmod(found, scores.shape[1])
        self.add((rows + start) * size + columns + start, scores.ravel()[found])

    def result(self) -> tuple[Int64, Scores]:
        """Return the keys, rising, and the scores of the best pairs so far."""
        if not self._parts:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        keys, scores = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        if (np.diff(keys) <= 0).any():
            keys, first = np.unique(keys, return_index=True)
            scores = scores[first]
        if self.limit is None or len(keys) <= self.limit:
            return keys, scores
        self._bound = np.partition(scores, len(scores) - self.limit)[len(scores) - self.limit]
        chosen = scores > self._bound
        ties = np.flatnonzero(scores == self._bound)
        chosen[ties[: self.limit - np.count_nonzero(chosen)]] = True
        return keys[chosen], scores[chosen]
