"""Measures of fidelity to a reference and to published results."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from support import TEXTS

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.recipes import KnownAnswer
from onnxsim_embed.export.fidelity import (
    check_known_answer,
    compare_vectors,
    count_variant,
    row_cosines,
)


def random_vectors(seed: int, rows: int = 40, dim: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


@pytest.mark.parametrize("rows", [2, 3, 11, 40])
def test_vectors_agree_with_scaled_copies_of_themselves(rows):
    vectors = random_vectors(0, rows)
    factors = np.random.default_rng(2).uniform(0.5, 3, (rows, 1)).astype("f4")
    for other in (vectors, vectors * factors):
        fidelity = compare_vectors(vectors, other)
        assert fidelity.min_cosine == pytest.approx(1, abs=1e-6)
        assert fidelity.mean_cosine == pytest.approx(1, abs=1e-6)
        assert fidelity.spearman == pytest.approx(1)
        assert fidelity.top10_overlap == 1


def test_measures_equal_the_plain_computation():
    left = random_vectors(3)
    right = left + random_vectors(4) * np.float32(0.5)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (left, right))
    cosines = (a * b).sum(axis=1)
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    ranks = spearmanr([a[i] @ a[j] for i, j in pairs], [b[i] @ b[j] for i, j in pairs]).statistic
    shared = 0
    for row in range(len(a)):
        nearest = [set(np.argsort(-np.delete(v @ v[row], row))[:10]) for v in (a, b)]
        shared += len(nearest[0] & nearest[1])
    fidelity = compare_vectors(left, right)
    assert fidelity.min_cosine == pytest.approx(cosines.min(), abs=1e-6)
    assert fidelity.mean_cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert fidelity.min_cosine <= fidelity.p1_cosine <= fidelity.mean_cosine
    assert fidelity.spearman == pytest.approx(ranks, abs=1e-4)
    assert fidelity.top10_overlap == pytest.approx(shared / len(a) / 10)


@pytest.mark.parametrize(("factor", "cosine"), [(-1, -1), (0, 0), (np.nan, 0), (np.inf, 0)])
def test_one_wrong_row_shows(factor, cosine):
    vectors = random_vectors(5)
    wrong = vectors.copy()
    wrong[7] *= np.float32(factor)
    assert compare_vectors(vectors, wrong).min_cosine == pytest.approx(cosine, abs=1e-6)
    assert row_cosines(vectors, wrong)[7] == pytest.approx(cosine, abs=1e-6)


def test_constant_vectors_have_no_rank_correlation():
    fidelity = compare_vectors(random_vectors(7), np.ones((40, 12), np.float32))
    assert fidelity.min_cosine < 0.9
    assert np.isnan(fidelity.spearman)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((1, 4), (1, 4))])
def test_shapes_that_cannot_be_compared_are_named(shapes):
    left, right = (np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=r"at least 2 rows, got \(\d, 4\)"):
        compare_vectors(left, right)


def test_vectors_that_change_with_their_batch_are_counted(artifact, monkeypatch):
    model = Embedder(artifact, precision="int8")
    vectors, encode = model.encode(TEXTS, prompt=""), Embedder.encode
    assert count_variant(model, TEXTS, vectors) == 0
    for alone in (True, False):

        def changed(self, texts, alone=alone, **options):
            found = encode(self, texts, **options)
            return np.nextafter(found, 2) if ("batch_size" in options) is alone else found

        monkeypatch.setattr(Embedder, "encode", changed)
        assert count_variant(model, TEXTS, vectors) == len(TEXTS)


# Known answers


@pytest.fixture(scope="module")
def model(artifact) -> Embedder:
    return Embedder(artifact, precision="fp32", threads=1)


@pytest.fixture(scope="module")
def answer(model) -> KnownAnswer:
    """What the tiny model itself says, as if published."""
    texts = ("the water of the river", "rural school project", "solar energy " * 30)
    vectors = model.encode(texts).astype(np.float64)
    scores = vectors @ vectors.T
    return KnownAnswer(
        source="a test",
        texts=texts,
        tolerance=1e-5,
        cosine_matrix=tuple(map(tuple, scores)),
        cosine_of_first_to_rest=tuple(scores[0, 1:]),
        vector_head=tuple(map(tuple, vectors[:2, :3])),
        vector_tail=tuple(map(tuple, vectors[:1, -4:])),
        norms=(1.0, 1.0, 1.0),
    )


QUANTITIES = ["cosine_matrix", "cosine_of_first_to_rest", "vector_head", "vector_tail", "norms"]


def test_published_results_that_agree_are_no_problem(model, answer):
    counts = tuple(map(len, model.token_ids(answer.texts)))
    long = replace(answer, token_counts=counts, max_length=10_000)  # more tokens than the model has
    assert check_known_answer(model, long) == check_known_answer(model, answer) == []
    (problem,) = check_known_answer(model, replace(answer, token_counts=(99, *counts[1:])))
    assert "token_counts" in problem


@pytest.mark.parametrize("name", QUANTITIES)
def test_each_published_quantity_is_compared(model, answer, name):
    for offset in (2e-4, np.nan):
        wrong = np.array(getattr(answer, name))
        wrong.flat[-1] += offset
        published = tuple(map(tuple, wrong)) if wrong.ndim == 2 else tuple(wrong)
        (problem,) = check_known_answer(model, replace(answer, **{name: published}))
        assert name in problem
        assert f"{offset:.2g}" in problem


def test_the_published_length_and_prompt_apply_to_the_check_only(model, answer):
    length = model.max_seq_length
    assert check_known_answer(model, replace(answer, max_length=10))
    assert check_known_answer(model, replace(answer, prompt_name="query"))
    with pytest.raises(ValueError, match="nonsense"):
        check_known_answer(model, replace(answer, prompt_name="nonsense", max_length=10))
    assert model.max_seq_length == length
