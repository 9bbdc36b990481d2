"""VectorIndex: the results of dense comparison, of `top_k` and of `similarity_matrix`, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsim_embed import VectorIndex, similarity_matrix, top_k
from onnxsim_embed.similarity import index as search
from onnxsim_embed.similarity.compare import unit_vectors


def vectors_of(n, width=24, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def check(queries, vectors, k, index=None):
    found = (index or VectorIndex(vectors)).search(queries, k)
    expected = top_k(queries, vectors, k)
    assert found.scores.dtype == np.float32
    assert found.indices.dtype == np.int64
    np.testing.assert_array_equal(found.indices, expected.indices)
    assert found.scores.tobytes() == expected.scores.tobytes()


@st.composite
def sets(draw):
    """Vectors with ties, zero rows, huge and tiny components and rows that int8 keeps badly."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, width = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["normal", "few values", "spikes", "near copies"]))
    if kind == "few values":
        vectors = rng.integers(-1, 2, (n, width)).astype(np.float32)
    elif kind == "near copies":
        vectors = rng.standard_normal(width) + 1e-4 * rng.standard_normal((n, width))
    else:
        vectors = rng.standard_normal((n, width))
        if kind == "spikes":
            vectors[np.arange(n), rng.integers(0, width, n)] *= 10.0 ** rng.integers(0, 6, n)
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    scale = 10.0 ** rng.integers(-30, 31, (n, 1)) if dtype != np.float16 else 1
    vectors = (vectors * scale).clip(-6e4, 6e4) if dtype == np.float16 else vectors * scale
    vectors[rng.random(n) < 0.1] = 0
    vectors[rng.random(n) < 0.2] = vectors[0]
    count = draw(st.integers(1, 5))
    own = vectors[rng.integers(0, n, count)]
    queries = own if draw(st.booleans()) else rng.standard_normal((count, width))
    return queries, vectors.astype(dtype), draw(st.integers(1, n))


@settings(max_examples=60, deadline=None)
@given(sets())
def test_a_search_is_top_k_and_the_dense_ranking(case):
    queries, vectors, k = case
    check(queries, vectors, k)
    wide = unit_vectors(vectors).astype(np.float64)
    scores = unit_vectors(queries).astype(np.float64) @ wide.T
    found = VectorIndex(vectors).search(queries, k)
    best = -np.sort(-scores, axis=1)[:, :k]
    np.testing.assert_allclose(found.scores, best, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(scores, found.indices, axis=1), best, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(sets(), st.sampled_from([-1.0, -0.3, 0.0, 0.5, 0.999, 1.0]))
def test_above_is_the_similarity_matrix(case, threshold):
    queries, vectors, _ = case
    found = VectorIndex(vectors).above(queries, threshold)
    expected = similarity_matrix(queries, threshold, other=vectors)
    assert found.shape == expected.shape
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.data.dtype == np.float32


@pytest.mark.parametrize("strip", [1, 7, 64])
@pytest.mark.parametrize("queries", [1, 5])
def test_strips_change_nothing(monkeypatch, strip, queries):
    monkeypatch.setattr(search, "CHUNK_SCORES", strip * queries)
    monkeypatch.setattr(search, "BUILD_ROWS", strip)
    vectors = np.concatenate([vectors_of(150), vectors_of(50)])  # the last rows repeat the first
    index = VectorIndex(vectors)
    for k in (1, 3, 64, 200):
        check(vectors_of(queries, seed=1), vectors, k, index)
    assert (index.above(vectors[:queries], 0.3) != similarity_matrix(vectors[:queries], 0.3, other=vectors)).nnz == 0  # fmt: skip


@pytest.mark.parametrize("suits", [True, False])
@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_any_number_of_queries_on_any_processor(monkeypatch, suits, count):
    monkeypatch.setattr(search, "int8_supported", lambda: (suits, ""))
    monkeypatch.setattr(search, "MANY_QUERIES", 20)
    check(vectors_of(count, seed=1), vectors_of(300), 10)


def test_without_vnni_no_two_products_pass_sixteen_bits():
    assert np.iinfo(np.int16).max >= 2 * 255 * search.NARROW


def test_wide_vectors():
    check(vectors_of(2, 5000, seed=1), vectors_of(40, 5000), 3)


def test_one_query_may_be_one_dimensional_or_there_may_be_none():
    index = VectorIndex(vectors_of(9))
    assert index.search(vectors_of(1)[0], 2).indices.tolist()[0][0] == 0
    assert index.search(np.zeros((0, 24)), 2).scores.shape == (0, 2)
    assert index.above(np.zeros((0, 24)), 0.5).shape == (0, 9)


def test_a_memory_mapped_file_stays_on_disk(tmp_path):
    vectors = vectors_of(500).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    index = VectorIndex(mapped)
    assert np.shares_memory(index.vectors, mapped)
    check(vectors_of(3, seed=1), vectors, 5, index)
    assert (len(index), index.width, index.nbytes) == (500, 24, 500 * (24 + 8))


def test_few_rows_are_scored_exactly(monkeypatch):
    """What the bound is for: without it every row would be."""
    seen = []
    exact = search.exact_scores
    monkeypatch.setattr(search, "exact_scores", lambda *a: seen.append(len(a[2])) or exact(*a))
    VectorIndex(vectors_of(5000, 384)).search(vectors_of(1, 384, seed=1), 10)
    assert 10 <= seen[0] < 500


# what is refused


def broken(value, row=700):
    vectors = vectors_of(1500)
    vectors[row, 3] = value
    return vectors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1300])
