"""Sparse matrices of scores from the pairs that strips found."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.similarity.scoring import RowPairs

Float32 = npt.NDArray[np.float32]


def build_matrix(parts: Iterable[RowPairs], columns: int) -> sparse.csr_array:
    """Build the canonical matrix whose rows are those of the strips, one after the other.

    :param columns: the matrix's width.
    """
    index = np.int32 if columns <= np.iinfo(np.int32).max else np.int64
    counts, places, scores = [np.zeros(1, np.int64)], [], []
    for part in parts:
        counts.append(part.counts)
        places.append(part.columns.astype(index))
        scores.append(part.scores)
    pointers = np.cumsum(np.concatenate(counts))
    if pointers[-1] <= np.iinfo(index).max:
        pointers = pointers.astype(index)
    else:
        index = np.int64
    return sparse.csr_array(
        (
            np.concatenate([*scores, np.zeros(0, np.float32)]),
            np.concatenate([*places, np.zeros(0, index)]).astype(index, copy=False),
            pointers,
        ),
        shape=(len(pointers) - 1, columns),
    )


def matrix_pairs(matrix: sparse.csr_array) -> RowPairs:
    """Return the entries of a matrix as pairs, row by row: what `build_matrix` builds it from."""
    return RowPairs(np.diff(matrix.indptr), matrix.indices.astype(np.int64), matrix.data)


def symmetric_matrix(above: sparse.csr_array, diagonal: Float32) -> sparse.csr_array:
    """Build the canonical matrix of a set with itself from what lies above its diagonal.

    Not by adding matrices: scipy drops scores of zero then, which a threshold below zero keeps.

    :param above: (n, n), columns beyond rows only.
    :param diagonal: float32 array (n,); NaN where there is no entry.
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
    # Of each row: what lies below the diagonal, the diagonal, what lies above.
    middle = pointers[:-1] + np.diff(below.indptr)
    indices[middle[held]], data[middle[held]] = held, diagonal[held]
    for part, starts in ((below, pointers[:-1]), (above, middle + ~np.isnan(diagonal))):
        shift = np.subtract(starts, part.indptr[:-1]).astype(index)
        places = np.arange(part.nnz, dtype=index) + np.repeat(shift, np.diff(part.indptr))
        indices[places], data[places] = part.indices, part.data
    return sparse.csr_array((data, indices, pointers), shape=(size, size))
