"""Repeated search of one set: an int8 copy is read for each query, and exact scores decide.

A few queries against many vectors are bound by memory bandwidth: the copy takes one byte per component
where float32 takes four. Its scores have the error bound of `candidates`, so that the rows which may be
in the result are known, and only these are scored exactly from the vectors themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.errors import TableError
from onnxsim_embed.similarity import candidates, selection
from onnxsim_embed.similarity.compare import check_k, check_threshold, similarity_matrix, top_k
from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.similarity.selection import RowPairs, TopK
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import check_vectors, unit_vectors
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import available_cpus, int8_supported
from onnxsim_embed.system.threads import row_chunks

CHUNK_SCORES = 1 << 18  # computed at once: 1 MB stays in a second-level cache during selection
QUERIES = 16  # compared with the copy together: they read no more memory than one
MANY_QUERIES = 512  # from which on `top_k` is faster, although it copies the vectors

# The largest code of a query such that two products of a uint8 and an int8 fit into 16 bits, in which
# x86 processors without VNNI add them.
MAX_CODE_16_BIT = 63


class _Candidates(NamedTuple):
    """Pairs that may be in the result, with bounds of their scores but for the query's error."""

    query: Int64
    row: Int64
    low: Float32
    high: Float32


class VectorIndex:
    """Vectors that are searched repeatedly, with an int8 copy that makes a search read a quarter.

    Results are bitwise those of `top_k` and `similarity_matrix`.

        index = VectorIndex(np.load("vectors.npy", mmap_mode="r"))
        best = index.search(model.encode_query("cold chain"), k=10)

    The vectors are kept by reference, so that a memory-mapped file stays on disk, and must not change.
    The copy takes one byte per component and eight per row. Threads may search concurrently.

    :param vectors: (n, dim), of any norm and number format.
    :raises ValueError: for NaN or infinite values (naming the row), or a shape other than (n, dim).
    """

    def __init__(self, vectors: npt.ArrayLike) -> None:
        self.vectors: npt.NDArray[Any] = np.asarray(vectors)
        check_vectors(self.vectors)
        # Asked once: the answers are read from the system's files, which takes as long as a search.
        self._threads = available_cpus()
        self._max_code = 127 if int8_supported()[0] else MAX_CODE_16_BIT
        self._many = MANY_QUERIES if candidates.onnxruntime_installed() else 0
        self._rows = candidates.QuantizedRows(
            self.vectors.shape,
            lambda chunk: unit_vectors(self.vectors[chunk], first_row=chunk.start),
        )
        self._max_error = float(self._rows.errors.max(initial=0))

    def __repr__(self) -> str:
        return f"VectorIndex({len(self):,} vectors, dim={self.width}, dtype={self.vectors.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a memory-mapped file as its path, and the copy not at all."""
        file = self.vectors.base
        if not (isinstance(file, np.memmap) and isinstance(file.base, mmap) and file.filename):
            return type(self), (self.vectors,)
        layout = (file.dtype, "r", file.offset, file.shape, "C" if file.flags.c_contiguous else "F")
        return _index_file, (Path(file.filename).absolute(), layout)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Dimension of the vectors."""
        return int(self.vectors.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the int8 copy, beside the vectors."""
        return self._rows.codes.nbytes + self._rows.steps.nbytes + self._rows.errors.nbytes

    def search(self, queries: npt.ArrayLike, k: int = 10) -> TopK:
        """Return the k nearest vectors of each query.

        :param queries: (q, dim) or (dim,).
        :param k: at most the number of vectors.
        :returns: arrays (q, k), in descending order of score, ties by lower index.
        :raises ValueError: if k is out of range, or for queries with NaN or another dimension.
        """
        array, unit = self._check_queries(queries)
        k = check_k(k, len(self))
        if len(unit) >= self._many:
            return top_k(array, self.vectors, k)
        groups = [self._top_k(unit[group], k) for group in row_chunks(len(unit), QUERIES)]
        empty = TopK(np.zeros((0, k), np.float32), np.zeros((0, k), np.int64))
        return TopK(*(np.concatenate(arrays) for arrays in zip(empty, *groups, strict=True)))

    def above(self, queries: npt.ArrayLike, threshold: float) -> sparse.csr_array:
        """Return every score of a query with a vector that exceeds a threshold.

        :param queries: (q, dim) or (dim,).
        :param threshold: scores strictly above it are kept; from -1 to 1.
        :returns: float32 csr_array (q, n), sorted indices.
        :raises ValueError: for a threshold outside -1 to 1, and as `search`.
        """
        check_threshold(threshold)
        array, unit = self._check_queries(queries)
        if len(unit) >= self._many:
            return similarity_matrix(array, threshold, other=self.vectors)
        groups = row_chunks(len(unit), QUERIES)
        return build_matrix((self._above(unit[group], threshold) for group in groups), len(self))

    def _check_queries(self, queries: npt.ArrayLike) -> tuple[npt.NDArray[Any], Float32]:
        """Return queries as a 2-D array, and their unit rows."""
        array = np.atleast_2d(np.asarray(queries))
        try:
            unit = unit_vectors(array)
        except ValueError as error:
            raise ValueError(f"queries: {error}") from None
        if unit.shape[1] != self.width:
            raise ValueError(
                f"queries of dimension {unit.shape[1]} do not match vectors of dimension {self.width}; "
                "encode both with the same model"
            )
        return array, unit

    def _above(self, unit: Float32, threshold: float) -> RowPairs:
        """Return the scores of some queries above a threshold."""
        pairs, _ = self._candidates(unit, lambda low, errors: threshold - errors)
        scores = self._exact(unit, pairs)
        above = scores > np.float32(threshold)
        query, row, scores = pairs.query[above], pairs.row[above], scores[above]
        order = np.lexsort((row, query))
        return RowPairs(np.bincount(query, minlength=len(unit)), row[order], scores[order])

    def _top_k(self, unit: Float32, k: int) -> TopK:
        """Return the k nearest rows of some queries."""

        def bound(low: Float32, errors: Float32) -> Float32:
            return _floor(selection.kth_bounds(low, k), errors)

        pairs, errors = self._candidates(unit, bound)
        # Of the candidates of all chunks, only those that may be among the top-k of all.
        low = selection.select_top_k(pairs.query, pairs.row, pairs.low, len(unit), k).scores
        kept = pairs.high >= _floor(low[:, -1:], errors)[pairs.query, 0]
        pairs = _Candidates(*(array[kept] for array in pairs))
        exact = self._exact(unit, pairs)
        return selection.select_top_k(pairs.query, pairs.row, exact, len(unit), k)

    def _candidates(
        self, unit: Float32, bound: Callable[[Float32, Float32], Float32]
    ) -> tuple[_Candidates, Float32]:
        """Return pairs whose upper bounds reach what `bound` makes of lower bounds and query errors."""
        codes, steps, errors = candidates.quantize_rows(unit, self._max_code)
        right = np.ascontiguousarray(codes.T.astype(np.int8))
        added = candidates.added_error(errors, self._max_error, self.width)
        errors = added[:, None].astype(np.float32)

        def select(chunk: slice) -> _Candidates:
            # Threads inside the call, which wake faster than Python's.
            left = self._rows.codes[chunk]
            product = candidates.int8_matmul(left, right, self._threads, os.getpid())
            scores = product.T.astype(np.float32, order="C")
            scores *= self._rows.steps[chunk]
            scores *= steps
            low = scores - self._rows.errors[chunk]
            scores += self._rows.errors[chunk]
            flat = np.flatnonzero(scores >= bound(low, errors))
            query, row = np.divmod(flat, scores.shape[1])
            return _Candidates(query, row + chunk.start, low.ravel()[flat], scores.ravel()[flat])

        chunks = map(select, row_chunks(len(self), CHUNK_SCORES // len(unit)))
        no_rows, no_scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        empty = _Candidates(no_rows, no_rows, no_scores, no_scores)
        gathered = zip(empty, *chunks, strict=True)
        return _Candidates(*(np.concatenate(arrays) for arrays in gathered)), errors

    def _exact(self, unit: Float32, pairs: _Candidates) -> Float32:
        rows, position = np.unique(pairs.row, return_inverse=True)
        # Bitwise the unit rows of the whole set.
        right = unit_vectors(np.ascontiguousarray(self.vectors[rows]))
        return exact_scores(unit, right, pairs.query, position)


def _index_file(path: Path, layout: tuple[Any, ...]) -> VectorIndex:
    """Make the index of a pickle, which holds the path of its vectors."""
    try:
        return VectorIndex(np.memmap(path, *layout))
    except (OSError, ValueError) as error:
        raise TableError(
            f"a pickled VectorIndex holds the path of its vectors, {path}, which cannot be read now "
            f"({error}): make the index from where they are"
        ) from None


def _floor(kth: Float32, errors: Float32) -> Float32:
    """Return the upper bound that any top-k row has if k rows have a lower bound of `kth`; all (q, 1)."""
    # Exact scores are clipped to [-1, 1]: all beyond are equal.
    certain = np.minimum(kth - errors, np.float32(1))
    return np.where(certain > -1, certain - errors, np.float32(-np.inf))
