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


def entries(matrix):
    found = matrix.tocoo()
    return {"rows": found.row, "columns": found.col, "scores": found.data.copy()}


def test_missing_additional_and_inexact_entries_show(vectors):
    above, more = (entries(similarity_matrix(vectors, threshold)) for threshold in (0.5, 0.4))
    less = {name: values[:-3] for name, values in above.items()}
    inexact = above | {"scores": above["scores"] + np.float32(0.25)}
    systems = {"right": above, "less": less, "more": more, "inexact": inexact}
    found = check_above(vectors, 0.5, systems)
    additional = len(more["rows"]) - len(above["rows"])
    assert [check["wrong"] for check in found.values()] == [0, 3, additional, 0]
    assert found["right"]["largest_error"] < 1e-6
    assert found["inexact"]["largest_error"] == pytest.approx(0.25, abs=1e-6)


def test_pairs_at_the_threshold_may_fall_on_either_side():
    angle = np.arccos(0.5 + 4e-7)
    vectors = np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32)
    for matrix in ([[1, 0], [0, 1]], [[1, 0.5], [0.5, 1]]):
        result = entries(sparse.coo_array(np.array(matrix)))
        assert check_above(vectors, 0.5, {"a": result})["a"]["wrong"] == 0


def test_lower_and_repeated_entries_of_the_best_count(vectors):
    found = top_k(vectors, vectors, K)
    rows = np.repeat(np.arange(len(vectors)), K)
    best = {"rows": rows, "columns": found.indices.ravel(), "scores": found.scores.ravel()}
    wrong = best | {"columns": best["columns"].copy()}
    wrong["columns"][1] = int((vectors[0] @ vectors.T).argmin())
    wrong["columns"][2 * K + 1] = wrong["columns"][2 * K]
    checked = check_best(vectors, K, {"right": best, "wrong": wrong})
    assert (checked["right"]["wrong"], checked["wrong"]["wrong"]) == (0, 2)
    assert checked["right"]["largest_error"] < 1e-6


def test_fidelity_is_the_cosine_whatever_the_norm(vectors):
    other = vectors.copy()
    other[7] = -vectors[7]
    found = fidelity(3 * other, vectors)
    assert found["min_cosine"] == pytest.approx(-1)
    assert found["mean_cosine"] == pytest.approx(1 - 2 / len(vectors))
