"""Thread limits have one owner that counts its users; chunks are computed in order."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnxsim_embed.system import threads
from onnxsim_embed.system.threads import (
    CHUNK_ROWS,
    MIN_CHUNK_ROWS,
    chunk_height,
    map_chunks,
    row_chunks,
    single_blas_thread,
)


def blas_threads():
    return sorted(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")


@pytest.fixture
def before(monkeypatch):
    """BLAS with three threads, on a machine of three processors; the number that calls must restore."""
    monkeypatch.setattr(threads, "available_cpus", lambda: 3)
    np.ones((2, 2)) @ np.ones((2, 2))
    with ThreadPoolExecutor(1) as pool:  # of a thread that ends, which gives up the control
        limits = pool.submit(threadpool_limits, 3, "blas").result()
    yield blas_threads()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(limits.restore_original_limits).result()


def test_overlapping_users_share_one_limit(before):
    entered, leave = threading.Event(), threading.Event()

    def user():
        with single_blas_thread():
            entered.set()
            assert leave.wait(60)

    thread = threading.Thread(target=user)
    with single_blas_thread():
        thread.start()
        assert entered.wait(60)
        assert set(blas_threads()) == {1}
    assert set(blas_threads()) == {1}  # the other one is still inside
    leave.set()
    thread.join()
    assert blas_threads() == before


@pytest.mark.parametrize("cpus", [1, 3])
def test_no_limit_is_held_across_a_yield(before, monkeypatch, cpus):
    monkeypatch.setattr(threads, "available_cpus", lambda: cpus)
    first, second = (map_chunks(lambda chunk: blas_threads(), row_chunks(8, 2)) for _ in range(2))
    assert set(next(first)) == set(next(second)) == {1}
    if cpus == 1:
        assert blas_threads() == before  # while both are suspended
    first.close()
    second.close()
    assert blas_threads() == before


def test_a_failure_restores_the_limit(before):
    with pytest.raises(ZeroDivisionError):
        list(map_chunks(lambda chunk: 1 // 0, row_chunks(9, 2)))
    assert blas_threads() == before


@pytest.mark.parametrize("cpus", [1, 3])
def test_chunks_are_computed_in_order(monkeypatch, cpus):
    monkeypatch.setattr(threads, "available_cpus", lambda: cpus)
    chunks = row_chunks(23, 5)
    assert [chunk.stop - chunk.start for chunk in chunks] == [5, 5, 5, 5, 3]
    assert list(map_chunks(lambda chunk: chunk.start, chunks)) == [0, 5, 10, 15, 20]
    assert list(map_chunks(lambda chunk: chunk, [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_few_chunks_are_taken_at_a_time(monkeypatch, workers):
    monkeypatch.setattr(threads, "available_cpus", lambda: 8)
    taken = []
    chunks = (taken.append(number) or number for number in range(9))
    for number in map_chunks(lambda chunk: chunk, chunks, workers):
        assert len(taken) <= number + workers + 1
    assert taken == list(range(9))


@pytest.mark.parametrize(
    ("rows", "height"), [(10, MIN_CHUNK_ROWS), (12_000, 500), (10**7, CHUNK_ROWS)]
)
def test_chunk_height_keeps_all_processors_busy(monkeypatch, rows, height):
    monkeypatch.setattr(threads, "available_cpus", lambda: 3)
    assert chunk_height(rows) == height
