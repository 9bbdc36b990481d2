"""Strips of rows, worked on side by side by threads that use one BLAS thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from threadpoolctl import threadpool_limits

from onnxsim_embed.system.hardware import available_cpus

T = TypeVar("T")

# Rows of a strip: matrix products in int8 pack the other side anew for each, which 1,024 rows make cheap.
CHUNK_ROWS = 1024

# Where there are few rows or many processors: enough for products at nearly full speed.
MIN_CHUNK_ROWS = 256

# Strips for each processor, so that none waits long for the last.
CHUNKS_PER_CPU = 8


def row_chunks(rows: int, height: int = CHUNK_ROWS) -> list[slice]:
    """Cut rows into strips."""
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def chunk_height(rows: int) -> int:
    """Return how many rows a strip should have, so that every processor has several."""
    return min(CHUNK_ROWS, max(MIN_CHUNK_ROWS, rows // (CHUNKS_PER_CPU * available_cpus())))


def map_chunks(function: Callable[[slice], T], parts: list[slice]) -> Iterator[T]:
    """Yield `function` of each strip, in order, computed on as many threads as there are processors."""
    callers = min(available_cpus(), len(parts))
    if callers <= 1:
        with threadpool_limits(1, "blas"):
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
