"""Canonical sparse matrices of scores from pairs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import sparse

from onnxsim_embed.similarity.selection import Float32, RowPairs


def build_matrix(chunks: Iterable[RowPairs], columns: int) -> sparse.csr_array:
    """Build the canonical matrix of consecutive row chunks."""
    index = np.int32 if columns <= np.iinfo(np.int32).max else np.int64
    counts, indices, scores = [np.zeros(1, np.int64)], [], []
    for pairs in chunks:
        counts.append(pairs.counts)
        indices.append(pairs.columns.astype(index))
        scores.append(pairs.scores)
    pointers = np.cumsum(np.concatenate(counts))
    if pointers[-1] <= np.iinfo(index).max:
        pointers = pointers.astype(index)
    else:
        index = np.int64
    return sparse.csr_array(
        (
            np.concatenate([*scores, np.zeros(0, np.float32)]),
            np.concatenate([*indices, np.zeros(0, index)]).astype(index, copy=False),
            pointers,
        ),
        shape=(len(pointers) - 1, columns),
    )


def matrix_pairs(matrix: sparse.csr_array) -> RowPairs:
    """Return the entries of a matrix as pairs; the inverse of `build_matrix`."""
    return RowPairs(np.diff(matrix.indptr), matrix.indices.astype(np.int64), matrix.data)


def symmetric_matrix(above: sparse.csr_array, diagonal: Float32) -> sparse.csr_array:
    """Build the canonical matrix of a set with itself from its upper triangle.

    Not by adding matrices: scipy drops scores of zero then, which a threshold below zero keeps. The
    diagonal is NaN where there is no entry.
    """
    size = len(diagonal)
    held = np.flatnonzero(~np.isnan(diagonal))
    total = 2 * above.nnz + len(held)
    index = np.int32 if max(size, total) <= np.iinfo(np.int32).max else np.int64
    below = above.T.tocsr()  # sorted, as `above` is
    counts = np.diff(below.indptr) + np.diff(above.indptr) + ~np.isnan(diagonal)
    pointers = np.zeros(size + 1, index)
    np.cumsum(counts, out=pointers[1:])
    indices, data = np.empty(total, index), np.empty(total, np.float32)
    # Each row: entries below the diagonal, the diagonal, entries above it.
    middle = pointers[:-1] + np.diff(below.indptr)
    indices[middle[held]], data[middle[held]] = held, diagonal[held]
    for triangle, starts in ((below, pointers[:-1]), (above, middle + ~np.isnan(diagonal))):
        shift = np.subtract(starts, triangle.indptr[:-1]).astype(index)
        positions = np.arange(triangle.nnz, dtype=index) + np.repeat(
            shift, np.diff(triangle.indptr)
        )
        indices[positions], data[positions] = triangle.indices, triangle.data
    return sparse.csr_array((data, indices, pointers), shape=(size, size))
