"""Blocks of cosine scores, and what is taken out of them. numpy and scipy only.

A block is a strip: some rows of one set against all of the other (or, for one set with itself, against
the rows from the strip's own on). Strips run side by side on threads that use one BLAS thread each:
the product scales as well as with BLAS's own threads, and the comparison scales with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import sparse
from threadpoolctl import threadpool_limits

from onnxsim_embed.machine import available_cpus

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Triples = tuple[Int64, Int64, Float32]
T = TypeVar("T")

# A product's last bits depend on the shape of its block. Scores this close to the k-th best are
# computed again row by row, so that equal vectors tie whatever the blocks.
ROUNDING = np.float32(1e-6)

# Columns of a strip are compared in so many groups' maxima to find a bound for its k best.
GROUP = 64


def strips(rows: int, columns: int, block_bytes: int) -> list[slice]:
    """Cut rows into strips of at most `block_bytes` of float32 scores.

    :raises ValueError: if `block_bytes` is not positive.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be positive, got {block_bytes}")
    height = max(1, block_bytes // (4 * max(1, columns)))
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def map_strips(function: Callable[[slice], T], parts: list[slice]) -> Iterator[T]:
    """Yield `function` of each strip, in order, computed on as many threads as there are processors."""
    callers = min(available_cpus(), len(parts))
    if callers <= 1:
        yield from map(function, parts)
        return
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(callers) as workers:
        rest = iter(parts)
        waiting = [workers.submit(function, part) for part in islice(rest, callers + 1)]
        try:
            while waiting:  # few at a time: results wait in order, and memory is bounded
                yield waiting.pop(0).result()
                waiting += [workers.submit(function, part) for part in islice(rest, 1)]
        finally:
            for job in waiting:
                job.cancel()


def scores_above(
    left: Float32, right: Float32, threshold: float, block_bytes: int, upper: bool
) -> Triples:
    """Return rows, columns and scores above a threshold, in row-major order.

    :param left: float32 unit vectors (n, dim).
    :param right: float32 unit vectors (m, dim).
    :param upper: take only columns beyond the row (left and right are one set).
    """
    bound = np.float32(threshold)

    def take(part: slice) -> Triples:
        first = part.start if upper else 0
        scores = left[part] @ right[first:].T
        np.minimum(scores, np.float32(1), out=scores)  # rounding may pass 1, a cosine never does
        above = scores > bound
        if upper:  # only the strip's own square holds columns that are not beyond the row
            square = above[:, : len(scores)]
            square &= np.triu(np.ones(square.shape, np.bool_), 1)
        counts = np.count_nonzero(above, axis=1)
        found = np.flatnonzero(above)
        rows = np.repeat(np.arange(len(scores)), counts)
        columns = found - rows * scores.shape[1]
        return rows + part.start, columns + first, scores.ravel()[found]

    parts = list(map_strips(take, strips(len(left), len(right), block_bytes)))
    return (
        np.concatenate([part[0] for part in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([part[1] for part in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([part[2] for part in parts] or [np.zeros(0, np.float32)]),
    )


def best_of_strips(
    left: Float32, right: Float32, k: int, block_bytes: int, skip_self: bool
) -> tuple[Float32, Int64]:
    """Return scores and columns of the k best of each row, best first, ties by lower column.

    :param k: from 1 to the number of right vectors (one less with `skip_self`).
    :param skip_self: a row is none of its own best (left and right are one set).
    """
    scores = np.empty((len(left), k), np.float32)
    indices = np.empty((len(left), k), np.int64)

    def take(part: slice) -> None:
        scores[part], indices[part] = _best(left, right, part, k, skip_self)

    for _ in map_strips(take, strips(len(left), len(right), block_bytes)):
        pass
    return scores, indices


def _best(
    left: Float32, right: Float32, part: slice, k: int, skip_self: bool
) -> tuple[Float32, Int64]:
    rough = left[part] @ right.T
    own = np.arange(part.start, part.stop)
    if skip_self:
        rough[own - part.start, own] = -np.inf
    candidates = rough >= (_bound(rough, k) - ROUNDING)[:, None]
    counts = np.count_nonzero(candidates, axis=1)
    rows = np.repeat(np.arange(len(rough)), counts)
    columns = np.flatnonzero(candidates) - rows * rough.shape[1]
    exact = np.einsum("ij,ij->i", left[part][rows], right[columns])
    np.minimum(exact, np.float32(1), out=exact)
    order = np.lexsort((columns, -exact, rows))
    starts = np.cumsum(counts) - counts
    chosen = order[starts[:, None] + np.arange(k)]
    return exact[chosen], columns[chosen]


def _bound(scores: Float32, k: int) -> Float32:
    """Return for each row a bound that at least k of its scores reach, and few more.

    The k-th largest of the maxima of groups of columns is one: k groups hold a score as large. Finding
    it costs one pass at the speed of memory, where a partition of every row costs ten.
    """
    groups = scores.shape[1] // GROUP
    if groups < 4 * k:
        return -np.partition(-scores, k - 1, axis=1)[:, k - 1]
    maxima = scores[:, : groups * GROUP].reshape(len(scores), GROUP, groups).max(axis=1)
    return np.asarray(np.partition(maxima, groups - k, axis=1)[:, groups - k])


def symmetric_matrix(upper: Triples, diagonal: Float32, size: int) -> sparse.csr_array:
    """Build the canonical matrix of a set with itself from what lies above its diagonal.

    Not by adding matrices: scipy drops scores of zero then, which a threshold below zero keeps.

    :param upper: rows, columns and scores, row-major, column beyond row.
    :param diagonal: float32 array (size,); NaN where there is no entry.
    """
    rows, columns, scores = upper
    held = np.flatnonzero(~np.isnan(diagonal))
    total = 2 * len(scores) + len(held)
    index = np.int32 if max(size, total) <= np.iinfo(np.int32).max else np.int64
    above = triples_to_csr(rows, columns, scores, (size, size))
    below = above.T.tocsr()  # sorted, as `above` is
    counts = np.diff(below.indptr) + np.diff(above.indptr) + ~np.isnan(diagonal)
    pointers = np.zeros(size + 1, index)
    np.cumsum(counts, out=pointers[1:])
    indices, data = np.empty(total, index), np.empty(total, np.float32)
    # Of each row: what lies below the diagonal, the diagonal, what lies above.
    middle = pointers[:-1] + np.diff(below.indptr)
    indices[middle[held]], data[middle[held]] = held, diagonal[held]
    for part, starts in ((below, pointers[:-1]), (above, middle + ~np.isnan(diagonal))):
        lengths = np.diff(part.indptr)
        places = np.arange(part.nnz) + np.repeat(np.subtract(starts, part.indptr[:-1]), lengths)
        indices[places], data[places] = part.indices, part.data
    return sparse.csr_array((data, indices, pointers), shape=(size, size))


def triples_to_csr(
    rows: Int64, columns: Int64, scores: Float32, shape: tuple[int, int]
) -> sparse.csr_array:
    """Build a canonical matrix from row-major triples."""
    index = np.int32 if max(*shape, len(scores)) <= np.iinfo(np.int32).max else np.int64
    pointers = np.zeros(shape[0] + 1, index)
    np.cumsum(np.bincount(rows, minlength=shape[0]), out=pointers[1:])
    return sparse.csr_array((scores, columns.astype(index), pointers), shape=shape)
