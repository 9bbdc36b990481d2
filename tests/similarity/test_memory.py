"""The cost of a comparison is estimated, and a result that does not fit is rejected before memory is full."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
from vector_sets import SETS, clustered_vectors

from onnxsim_embed import estimate_similarity
from onnxsim_embed.similarity import memory
from onnxsim_embed.similarity.compare import neighbours, similar_pairs, similarity_matrix, top_k
from onnxsim_embed.similarity.memory import (
    COMPONENT_BYTES,
    PEAK_ENTRY_BYTES,
    SAMPLE_ROWS,
    Estimate,
    MemoryBudget,
    Progress,
    ResultTooLargeError,
    pair_counter,
)
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.unit_rows import UnitRows

DENSE = clustered_vectors(900)  # much above 0.5: six clusters of 150 rows or so
SMALL = clustered_vectors(100)


@pytest.fixture
def little_memory(monkeypatch):
    """So little available memory that all sets are compared tile by tile."""
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)


# the estimate


def test_a_sample_of_the_whole_set_is_exact():
    other = clustered_vectors(40, seed=9)
    for threshold in (-0.5, 0, 0.5, 1):
        nnz = similarity_matrix(SMALL, threshold).nnz
        estimate = estimate_similarity(SMALL, threshold)
        assert (estimate.entries, estimate.result_bytes) == (nnz, 8 * nnz)
        assert estimate.peak_bytes == PEAK_ENTRY_BYTES * nnz + SMALL.size * COMPONENT_BYTES
        assert estimate.seconds > 0
        rectangle = similarity_matrix(SMALL, threshold, other=other).nnz
        assert estimate_similarity(SMALL, threshold, other=other).entries == rectangle


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_a_sample_comes_close(threshold):
    assert len(DENSE) > 3 * SAMPLE_ROWS
    truth = similarity_matrix(DENSE, threshold).nnz
    assert estimate_similarity(DENSE, threshold).entries == pytest.approx(truth, rel=0.15)


def test_the_sample_is_always_the_same_also_in_tiles(request):
    first = estimate_similarity(DENSE, 0.4).entries
    assert estimate_similarity(DENSE, 0.4).entries == first
    request.getfixturevalue("little_memory")
    assert estimate_similarity(DENSE, 0.4).entries == first


def test_empty_sets_cost_nothing():
    none = SMALL[:0]
    for left, right in ((none, None), (none, SMALL), (SMALL, none)):
        assert estimate_similarity(left, other=right)[:2] == (0, 0)


def test_the_size_of_a_top_k_is_exact(request):
    estimate = estimate_similarity(DENSE, k=5)
    top = neighbours(DENSE, 5)
    assert (estimate.entries, estimate.exact) == (top.scores.size, True)
    assert estimate.result_bytes == top.scores.nbytes + top.indices.nbytes
    assert estimate.peak_bytes > estimate.result_bytes
    assert estimate.seconds > 0
    assert estimate_similarity(SMALL, other=DENSE, k=2).entries == 2 * len(SMALL)
    with pytest.raises(ValueError, match=f"from 1 to {len(DENSE) - 1} "):
        estimate_similarity(DENSE, k=len(DENSE))
    request.getfixturevalue("little_memory")
    assert estimate_similarity(DENSE, k=5).entries == estimate.entries


def test_an_estimate_prints_readably():
    estimate = Estimate(1_234_567, 9_876_543, 1_234_567_890, 431.0)
    assert str(estimate) == "about 1,200,000 scores, 9.88 MB (1.23 GB at the peak), 7 min"
    exact = Estimate(30, 360, 720, 0.5, exact=True)
    assert str(exact) == "30 scores, 360 bytes (720 bytes at the peak), 0.5 s"


@pytest.mark.usefixtures("little_memory")
def test_errors_in_a_sampled_row_name_the_row_of_the_set():
    vectors = DENSE.copy()
    vectors[[401, 777]] = np.nan
    with pytest.raises(ValueError, match=r"row 401$"):
        estimate_similarity(vectors)


# results that do not fit


def calls(vectors, **options):
    return [
        lambda: similarity_matrix(vectors, -1, **options),
        lambda: similarity_matrix(vectors, -1, other=vectors, **options),
        lambda: similar_pairs(vectors, -1, **options),
    ]


@pytest.mark.parametrize("sampled", [True, False])
def test_an_error_comes_from_a_sample_before_the_comparison_or_during_it(monkeypatch, sampled):
    if sampled:
        monkeypatch.setattr(memory, "SMALL_COMPARISON", 1)
        monkeypatch.setattr(AllPairs, "above", lambda *args, **options: pytest.fail("it began"))
    for call in calls(DENSE, max_memory=2_000_000):
        with pytest.raises(ResultTooLargeError, match=r"above -1.*write_graph") as caught:
            call()
        assert ("about 810,000 scores, 6.48 MB" in str(caught.value)) == sampled


def test_a_result_that_just_fits_is_computed(monkeypatch):
    monkeypatch.setattr(memory, "SMALL_COMPARISON", 1)
    nnz = similarity_matrix(SMALL, 0).nnz
    required = 7 * PEAK_ENTRY_BYTES * (nnz + 2) // 8 + SMALL.size * COMPONENT_BYTES
    assert similarity_matrix(SMALL, 0, max_memory=required).nnz == nnz
    with pytest.raises(MemoryError):
        similarity_matrix(SMALL, 0, max_memory=required - 200 * PEAK_ENTRY_BYTES)


@pytest.mark.parametrize("room", [20_000_000, 600_000])
def test_the_error_comes_before_memory_is_full(room):
    """Also if a tile's chunks are complete only after all columns have been read."""
    vectors = np.tile(DENSE, (2, 8))
    tracemalloc.start()
    try:
        with pytest.raises(MemoryError):
            similarity_matrix(vectors, -1, max_memory=room, block_bytes=1 << 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    chunks = 10_000_000  # in threads
    assert peak < room + chunks < 1800 * 1800 * 12


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
def test_the_peak_does_not_exceed_max_memory(call):
    """The least accepted max_memory is what it takes, except for the chunks in threads."""
    low, high = 100_000, 40_000_000
    while high - low > 800_000:
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


def test_a_top_k_that_does_not_fit_is_rejected_before_the_comparison(monkeypatch):
    monkeypatch.setattr(AllPairs, "top_k", lambda *args, **options: pytest.fail("it began"))
    for call in (
        lambda: neighbours(DENSE, 400, max_memory=1_000_000),
        lambda: top_k(DENSE, DENSE, 400, max_memory=1_000_000),
    ):
        with pytest.raises(ResultTooLargeError, match=r"8\.64 MB"):
            call()


@pytest.mark.parametrize(
    ("max_memory", "error"),
    [(value, ValueError) for value in (0, -1, -0.5, float("inf"), float("nan"))]
    + [(value, TypeError) for value in ("4GB", [1], 1j)],
)
def test_max_memory_is_a_positive_number(max_memory, error):
    for call in (
        *calls(SMALL, max_memory=max_memory),
        lambda: neighbours(SMALL, 2, max_memory=max_memory),
    ):
        with pytest.raises(error, match="max_memory"):
            call()


@pytest.mark.parametrize("max_memory", [4e9, np.int32(100_000_000), np.float32(1e9)])
def test_any_kind_of_number_is_accepted(max_memory):
    assert MemoryBudget(max_memory).max_bytes == int(max_memory)
    assert similarity_matrix(SMALL, max_memory=max_memory).nnz > 0


def test_three_quarters_of_the_available_memory_are_used_by_default(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert (MemoryBudget(None).max_bytes, MemoryBudget(None).vector_bytes) == (750, 375)
    with pytest.raises(MemoryError):
        similarity_matrix(SMALL, 0)


def test_the_rows_of_a_shard_are_those_whose_entries_fit():
    units = UnitRows(SMALL)
    loaded = SMALL.size * COMPONENT_BYTES
    entries = similarity_matrix(SMALL, 0).nnz
    for rows in (1, 10, 100):
        room = 2 * PEAK_ENTRY_BYTES * entries * rows // 100
        assert MemoryBudget(loaded + room + 50).max_rows(units, 0, None) == rows
        assert (
            MemoryBudget(loaded + 2 * (24 + PEAK_ENTRY_BYTES) * 5 * rows).max_rows(units, None, 5)
            == rows
        )
    assert MemoryBudget(1 << 40).max_rows(units, 0, None) == 100
    assert MemoryBudget(loaded).max_rows(units, 0, None) == 0


def test_a_counter_counts_all_pairs():
    units = UnitRows(SMALL)
    pairs = next(AllPairs(units, units, 1 << 20).above(0, upper=False))
    counter = pair_counter(2 * len(pairs.scores), 0.5, "do something else")
    counter(pairs)
    counter(pairs)
    with pytest.raises(ResultTooLargeError, match="do something else"):
        counter(pairs)


# progress


def test_progress_counts_rows_which_may_be_done_again(capsys):
    units = UnitRows(SETS["random"])
    with Progress(90, True) as progress:
        for pairs in AllPairs(units, units, 1 << 20).above(0, upper=False):
            assert progress.count(pairs) is pairs
        progress.move(20)
        progress.move(90)
    assert "100%" in capsys.readouterr().err


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
        assert err.rstrip().splitlines()[-1].split("\r")[-1].startswith("Comparing: 100%")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        similarity_matrix(SMALL[:0], show_progress_bar=True)
