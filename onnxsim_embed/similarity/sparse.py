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
    """Build the canonical matrix of a set with itself from its upper triangle; NaN is no entry.

    Not by adding matrices: scipy drops scores of zero then, which a threshold below zero keeps.
    """
    held = np.flatnonzero(~np.isnan(diagonal)).astype(above.indices.dtype)
    row = np.repeat(np.arange(len(diagonal), dtype=above.indices.dtype), np.diff(above.indptr))
    # Entries are sorted by row, stably: below the diagonal, on it and above it, each by column.
    rows = np.concatenate([above.indices, held, row])
    columns = np.concatenate([row, held, above.indices])
    del row  # its memory is needed below
    scores = np.concatenate([above.data, diagonal[held], above.data])
    return sparse.csr_array((scores, (rows, columns)), shape=above.shape)
