"""TiledComparison one set again and again: an int8 copy is read for every query, exact scores decide.

A few queries against many vectors are bound by memory: each component is read once and used once or a
few times. The copy has a byte a component where float32 has four. Its scores have a proven error, so the
rows that may be among the best are known, and these few are scored exactly from the vectors themselves.

The bound: a row is y = y' + f and a query x = x' + e (what is kept in int8, and what is lost), both of norm
1, so |x . y - x' . y'| = |x . f + e . y'| <= |f| + |e| (1 + |f|) by Cauchy-Schwarz. |f| is stored for each row;
x' . y' is a product of whole numbers, hence free of error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.similarity.candidates import int8_matmul, quantize_rows, rounding
from onnxsim_embed.similarity.compare import TopK, check_threshold, similarity_matrix, top_k
from onnxsim_embed.similarity.scoring import Bounds, RowPairs, exact_scores, select_top_k
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import check_vectors, unit_vectors
from onnxsim_embed.system.hardware import available_cpus, int8_supported
from onnxsim_embed.system.threads import map_chunks, row_chunks

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Rows turned into int8 at once: 1.5 MB of 384-wide float32 stay in a second-level cache.
BUILD_ROWS = 1024

# Scores computed at once: 1 MB stays in a second-level cache while candidates are taken out of it.
CHUNK_SCORES = 1 << 18

# Queries that go through the copy together: so many cost memory no more than one.
QUERIES = 16

# From so many queries on, `top_k` is faster, though it copies the vectors: it multiplies blocks.
MANY_QUERIES = 512

# The largest whole number of a query: with it, two products of a uint8 and an int8 fit into 16 bits, in
# which x86 processors without VNNI add them.
NARROW = 63


class _Queries(NamedTuple):
    """Queries, ready for the copy.

    :param whole: int8 array (dim, q).
    :param steps: float32 array (q, 1), what one unit of `whole` stands for.
    :param error: float32 array (q, 1), what a scorer score may be off beside what its row lost.
    """

    whole: npt.NDArray[np.int8]
    steps: Float32
    error: Float32


class _Near(NamedTuple):
    """Pairs that may count: query, row, and scorer scores less and plus what the row lost."""

    query: Int64
    row: Int64
    low: Float32
    high: Float32


class VectorIndex:
    """Vectors that are searched often, with an int8 copy that makes a search read a quarter.

    Results are those of `top_k` and `similarity_matrix`, bit for bit.

        index = VectorIndex(np.load("vectors.npy", mmap_mode="r"))
        best = index.search(model.encode_query("cold chain"), k=10)

    The vectors are kept by reference, so a memory-mapped file stays on disk, and must not change. The
    copy takes one byte a component and eight a row. Any number of threads may search at once.

    :param vectors: (n, dim), of any norm and number format.
    :raises ValueError: for NaN or infinite values (naming the row), or a shape other than (n, dim).
    """

    def __init__(self, vectors: npt.ArrayLike) -> None:
        self.vectors: npt.NDArray[Any] = np.asarray(vectors)
        check_vectors(self.vectors)
        rows = len(self.vectors)
        self._whole = np.empty(self.vectors.shape, np.uint8)
        self._steps = np.empty(rows, np.float32)
        self._lost = np.empty(rows, np.float32)
        self._zero = np.array(128, np.uint8)
        # Asked once: the answers are read from the system's files, which takes as long as a search.
        self._threads = available_cpus()
        self._most = 127 if int8_supported()[0] else NARROW
        for _ in map_chunks(self._keep, row_chunks(rows, BUILD_ROWS)):
            pass
        self._most_lost = float(self._lost.max(initial=0))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Components of a vector."""
        return int(self.vectors.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the int8 copy, beside the vectors."""
        return self._whole.nbytes + self._steps.nbytes + self._lost.nbytes

    def search(self, queries: npt.ArrayLike, k: int = 10) -> TopK:
        """Return the k vectors closest to each query.

        :param queries: (q, dim) or (dim,).
        :param k: how many; at most the number of vectors.
        :returns: arrays (q, k), best first, equal scores by lower index.
        :raises ValueError: if k is out of range, or for queries that hold NaN or are of another width.
        """
        array = np.atleast_2d(np.asarray(queries))
        unit = self._unit_queries(array)
        if not 1 <= k <= len(self):
            raise ValueError(
                f"k must be from 1 to {len(self):,} (the number of vectors to choose from), got {k}"
                if len(self)
                else f"there are no vectors to choose {k} from"
            )
        if len(unit) >= MANY_QUERIES:
            return top_k(array, self.vectors, k)
        parts = [self._best(unit[part], k) for part in row_chunks(len(unit), QUERIES)]
        empty = TopK(np.zeros((0, k), np.float32), np.zeros((0, k), np.int64))
        return TopK(*(np.concatenate(found) for found in zip(empty, *parts, strict=True)))

    def above(self, queries: npt.ArrayLike, threshold: float) -> sparse.csr_array:
        """Return every score of a query with a vector that is above a threshold.

        :param queries: (q, dim) or (dim,).
        :param threshold: scores strictly above it are kept; from -1 to 1.
        :returns: float32 csr_array (q, n), sorted indices.
        :raises ValueError: for a threshold outside -1 to 1, and as `search`.
        """
        check_threshold(threshold)
        array = np.atleast_2d(np.asarray(queries))
        unit = self._unit_queries(array)
        if len(unit) >= MANY_QUERIES:
            return similarity_matrix(array, threshold, other=self.vectors)
        groups = row_chunks(len(unit), QUERIES)
        return build_matrix((self._above(unit[part], threshold) for part in groups), len(self))

    def _keep(self, part: slice) -> None:
        """Turn a strip of the vectors into int8."""
        unit = unit_vectors(self.vectors[part], first_row=part.start)
        whole, steps, self._lost[part] = quantize_rows(unit)
        self._whole[part] = whole + 128
        self._steps[part] = steps[:, 0]

    def _unit_queries(self, queries: npt.NDArray[Any]) -> Float32:
        try:
            unit = unit_vectors(queries)
        except ValueError as error:
            raise ValueError(f"queries: {error}") from None
        if unit.shape[1] != self.width:
            raise ValueError(
                f"queries of {unit.shape[1]} components do not fit vectors of {self.width}; "
                "encode both with the same model"
            )
        return unit

    def _ready(self, unit: Float32) -> _Queries:
        """Turn unit vectors of queries into int8."""
        whole, steps, norms = quantize_rows(unit, self._most)
        lost = norms[:, None].astype(np.float64) * (1 + self._most_lost)
        # The norms, the steps, the scorer scores and the exact ones are float32 themselves.
        error = (lost * (1 + 1e-5) + rounding(self.width) + 2e-6).astype(np.float32)
        return _Queries(np.ascontiguousarray(whole.T.astype(np.int8)), steps, error)

    def _above(self, unit: Float32, threshold: float) -> RowPairs:
        """Return the scores of some queries above a threshold."""
        ready = self._ready(unit)
        near = self._near(ready, lambda low: threshold - ready.error)
        scores = self._exact(unit, near)
        above = scores > np.float32(threshold)
        query, row, scores = near.query[above], near.row[above], scores[above]
        order = np.lexsort((row, query))
        return RowPairs(np.bincount(query, minlength=len(unit)), row[order], scores[order])

    def _best(self, unit: Float32, k: int) -> TopK:
        """Return the k best rows of some queries."""
        ready = self._ready(unit)
        near = self._near(ready, lambda low: _floor(_reached(low, k), ready.error))
        # What counts among all strips: the k-th largest of all that strips returned.
        order = np.lexsort((-near.low, near.query))
        counts = np.bincount(near.query, minlength=len(unit))
        kth = near.low[order[np.cumsum(counts) - counts + k - 1]][:, None]
        counting = near.high >= _floor(kth, ready.error)[near.query, 0]
        near = _Near(*(part[counting] for part in near))
        exact = self._exact(unit, near)
        return TopK(*select_top_k(near.query, near.row, exact, len(unit), k))

    def _near(self, ready: _Queries, floor: Callable[[Float32], Float32]) -> _Near:
        """Return the pairs of each strip that reach the floor, which a strip's low scores set."""
        # Threads inside a call, which wake faster than Python's.
        session = int8_matmul(self._threads, os.getpid())

        def take(part: slice) -> _Near:
            feed = {"left": self._whole[part], "right": ready.whole, "zero": self._zero}
            scores: Float32 = session.run(None, feed)[0].T.astype(np.float32, order="C")
            scores *= self._steps[part]
            scores *= ready.steps
            lost = self._lost[part]
            low = scores - lost
            scores += lost
            found = np.flatnonzero(scores >= floor(low))
            query, row = np.divmod(found, scores.shape[1])
            return _Near(query, row + part.start, low.ravel()[found], scores.ravel()[found])

        found = map(take, row_chunks(len(self), CHUNK_SCORES // len(ready.steps)))
        nothing = np.zeros(0, np.int64)
        empty = _Near(nothing, nothing, np.zeros(0, np.float32), np.zeros(0, np.float32))
        return _Near(*(np.concatenate(parts) for parts in zip(empty, *found, strict=True)))

    def _exact(self, unit: Float32, near: _Near) -> Float32:
        rows, place = np.unique(near.row, return_inverse=True)
        # Row by row the same numbers as the unit vectors of the whole set.
        right = unit_vectors(np.ascontiguousarray(self.vectors[rows]))
        return exact_scores(unit, right, near.query, place)


def _reached(low: Float32, k: int) -> Float32:
    """Return for each query a score, (q, 1), that at least k of its rows reach, and few more."""
    bounds = Bounds(len(low), k)
    bounds.add(low)
    return bounds.kth[:, None].astype(np.float32)


def _floor(kth: Float32, error: Float32) -> Float32:
    """Return what rows reach that may be among the k best, where k rows reach `kth`; all (q, 1)."""
    # Exact scores end at -1 and 1, where rounding would pass them: those beyond are equal.
    sure = np.minimum(kth - error, np.float32(1))
    return np.where(sure > -1, sure - error, np.float32(-np.inf))
