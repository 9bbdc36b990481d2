"""Canonical sparse matrices of scores from pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.similarity.selection import RowPairs
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.threads import map_chunks

WRITERS = 2  # threads that fill a matrix: each holds a part of its entries beside it


def build_matrix(chunks: Iterable[RowPairs], columns: int) -> sparse.csr_array:
    """Build the canonical matrix of consecutive row chunks."""
    none = RowPairs(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    pairs = _joined([none, *(_compact(pairs, columns) for pairs in chunks)])
    pointers = np.concatenate([[0], pairs.counts.cumsum()])
    index = _index_type(max(columns, pointers[-1]))
    indices, pointers = pairs.columns.astype(index, copy=False), pointers.astype(index, copy=False)
    return sparse.csr_array((pairs.scores, indices, pointers), shape=(len(pointers) - 1, columns))


def matrix_pairs(matrix: sparse.csr_array) -> RowPairs:
    """Return the entries of a matrix as pairs; the inverse of `build_matrix`."""
    return RowPairs(np.diff(matrix.indptr), matrix.indices.astype(np.int64), matrix.data)


def symmetric_matrix(chunks: Iterable[RowPairs], diagonal: Float32) -> sparse.csr_array:
    """Build the canonical matrix of a set with itself from consecutive chunks of its upper triangle.

    Each entry is written where it belongs, unsorted: those of a row below the diagonal are the columns
    of the rows before, in order.

    :param diagonal: float32 (rows,), NaN where there is no entry.
    """
    rows, held = len(diagonal), ~np.isnan(diagonal)
    parts = list(_grouped((_compact(pairs, rows) for pairs in chunks), rows))
    counts = held.astype(np.int64)
    first = 0
    for pairs in parts:
        counts[first : first + len(pairs.counts)] += pairs.counts
        counts += np.bincount(pairs.columns, minlength=rows)
        first += len(pairs.counts)
    pointers = np.concatenate([[0], counts.cumsum()])
    index = _index_type(max(rows, pointers[-1]))
    indices, scores = np.empty(pointers[-1], index), np.empty(pointers[-1], np.float32)
    following = pointers[:-1].copy()  # where the next entry of each row goes

    def put(starts: Int64, counts: Int64, columns: npt.NDArray[Any], values: Float32) -> None:
        places = np.repeat(starts - (counts.cumsum() - counts), counts)
        places += np.arange(len(values))
        indices[places], scores[places] = columns, values

    def placed() -> Iterator[tuple[slice, RowPairs, Int64]]:
        first = 0
        while parts:
            pairs = parts.pop()  # its memory is free again when it has been written
            part = slice(first, first + len(pairs.counts))
            yield part, pairs, following[first:].copy()
            following[:] += np.bincount(pairs.columns, minlength=rows)
            first = part.stop

    def write(each: tuple[slice, RowPairs, Int64]) -> None:
        part, pairs, starts = each
        rising = np.concatenate([[0], pairs.counts.cumsum()]).astype(index)
        shape = (len(pairs.counts), rows)
        mirrored = sparse.csr_array((pairs.scores, pairs.columns, rising), shape=shape).tocsc()
        counts = np.diff(mirrored.indptr)[part.start :]  # no column is before its row
        put(starts, counts, mirrored.indices + part.start, mirrored.data)
        own = np.flatnonzero(held[part]) + part.start
        ends = (starts + counts)[: len(pairs.counts)]
        put(ends, held[part].astype(np.int64), own, diagonal[own])
        put(ends + held[part], pairs.counts, pairs.columns, pairs.scores)

    parts.reverse()
    for _ in map_chunks(write, placed(), WRITERS):
        pass
    return sparse.csr_array((scores, indices, pointers.astype(index)), shape=(rows, rows))


def _grouped(chunks: Iterable[RowPairs], size: int) -> Iterator[RowPairs]:
    """Yield consecutive chunks joined, such that each but the last has at least `size` pairs."""
    pending: list[RowPairs] = []
    for chunk in chunks:
        pending.append(chunk)
        if sum(len(pairs.scores) for pairs in pending) >= size:
            yield _joined(pending)
            pending = []
    if pending:
        yield _joined(pending)


def _joined(parts: list[RowPairs]) -> RowPairs:
    return parts[0] if len(parts) == 1 else RowPairs(*map(np.concatenate, zip(*parts, strict=True)))


def _compact(pairs: RowPairs, columns: int) -> RowPairs:
    return pairs._replace(columns=pairs.columns.astype(_index_type(columns), copy=False))


def _index_type(largest: int) -> type[np.signedinteger[Any]]:
    return np.int32 if largest <= np.iinfo(np.int32).max else np.int64
