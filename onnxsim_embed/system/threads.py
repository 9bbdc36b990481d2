"""Thread limits of BLAS and Rayon, and row chunks processed by a thread pool."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from threading import Lock, Thread
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from onnxsim_embed.system.hardware import available_cpus

T = TypeVar("T")
R = TypeVar("R")

# int8 matrix products repack the right-hand side for each chunk; 1,024 rows make that cheap.
CHUNK_ROWS = 1024

# For few rows or many processors: enough for matrix products at nearly full speed.
MIN_CHUNK_ROWS = 256

# Chunks per processor, so that none idles long at the end.
CHUNKS_PER_CPU = 8


_lock = Lock()
_blas_users = 0
_outer_limits: list[int | None] = []


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread while at least one user is inside; the last one restores the limit.

    The limit belongs to the process: users that set and restored it on their own would restore each
    other's. It must not be held across a `yield`, after which its user may never return.
    """
    _count_blas_user(1)
    try:
        yield
    finally:
        _count_blas_user(-1)


def _count_blas_user(change: int) -> None:
    global _blas_users, _outer_limits
    with _lock:
        first, _blas_users = _blas_users == 0, _blas_users + change
        if not first and _blas_users:
            return
        libraries = _blas_libraries()
        if first:
            _outer_limits = [library.num_threads for library in libraries]
        limits = [1] * len(libraries) if first else _outer_limits
        # threadpoolctl gives the control of OpenBLAS to the first thread that sets a limit, until it
        # ends; the last user is often another thread than the first.
        pairs = zip(libraries, limits, strict=True)
        thread = Thread(target=lambda: [library.set_num_threads(limit) for library, limit in pairs])
        thread.start()
        thread.join()


@cache  # finding the libraries takes milliseconds; numpy's is loaded before the first call
def _blas_libraries() -> list[Any]:
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def limit_rayon_threads() -> None:
    """Make Rayon, which tokenizers uses, start as many threads as this process may use.

    It reads the variable once, at the first batch; its own count ignores some quotas.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(available_cpus()))


def row_chunks(stop: int, height: int, start: int = 0) -> list[slice]:
    """Split rows into chunks of at most `height` rows."""
    return [slice(first, min(first + height, stop)) for first in range(start, stop, height)]


def chunk_height(rows: int) -> int:
    """Return the rows of a chunk such that every processor gets several chunks."""
    return min(CHUNK_ROWS, max(MIN_CHUNK_ROWS, rows // (CHUNKS_PER_CPU * available_cpus())))


def map_chunks(
    function: Callable[[T], R], chunks: Iterable[T], workers: int | None = None
) -> Iterator[R]:
    """Yield `function(chunk)` for each chunk, in order, from `workers` threads; None: one per processor.

    Each has one BLAS thread: those that share processors with anything else wait for each other (a
    factorization here took 5 s on two threads, 0.15 s on one).
    """

    def call(chunk: T) -> R:
        with single_blas_thread():
            return function(chunk)

    cpus = available_cpus()
    workers = min(workers or cpus, cpus)
    if workers == 1:
        yield from map(call, chunks)
        return
    remaining = iter(chunks)
    first = list(islice(remaining, workers + 1))
    if len(first) <= 1:
        yield from map(call, first)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(call, chunk) for chunk in first]
        del first
        try:
            while futures:  # few at a time: results wait in order, and memory is bounded
                yield futures.pop(0).result()
                futures += [pool.submit(call, chunk) for chunk in islice(remaining, 1)]
        finally:
            for future in futures:
                future.cancel()
