"""VectorIndex returns bitwise the results of `top_k` and `similarity_matrix`."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_sets import assert_same, dense, on_disk, random_vectors

from onnxsim_embed import VectorIndex, similarity_matrix, top_k
from onnxsim_embed.similarity import candidates
from onnxsim_embed.similarity import index as index_module


def check(queries, vectors, k, index=None):
    assert_same((index or VectorIndex(vectors)).search(queries, k), top_k(queries, vectors, k))


@st.composite
def sets(draw):
    """Vectors with ties, zero rows, huge and tiny components and rows that int8 represents badly."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, dim = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["normal", "few values", "spikes", "near copies"]))
    if kind == "few values":
        vectors = rng.integers(-1, 2, (n, dim)).astype(np.float32)
    elif kind == "near copies":
        vectors = rng.standard_normal(dim) + 1e-4 * rng.standard_normal((n, dim))
    else:
        vectors = rng.standard_normal((n, dim))
        if kind == "spikes":
            vectors[np.arange(n), rng.integers(0, dim, n)] *= 10.0 ** rng.integers(0, 6, n)
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    scale = 10.0 ** rng.integers(-30, 31, (n, 1)) if dtype != np.float16 else 1
    vectors = (vectors * scale).clip(-6e4, 6e4) if dtype == np.float16 else vectors * scale
    vectors[rng.random(n) < 0.1] = 0
    vectors[rng.random(n) < 0.2] = vectors[0]
    count = draw(st.integers(1, 5))
    own = vectors[rng.integers(0, n, count)]
    queries = own if draw(st.booleans()) else rng.standard_normal((count, dim))
    return queries, vectors.astype(dtype), draw(st.integers(1, n))


@settings(max_examples=60, deadline=None)
@given(sets(), st.sampled_from([-1.0, -0.3, 0.0, 0.5, 0.999, 1.0]))
def test_results_are_those_of_the_functions_and_of_dense_scores(case, threshold):
    queries, vectors, k = case
    index = VectorIndex(vectors)
    check(queries, vectors, k, index)
    found = index.above(queries, threshold)
    assert_same(found, similarity_matrix(queries, threshold, other=vectors))
    scores = dense(np.asarray(queries, np.float64), np.asarray(vectors, np.float64))
    top = index.search(queries, k)
    np.testing.assert_allclose(top.scores, -np.sort(-scores, axis=1)[:, :k], atol=2e-6)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("queries", [1, 5])
def test_results_do_not_depend_on_chunks(monkeypatch, rows, queries):
    monkeypatch.setattr(index_module, "CHUNK_SCORES", rows * queries)
    monkeypatch.setattr(candidates, "QUANTIZED_ROWS", rows)
    vectors = np.concatenate(
        [random_vectors(150), random_vectors(50)]
    )  # the last rows repeat the first
    index = VectorIndex(vectors)
    for k in (1, 3, 64, 200):
        check(random_vectors(queries, seed=1), vectors, k, index)
    found = index.above(vectors[:queries], 0.3)
    assert_same(found, similarity_matrix(vectors[:queries], 0.3, other=vectors))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_any_number_of_queries_on_any_processor(monkeypatch, vnni, count):
    assert np.iinfo(np.int16).max >= 2 * 255 * index_module.MAX_CODE_16_BIT  # without VNNI
    monkeypatch.setattr(index_module, "int8_supported", lambda: (vnni, ""))
    monkeypatch.setattr(index_module, "MANY_QUERIES", 20)
    check(random_vectors(count, seed=1), random_vectors(300), 10)


def test_vectors_of_a_high_dimension():
    check(random_vectors(2, 5000, seed=1), random_vectors(40, 5000), 3)


def test_one_query_may_be_one_dimensional_or_there_may_be_none():
    index = VectorIndex(random_vectors(9))
    assert index.search(random_vectors(1)[0], 2).indices.tolist()[0][0] == 0
    assert index.search(np.zeros((0, 24)), 2).scores.shape == (0, 2)
    assert index.above(np.zeros((0, 24)), 0.5).shape == (0, 9)


def test_a_memory_mapped_file_stays_on_disk(tmp_path):
    vectors = random_vectors(500).astype(np.float16)
    mapped = on_disk(vectors, tmp_path / "v.npy")
    index = VectorIndex(mapped)
    assert np.shares_memory(index.vectors, mapped)
    check(random_vectors(3, seed=1), vectors, 5, index)
    assert (len(index), index.width, index.nbytes) == (500, 24, 500 * (24 + 8))


def test_few_rows_are_scored_exactly(monkeypatch):
    scored, exact = [], index_module.exact_scores
    monkeypatch.setattr(
        index_module, "exact_scores", lambda *a: scored.append(len(a[2])) or exact(*a)
    )
    VectorIndex(random_vectors(5000, 384)).search(random_vectors(1, 384, seed=1), 10)
    assert 10 <= scored[0] < 500


# errors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1300])
def test_a_row_that_is_not_finite_is_named(value, row):
    vectors = random_vectors(1500)
    vectors[row, 3] = value
    with pytest.raises(ValueError, match=rf"row {row}$"):
        VectorIndex(vectors)
    for invalid in (np.zeros(3), np.zeros((1, 2, 3)), np.array([["a"]])):
        with pytest.raises(ValueError, match=r"shape|dtype"):
            VectorIndex(invalid)


@pytest.mark.parametrize(
    "queries", [np.full((3, 24), np.nan), np.zeros((1, 23)), np.zeros((1, 1, 24)), ["text"]]
)
def test_queries_that_do_not_match_are_rejected(queries):
    index = VectorIndex(random_vectors(9))
    for ask in (lambda: index.search(queries, 1), lambda: index.above(queries, 0.5)):
        with pytest.raises(ValueError, match="queries"):
            ask()


@pytest.mark.parametrize("k", [-1, 0, 10])
def test_k_out_of_range_names_the_range(k):
    with pytest.raises(ValueError, match=rf"from 1 to 9 .*got {k}"):
        VectorIndex(random_vectors(9)).search(random_vectors(1), k)


def test_an_empty_set_has_nothing_to_choose_from():
    index = VectorIndex(random_vectors(0))
    with pytest.raises(ValueError, match="no vectors"):
        index.search(random_vectors(1), 1)
    assert index.above(random_vectors(1), 0.5).shape == (1, 0)
    with pytest.raises(ValueError, match=r"from -1 to 1, got 1\.5"):
        index.above(random_vectors(1), 1.5)


def test_without_onnxruntime_everything_is_float32(monkeypatch):
    monkeypatch.setattr(candidates, "onnxruntime_installed", lambda: False)
    monkeypatch.setattr(candidates, "int8_matmul", lambda *_: pytest.fail("int8"))
    vectors = random_vectors(7000, 16)  # enough for a trial of both scorers
    check(vectors[:3], vectors, 5)
    assert similarity_matrix(vectors, 0.95).nnz >= 7000
    assert VectorIndex(vectors).above(vectors[:3], 0.9).shape == (3, 7000)


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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr
