"""Duplicates, communities, components and top pairs of a set of vectors. Exact; numpy and scipy only."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csgraph

from onnxsim_embed.similarity import selection
from onnxsim_embed.similarity.candidates import rounding_bound
from onnxsim_embed.similarity.compare import Comparison, check_threshold, similarity_matrix
from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.similarity.selection import Float32, Int64, Pairs, Scores, TopPairs
from onnxsim_embed.similarity.unit_rows import UnitRows, unit_vectors
from onnxsim_embed.system.units import check_integer

CHUNK_ROWS = 4096  # compared by `deduplicate` at a time: at most 17 million scores, some 300 MB
CHUNK_BYTES = 16 << 20  # of a chunk of scores: selection from it takes several times as much

Vectors: TypeAlias = Any  # arrays, tensors or lists, which a score function takes by slices
Shape: TypeAlias = tuple[int, int]  # most rows and columns of one call of a score function
ScoreFunction: TypeAlias = Callable[[Vectors, Vectors], Any]


class Duplicates(NamedTuple):
    """Result of `deduplicate`."""

    kept: Int64  # the rows that are kept, in order
    first: Int64  # (n,), the kept row that each row is a duplicate of; for a kept row, itself
    scores: Float32  # (n,), the cosine of each row with that kept row; 1 for kept rows

    def __repr__(self) -> str:
        return f"Duplicates({len(self.first):,} rows, {len(self.kept):,} kept)"

    def groups(self) -> list[Int64]:
        """Return the groups of two or more rows, each in order: the kept row, then its duplicates."""
        return [group for group in _rows_by_label(self.first) if len(group) > 1]


def deduplicate(
    vectors: npt.ArrayLike,
    threshold: float = 0.95,
    *,
    texts: Sequence[str] | None = None,
    drop_unseen: bool = False,
) -> Duplicates:
    """Keep the first of each group of near-duplicate rows.

    Rows are processed in order. A row whose cosine with an earlier kept row is strictly above the
    threshold is dropped as a duplicate of the earliest such row; every other row is kept, also one that
    is similar to a dropped row only. Memory is bounded even if thousands of rows are similar.

    :param vectors: (n, dim), of any norm. Zero rows score 0 with every row, including each other.
    :param threshold: from -1 to 1; at 1 rows of score 1 are duplicates: equal ones.
    :param texts: the n texts of the vectors. Of rows with equal vectors those with other texts are kept
        as well: what the model does not see of a text, its vector cannot tell; see `unseen_rows`.
    :param drop_unseen: drop them nevertheless.
    :raises ValueError: as `similarity_matrix`, or if there are not as many texts as vectors.
    """
    threshold = _below_one(threshold)
    unit = unit_vectors(vectors)
    first = np.arange(len(unit))
    scores = np.ones(len(unit), np.float32)
    kept = np.zeros(0, np.int64)
    equal, twin = (first.copy(),) * 2 if texts is None else _first_equal(unit, texts)
    compared, repeated = np.flatnonzero(equal == first), np.flatnonzero(equal != first)
    for start in range(0, len(compared), CHUNK_ROWS):
        rows = compared[start : start + CHUNK_ROWS]
        if len(kept):
            above = Comparison(_units(unit[rows]), _units(unit[kept])).above(threshold)
            dropped = np.diff(above.indptr) > 0
            earliest = above.indptr[:-1][dropped]  # columns are sorted, and kept rows are in order
            first[rows[dropped]] = kept[above.indices[earliest]]
            scores[rows[dropped]] = above.data[earliest]
            rows = rows[~dropped]
        matrix = Comparison(_units(unit[rows])).above(threshold)
        for row in np.flatnonzero(np.diff(matrix.indptr)):
            if first[rows[row]] == rows[row]:
                entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
                similar = rows[matrix.indices[entries]]
                undecided = first[similar] == similar
                first[similar[undecided]] = rows[row]
                scores[similar[undecided]] = matrix.data[entries][undecided]
        kept = np.concatenate([kept, rows[first[rows] == rows]])
    # The other rows of equal vectors share the fate of the first.
    own = equal if drop_unseen else twin
    first[repeated] = np.where(first[equal] == equal, own, first[equal])[repeated]
    scores[repeated] = scores[equal[repeated]]
    return Duplicates(np.flatnonzero(first == np.arange(len(first))), first, scores)


def unseen_rows(vectors: npt.ArrayLike, texts: Sequence[str]) -> Int64:
    """Return the rows whose vector equals that of an earlier row although their text differs.

    A model sees neither what lies beyond its maximum length nor words of unknown tokens, and nothing in
    an empty text. Differences of case, accents, spaces and invisible characters do not count.

    :param vectors: (n, dim).
    :param texts: their n texts; an empty one differs from all others.
    :raises ValueError: as `similarity_matrix`, or if there are not as many texts as vectors.
    """
    equal, twin = _first_equal(unit_vectors(vectors), texts)
    rows = np.arange(len(equal))
    return np.flatnonzero((equal != rows) & (twin == rows))


def _first_equal(unit: Float32, texts: Sequence[str]) -> tuple[Int64, Int64]:
    """Return for each row the first row of an equal vector, and the first that has its text as well."""
    if len(texts) != len(unit):
        raise ValueError(f"got {len(texts):,} texts for {len(unit):,} vectors")
    seen: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row, digest_size=16).digest() for row in unit)
    equal = np.array([seen.setdefault(d, row) for row, d in enumerate(digests)], np.int64)
    twin = np.arange(len(unit))
    known: dict[tuple[int, str], int] = {}
    for row in np.flatnonzero(np.bincount(equal, minlength=len(unit))[equal] > 1).tolist():
        if text := _visible(texts[row]):
            twin[row] = known.setdefault((int(equal[row]), text), row)
    return equal, twin


def _visible(text: str) -> str:
    """Return a text without case, accents, spaces and invisible characters."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(
        c for c in decomposed if c.isprintable() and c != " " and not unicodedata.combining(c)
    )


def _below_one(threshold: float) -> float:
    """Check a threshold, and let 1 include the scores that are 1, above which there is none."""
    check_threshold(threshold)
    return min(float(threshold), float(np.nextafter(np.float32(1), np.float32(0))))


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
    """
    threshold = _below_one(threshold)
    matrix = Comparison(vectors).above(threshold)
    _, labels = csgraph.connected_components(matrix, directed=False)
    _, first, position = np.unique(labels, return_index=True, return_inverse=True)
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

    groups = [by_centrality(rows) for rows in _rows_by_label(labels) if len(rows) >= min_size]
    return sorted(groups, key=len, reverse=True)


def _rows_by_label(labels: npt.NDArray[Any]) -> list[Int64]:
    """Return the rows of each label, in order, by rising label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, starts) if len(order) else []


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
