"""What a comparison takes is known before, and what does not fit is refused before memory is gone."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
from test_compare import clustered_vectors

from onnxsim_embed import estimate_similarity
from onnxsim_embed.similarity import memory as budget
from onnxsim_embed.similarity.compare import neighbours, similar_pairs, similarity_matrix, top_k
from onnxsim_embed.similarity.memory import (
    COMPONENT_BYTES,
    SAMPLE_ROWS,
    Estimate,
    MemoryBudget,
    PairCounter,
    Progress,
)
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.unit_rows import UnitRows

# Much above 0.5: six clusters of 150 rows or so.
DENSE = clustered_vectors(rows=900)
SMALL = clustered_vectors(rows=100)


# the estimate


def test_a_sample_that_is_the_whole_set_says_the_truth():
    other = clustered_vectors(seed=9, rows=40)
    for threshold in (-0.5, 0, 0.5, 1):
        matrix = similarity_matrix(SMALL, threshold)
        found = estimate_similarity(SMALL, threshold)
        assert found.entries == matrix.nnz
        assert found.result_bytes == 8 * matrix.nnz
        assert found.peak_bytes == 24 * matrix.nnz + SMALL.size * COMPONENT_BYTES
        assert found.seconds > 0
        rectangle = similarity_matrix(SMALL, threshold, other=other).nnz
        assert estimate_similarity(SMALL, threshold, other=other).entries == rectangle


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_a_sample_comes_close(threshold):
    assert len(DENSE) > 3 * SAMPLE_ROWS
    truth = similarity_matrix(DENSE, threshold).nnz
    assert estimate_similarity(DENSE, threshold).entries == pytest.approx(truth, rel=0.15)


def test_the_sample_is_the_same_every_time_and_in_panels(monkeypatch):
    first = estimate_similarity(DENSE, 0.4).entries
    assert estimate_similarity(DENSE, 0.4).entries == first
    monkeypatch.setattr(budget, "available_memory", lambda: 10_000)
    assert estimate_similarity(DENSE, 0.4).entries == first


def test_sets_without_rows_take_nothing():
    none = SMALL[:0]
    for left, right in ((none, None), (none, SMALL), (SMALL, none)):
        assert estimate_similarity(left, other=right)[:2] == (0, 0)


def test_the_best_of_each_row_take_what_they_take(monkeypatch):
    estimate = estimate_similarity(DENSE, k=5)
    made = neighbours(DENSE, 5)
    assert estimate.entries == made.scores.size
    assert estimate.result_bytes == made.scores.nbytes + made.indices.nbytes
    assert estimate.peak_bytes > estimate.result_bytes
    assert estimate.seconds > 0
    assert estimate_similarity(SMALL, other=DENSE, k=2).entries == 2 * len(SMALL)
    monkeypatch.setattr(budget, "available_memory", lambda: 10_000)
    assert estimate_similarity(DENSE, k=5).entries == estimate.entries
    with pytest.raises(ValueError, match=f"k must be from 1 to {len(DENSE) - 1} "):
        estimate_similarity(DENSE, k=len(DENSE))


def test_an_estimate_reads_well():
    estimate = Estimate(1_234_567, 9_876_543, 1_234_567_890, 431.0)
    assert str(estimate) == "about 1,200,000 scores, 9.88 MB (1.23 GB at the peak), 7 min"
    exact = Estimate(30, 360, 720, 0.5, exact=True)
    assert str(exact) == "30 scores, 360 bytes (720 bytes at the peak), 0.5 s"


def test_an_estimate_checks_what_it_is_given():
    with pytest.raises(ValueError, match="threshold must be from -1 to 1, got 2"):
        estimate_similarity(SMALL, 2)
    with pytest.raises(ValueError, match="different dimensions: 24 and 3"):
        estimate_similarity(SMALL, other=np.ones((4, 3)))


def test_a_row_of_the_sample_that_is_not_finite_is_named_by_its_place_in_the_set(monkeypatch):
    vectors = DENSE.copy()
    vectors[[401, 777]] = np.nan
    for memory in (None, 10_000):
        monkeypatch.setattr(budget, "available_memory", lambda memory=memory: memory)
        with pytest.raises(ValueError, match=r"first in row 401$"):
            estimate_similarity(vectors)


# what does not fit


def calls(vectors, **options):
    return [
        lambda: similarity_matrix(vectors, -1, **options),
        lambda: similarity_matrix(vectors, -1, other=vectors, **options),
        lambda: similar_pairs(vectors, -1, **options),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_sample_that_shows_it_refuses_early(monkeypatch, number):
    monkeypatch.setattr(budget, "SMALL", 1)
    monkeypatch.setattr(AllPairs, "above", lambda *args, **options: pytest.fail("it began"))
    with pytest.raises(MemoryError) as caught:
        calls(DENSE, max_memory=2_000_000)[number]()
    message = str(caught.value)
    assert message.startswith("above -1 there would be about 810,000 scores, 6.48 MB (19.")
    assert "; max_memory has room for 7" in message
    for advice in ("raise the threshold", "top_k, --top-k", "write_graph", "-o DIRECTORY"):
        assert advice in message
    assert "\n" not in message


@pytest.mark.parametrize("number", range(3))
def test_what_no_sample_shows_is_refused_when_it_is_found(number):
    with pytest.raises(MemoryError) as caught:
        calls(DENSE, max_memory=2_000_000)[number]()
    message = str(caught.value)
    assert message.startswith("more than ")
    for advice in ("above -1", "raise the threshold", "top_k", "write_graph"):
        assert advice in message


def test_a_result_that_just_fits_is_not_refused(monkeypatch):
    monkeypatch.setattr(budget, "SMALL", 1)
    nnz = similarity_matrix(SMALL, 0).nnz
    most = 24 * (nnz + 2) + SMALL.size * COMPONENT_BYTES
    assert similarity_matrix(SMALL, 0, max_memory=most).nnz == nnz
    with pytest.raises(MemoryError):
        similarity_matrix(SMALL, 0, max_memory=most - 200 * 24)


@pytest.mark.parametrize("room", [20_000_000, 600_000])
def test_refusal_comes_before_the_memory_is_gone(room):
    """Also where a tile's strips are whole only after all columns have been read."""
    vectors = np.tile(DENSE, (2, 8))
    tracemalloc.start()
    try:
        with pytest.raises(MemoryError, match="more than"):
            similarity_matrix(vectors, -1, max_memory=room, block_bytes=1 << 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    strips = 10_000_000  # what threads are at
    assert peak < room + strips < 1800 * 1800 * 12


@pytest.mark.parametrize(
    "call",
    [
        lambda **options: similarity_matrix(DENSE, 0.3, **options),
        lambda **options: similarity_matrix(DENSE, 0.3, other=DENSE, **options),
        lambda **options: similar_pairs(DENSE, 0.3, **options),
        lambda **options: neighbours(DENSE, 150, **options),
    ],
    ids=["matrix", "rectangle", "pairs", "neighbours"],
)
def test_the_peak_is_no_more_than_what_was_allowed(call):
    """The least that is accepted is what it takes, but for the strips that threads are at."""
    low, high = 100_000, 40_000_000
    while high - low > 400_000:  # the least
        middle = (low + high) // 2
        try:
            call(max_memory=middle)
        except MemoryError:
            low = middle
        else:
            high = middle
    tracemalloc.start()
    try:
        call(max_memory=high, block_bytes=1 << 14)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < high + 1_500_000


def test_more_neighbours_than_fit_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(AllPairs, "top_k", lambda *args, **options: pytest.fail("it began"))
    for call in (
        lambda: neighbours(DENSE, 400, max_memory=1_000_000),
        lambda: top_k(DENSE, DENSE, 400, max_memory=1_000_000),
    ):
        with pytest.raises(MemoryError, match=r"400 best of 900 rows take 8\.64 MB, more than"):
            call()


@pytest.mark.parametrize("max_memory", [0, -1, -0.5, float("inf"), float("nan")])
def test_no_memory_is_refused(max_memory):
    for call in calls(SMALL, max_memory=max_memory):
        with pytest.raises(ValueError, match=f"max_memory must be positive, got {max_memory}"):
            call()
    with pytest.raises(ValueError, match="max_memory must be positive"):
        neighbours(SMALL, max_memory=max_memory)


@pytest.mark.parametrize("max_memory", ["4GB", [1], 1j])
def test_what_is_no_number_of_bytes_is_refused(max_memory):
    with pytest.raises(TypeError, match="max_memory must be a number of bytes, got "):
        similarity_matrix(SMALL, max_memory=max_memory)


@pytest.mark.parametrize("max_memory", [4e9, np.int32(100_000_000), np.float32(1e9)])
def test_any_number_of_bytes_will_do(max_memory):
    assert MemoryBudget(max_memory).max_bytes == int(max_memory)
    assert similarity_matrix(SMALL, max_memory=max_memory).nnz > 0


def test_by_default_three_quarters_of_what_is_free_are_used(monkeypatch):
    monkeypatch.setattr(budget, "available_memory", lambda: 1000)
    assert (MemoryBudget(None).max_bytes, MemoryBudget(None).vector_bytes) == (750, 375)
    with pytest.raises(MemoryError, match="max_memory"):
        similarity_matrix(SMALL, 0)
    monkeypatch.setattr(budget, "available_memory", lambda: None)  # it is not known
    assert MemoryBudget(None).max_bytes is None
    assert similarity_matrix(SMALL, 0).nnz > 0
    assert neighbours(SMALL, 3).indices.shape == (100, 3)


def test_rows_of_a_part_are_what_fits():
    units = UnitRows(SMALL)
    loaded = SMALL.size * COMPONENT_BYTES
    entries = similarity_matrix(SMALL, 0).nnz
    for rows in (1, 10, 100):
        room = 2 * 24 * entries * rows // 100
        assert MemoryBudget(loaded + room + 50).max_rows(units, 0, None) == rows
        assert MemoryBudget(loaded + 2 * 48 * 5 * rows).max_rows(units, None, 5) == rows
    assert MemoryBudget(1 << 40).max_rows(units, 0, None) == 100
    assert MemoryBudget(loaded).max_rows(units, 0, None) == 0


def test_a_limit_counts_all_pairs():
    part = next(iter_parts(SMALL))
    limit = PairCounter(2 * len(part.scores), 0.5, "do something else")
    limit(part)
    limit(part)
    with pytest.raises(MemoryError, match=r"score above 0\.5, .*; do something else$"):
        limit(part)


def iter_parts(vectors):
    units = UnitRows(vectors)
    return AllPairs(units, units, 1 << 20).above(0, upper=False)


# progress


def test_progress_counts_the_pairs_of_all_rows(capsys):
    for upper, total in ((True, "4.05k"), (False, "8.10k")):
        with Progress(90, True, upper) as progress:
            for part in iter_parts(DENSE[:80]):
                assert progress.count(part) is part
            progress.move(20)  # some are done again
            progress.add(70)
        shown = capsys.readouterr().err
        assert f"{total}/{total}" in shown
        assert "100%" in shown


@pytest.mark.parametrize("rows", [17, 900])
def test_every_function_shows_its_progress_on_request(capsys, rows):
    room = 100_000_000 if rows == 900 else 4 * rows * COMPONENT_BYTES * 24
    vectors = DENSE if rows == 900 else np.concatenate([np.eye(24), -np.eye(24)])
    for call in (
        lambda shown: similarity_matrix(vectors, 0.9, max_memory=room, show_progress_bar=shown),
        lambda shown: similar_pairs(vectors, 0.9, max_memory=room, show_progress_bar=shown),
        lambda shown: neighbours(vectors, 2, max_memory=room, show_progress_bar=shown),
        lambda shown: top_k(vectors, vectors, 2, max_memory=room, show_progress_bar=shown),
    ):
        call(False)
        assert capsys.readouterr() == ("", "")
        call(True)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("\rComparing: ")
        assert err.rstrip().splitlines()[-1].split("\r")[-1].startswith("Comparing: 100%")


def test_a_bar_of_no_rows_is_no_failure(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        similarity_matrix(SMALL[:0], show_progress_bar=True)
    capsys.readouterr()