def test_a_row_that_is_no_vector_is_named(value, row):
    with pytest.raises(ValueError, match=f"vectors hold NaN or infinity, first in row {row}$"):
        VectorIndex(broken(value, row))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros(3), r"must have shape \(n, dim\), got \(3,\)"),
        (np.zeros((1, 2, 3)), r"must have shape"),
        (np.array([["a"]]), r"must be numbers"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        VectorIndex(vectors)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.full((3, 24), np.nan), "queries: vectors hold NaN or infinity, first in row 0"),
        (np.zeros((1, 23)), "queries of 23 components do not fit vectors of 24; encode both"),
        (np.zeros((1, 1, 24)), r"queries: vectors must have shape \(n, dim\)"),
        (["text"], "queries: vectors must be numbers"),
    ],
)
def test_queries_that_do_not_fit_are_refused(queries, message):
    index = VectorIndex(vectors_of(9))
    for ask in (lambda: index.search(queries, 1), lambda: index.above(queries, 0.5)):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize("k", [-1, 0, 10])
def test_k_out_of_range_names_what_is_allowed(k):
    with pytest.raises(ValueError, match=rf"k must be from 1 to 9 .*got {k}"):
        VectorIndex(vectors_of(9)).search(vectors_of(1), k)


def test_an_empty_set_has_nothing_to_choose_from():
    index = VectorIndex(np.zeros((0, 24), np.float32))
    with pytest.raises(ValueError, match="there are no vectors to choose 1 from"):
        index.search(vectors_of(1), 1)
    assert index.above(vectors_of(1), 0.5).shape == (1, 0)


def test_a_threshold_that_is_no_cosine_is_refused():
    with pytest.raises(ValueError, match=r"threshold must be from -1 to 1, got 1\.5"):
        VectorIndex(vectors_of(9)).above(vectors_of(1), 1.5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_searches():
    code = """
import os, numpy as np
from onnxsim_embed import VectorIndex
vectors = np.random.default_rng(0).standard_normal((20000, 32)).astype(np.float32)
index = VectorIndex(vectors)
index._threads = 2
expected = index.search(vectors[7], 3)
child = os.fork()
if child == 0:
    os._exit(0 if (index.search(vectors[7], 3).scores == expected.scores).all() else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr
