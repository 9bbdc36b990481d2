"""Checks of results find what is missing, too much, repeated or inexact, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from lab.exactness import check_above, check_best
from scipy import sparse

from onnxsim_embed import similarity_matrix, top_k
from onnxsim_embed.benchmark.measure import fidelity
from onnxsim_embed.similarity.compare import unit_vectors

K = 4


@pytest.fixture(scope="module")
def vectors():
    # More rows than one block of the check.
    return unit_vectors(np.random.default_rng(3).standard_normal((300, 6)))


@pytest.fixture
def above(vectors):
    found = similarity_matrix(vectors, 0.5).tocoo()
    return {"rows": found.row.copy(), "columns": found.col.copy(), "scores": found.data.copy()}


@pytest.fixture
def best(vectors):
    found = top_k(vectors, vectors, K)
    rows = np.repeat(np.arange(len(vectors)), K)
    return {"rows": rows, "columns": found.indices.ravel(), "scores": found.scores.ravel()}


def test_right_results_pass(vectors, above, best):
    assert check_above(vectors, 0.5, {"a": above})["a"]["wrong"] == 0
    checked = check_best(vectors, K, {"a": best, "b": best})
    assert checked["a"] == checked["b"]
    assert checked["a"]["wrong"] == 0
    assert 0 <= checked["a"]["largest_error"] < 1e-6


def test_missing_and_additional_entries_count(vectors, above):
    wrong = {name: values[:-3] for name, values in above.items()}
    assert check_above(vectors, 0.5, {"a": wrong})["a"]["wrong"] == 3
    dense = similarity_matrix(vectors, 0.4).tocoo()
    more = {"rows": dense.row, "columns": dense.col, "scores": dense.data}
    found = check_above(vectors, 0.5, {"a": more, "b": above})
    assert found["a"]["wrong"] == len(dense.data) - len(above["scores"])
    assert found["b"]["wrong"] == 0


def test_pairs_at_the_threshold_may_fall_on_either_side():
    angle = np.arccos(0.5 + 4e-7)
    vectors = np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32)
    for entries in ([[1, 0], [0, 1]], [[1, 0.5], [0.5, 1]]):
        found = sparse.coo_array(np.array(entries))
        result = {"rows": found.row, "columns": found.col, "scores": found.data}
        assert check_above(vectors, 0.5, {"a": result})["a"]["wrong"] == 0


def test_inexact_scores_show(vectors, above):
    above["scores"][5] += 0.25
    error = check_above(vectors, 0.5, {"a": above})["a"]["largest_error"]
    assert error == pytest.approx(0.25, abs=1e-6)


def test_lower_and_repeated_entries_of_the_best_count(vectors, best):
    scores = vectors[0] @ vectors.T
    best["columns"] = best["columns"].copy()
    best["columns"][1] = int(scores.argmin())
    best["columns"][2 * K + 1] = best["columns"][2 * K]
    assert check_best(vectors, K, {"a": best})["a"]["wrong"] == 2


def test_fidelity_is_the_cosine_whatever_the_norm(vectors):
    other = vectors.copy()
    other[7] = -vectors[7]
    found = fidelity(3 * other, vectors)
    assert found["min_cosine"] == pytest.approx(-1)
    assert found["mean_cosine"] == pytest.approx(1 - 2 / len(vectors))
