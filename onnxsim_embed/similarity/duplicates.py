"""Near-duplicates of a set of vectors, within it and in a reference set. Exact; numpy and scipy only."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.compare import TILE_BYTES, check_threshold
from onnxsim_embed.similarity.memory import MemoryBudget
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.selection import Pairs
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import RowSubset, UnitRows, check_dims
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.units import check_integer

CHUNK_ROWS = 4096  # decided at a time: at most 8 million scores, some 150 MB


class _Duplicates(NamedTuple):
    kept: Int64  # the rows that are kept, in order
    first: Int64  # (n,), the kept row that each row is a duplicate of; for a kept row, itself
    scores: Float32  # (n,), the cosine of each row with that kept row; 1 for kept rows


class Duplicates(_Duplicates):
    """Result of `deduplicate`: `kept`, `first` and `scores`.

    With a reference set, `reference` (n,) holds the reference row that excludes each row, or -1;
    `first` is -1 for rows that one excludes, and `scores` are with it.
    """

    threshold: float
    reference: Int64

    def __new__(
        cls, kept: Int64, first: Int64, scores: Float32, threshold: float = -1, reference: Int64 | None = None
    ) -> Duplicates:  # fmt: skip
        """Make a result; without `reference`, of a set alone."""
        self = super().__new__(cls, kept, first, scores)
        self.threshold = threshold
        self.reference = np.full(len(first), -1) if reference is None else reference
        return self

    def __repr__(self) -> str:
        return f"Duplicates({len(self.first):,} rows, {len(self.kept):,} kept)"

    def groups(self) -> list[Int64]:
        """Return the groups of two or more rows, each in order: the kept row, then its duplicates."""
        rows = np.flatnonzero(self.first >= 0)
        groups = rows_by_label(self.first[rows])
        return [rows[group] for group in groups if len(group) > 1]

    def dropped(self, count: int | None = None) -> Pairs:
        """Return the row that stands for each dropped row, the least similar pairs first.

        They show whether the threshold is right: `rethreshold` undoes those that are too different.

        :param count: number of pairs; None for all.
        :returns: `left`: the kept row, or the reference row where `reference` is not -1; `right`: the
            dropped row; `scores` in ascending order, ties by row.
        """
        rows = np.flatnonzero(self.first != np.arange(len(self.first)))
        rows = rows[np.argsort(self.scores[rows], kind="stable")]
        if count is not None:
            rows = rows[: check_integer("count", count, 0)]
        keepers = np.where(self.first[rows] < 0, self.reference[rows], self.first[rows])
        return Pairs(keepers, rows, self.scores[rows])

    def rethreshold(self, threshold: float) -> Duplicates:
        """Return the result without the rows whose score does not exceed a higher threshold, which stay.

        Nothing is compared again: rows that stay now are not compared with each other, as they would
        be by `deduplicate` with that threshold.

        :raises ValueError: for a threshold lower than that of this result.
        """
        if threshold < self.threshold:
            raise ValueError(
                f"threshold must be from {self.threshold}, that of this result, to 1, got {threshold}; "
                "a lower one needs deduplicate"
            )
        rows = np.arange(len(self.first))
        kept = (self.first == rows) | ~(self.scores > np.float32(below_one(threshold)))
        return Duplicates(
            np.flatnonzero(kept),
            np.where(kept, rows, self.first),
            np.where(kept, np.float32(1), self.scores),
            threshold,
            np.where(kept, -1, self.reference),
        )


def deduplicate(
    vectors: npt.ArrayLike,
    threshold: float = 0.95,
    *,
    texts: Sequence[str] | None = None,
    drop_unseen: bool = False,
    reference: npt.ArrayLike | None = None,
    max_memory: int | None = None,
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
    :param reference: (m, dim), a set that comes first, such as the test set for which rows are to be
        trained on: rows similar to one of it are dropped, and its own are not compared with each other.
    :param max_memory: as for `similarity_matrix`.
    :raises ValueError: as `similarity_matrix`, or if there are not as many texts as vectors.
    """
    size = MemoryBudget(max_memory).vector_bytes
    greedy = _Greedy(UnitRows(vectors, size), below_one(threshold))
    first, scores, excluded = greedy.first, greedy.scores, greedy.reference
    rows = np.arange(len(first))
    equal, twin = (rows, rows) if texts is None else first_equal(greedy.units, texts)
    compared, repeated = np.flatnonzero(equal == rows), np.flatnonzero(equal != rows)
    if reference is not None:
        others = UnitRows(reference, size)
        check_dims(greedy.units.dim, others.dim)
        compared = greedy.drop(compared, others, np.arange(others.rows))
    greedy.decide(compared)
    # The other rows of equal vectors share the fate of the first.
    own = equal if drop_unseen else twin
    first[repeated] = np.where(first[equal] == equal, own, first[equal])[repeated]
    scores[repeated], excluded[repeated] = scores[equal[repeated]], excluded[equal[repeated]]
    return Duplicates(np.flatnonzero(first == rows), first, scores, threshold, excluded)


class _Greedy:
    """The decisions of `deduplicate`, so far."""

    def __init__(self, units: UnitRows, threshold: float) -> None:
        self.units = units
        self.first = np.arange(units.rows)
        self.scores = np.ones(units.rows, np.float32)
        self.reference = np.full(units.rows, -1)
        self._threshold = threshold

    def decide(self, rows: Int64) -> Int64:
        """Decide on rows that resemble none before them, and return those that are kept."""
        if len(rows) > CHUNK_ROWS:
            # By halves, each row is copied and normalized once for each doubling of the rows.
            half = CHUNK_ROWS * -(-len(rows) // (2 * CHUNK_ROWS))
            kept = self.decide(rows[:half])
            return np.concatenate([kept, self.decide(self.drop(rows[half:], self.units, kept))])
        subset = RowSubset(self.units, rows)
        pairs = AllPairs(subset, subset, TILE_BYTES).above(self._threshold, upper=True)
        matrix = build_matrix(pairs, len(rows))
        for row in np.flatnonzero(np.diff(matrix.indptr)):
            if self.first[rows[row]] == rows[row]:
                entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
                similar = rows[matrix.indices[entries]]
                undecided = self.first[similar] == similar
                self.first[similar[undecided]] = rows[row]
                self.scores[similar[undecided]] = matrix.data[entries][undecided]
        return rows[self.first[rows] == rows]

    def drop(self, rows: Int64, others: UnitRows, kept: Int64) -> Int64:
        """Drop the rows that are similar to kept rows of `others`, and return the rest."""
        if not len(kept):
            return rows
        subsets = RowSubset(self.units, rows), RowSubset(others, kept)
        start = 0
        for pairs in AllPairs(*subsets, TILE_BYTES).above(self._threshold, upper=False):
            chunk = rows[start : start + len(pairs.counts)]
            start += len(chunk)
            found = pairs.counts > 0
            earliest = (np.cumsum(pairs.counts) - pairs.counts)[found]  # columns are sorted
            keepers = kept[pairs.columns[earliest]]
            self.scores[chunk[found]] = pairs.scores[earliest]
            if others is self.units:
                self.first[chunk[found]] = keepers
            else:
                self.first[chunk[found]], self.reference[chunk[found]] = -1, keepers
        return rows[self.first[rows] == rows]


def unseen_rows(vectors: npt.ArrayLike, texts: Sequence[str]) -> Int64:
    """Return the rows whose vector equals that of an earlier row although their text differs.

    A model sees neither what lies beyond its maximum length nor words of unknown tokens, and nothing in
    an empty text. Differences of case, accents, spaces and invisible characters do not count.

    :param vectors: (n, dim).
    :param texts: their n texts; an empty one differs from all others.
    :raises ValueError: as `similarity_matrix`, or if there are not as many texts as vectors.
    """
    equal, twin = first_equal(UnitRows(vectors), texts)
    rows = np.arange(len(equal))
    return np.flatnonzero((equal != rows) & (twin == rows))


def first_equal(units: UnitRows, texts: Sequence[str]) -> tuple[Int64, Int64]:
    """Return for each row the first row of an equal vector, and the first that has its text as well."""
    if len(texts) != units.rows:
        raise ValueError(f"got {len(texts):,} texts for {units.rows:,} vectors")
    seen: dict[bytes, int] = {}
    rows = (row for tile in units.tiles() for row in units.load(tile))
    digests = (hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    equal = np.array([seen.setdefault(d, row) for row, d in enumerate(digests)], np.int64)
    twin = np.arange(units.rows)
    known: dict[tuple[int, str], int] = {}
    for row in np.flatnonzero(np.bincount(equal, minlength=units.rows)[equal] > 1).tolist():
        if text := _visible(texts[row]):
            twin[row] = known.setdefault((int(equal[row]), text), row)
    return equal, twin


def _visible(text: str) -> str:
    """Return a text without case, accents, spaces and invisible characters."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(
        c for c in decomposed if c.isprintable() and c != " " and not unicodedata.combining(c)
    )


def below_one(threshold: float) -> float:
    """Check a threshold, and let 1 include the scores that are 1, above which there is none."""
    check_threshold(threshold)
    return min(float(threshold), float(np.nextafter(np.float32(1), np.float32(0))))


def rows_by_label(labels: npt.NDArray[Any]) -> list[Int64]:
    """Return the rows of each label, in order, by rising label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, starts) if len(order) else []
