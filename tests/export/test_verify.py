"""The proof of an export: the measures, the references, and published results."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from support import TEXTS, bert_config, bert_tensors, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.artifact.recipes import KnownAnswer
from onnxsim_embed.export.bert import ACTIVATIONS
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.fidelity import bundled_texts, compare_vectors
from onnxsim_embed.export.reference import numpy_reference, reference_vectors, torch_reference
from onnxsim_embed.export.verify import (
    check_known_answer,
    verification_texts,
    verify_derived,
    verify_fp32,
)


def random_vectors(seed: int, rows: int = 40, dim: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


# Measures


@pytest.mark.parametrize("rows", [2, 3, 11, 40])
def test_equal_vectors_agree_fully(rows):
    vectors = random_vectors(0, rows)
    found = compare_vectors(vectors, vectors)
    assert found.min_cosine == pytest.approx(1, abs=1e-6)
    assert found.mean_cosine == pytest.approx(1, abs=1e-6)
    assert found.spearman == pytest.approx(1)
    assert found.top10_overlap == 1


def test_length_does_not_matter():
    vectors = random_vectors(1)
    longer = vectors * np.random.default_rng(2).uniform(0.5, 3, (len(vectors), 1)).astype("f4")
    found = compare_vectors(vectors, longer)
    assert found.min_cosine == pytest.approx(1, abs=1e-6)
    assert found.top10_overlap == 1


def test_measures_equal_the_plain_computation():
    left = random_vectors(3)
    right = left + random_vectors(4) * np.float32(0.5)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (left, right))
    cosines = (a * b).sum(axis=1)
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    ranks = spearmanr([a[i] @ a[j] for i, j in pairs], [b[i] @ b[j] for i, j in pairs]).statistic
    shared = 0
    for row in range(len(a)):
        near = [set(np.argsort(-np.delete(v @ v[row], row))[:10]) for v in (a, b)]
        shared += len(near[0] & near[1])
    found = compare_vectors(left, right)
    assert found.min_cosine == pytest.approx(cosines.min(), abs=1e-6)
    assert found.mean_cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert found.min_cosine <= found.p1_cosine <= found.mean_cosine
    assert found.spearman == pytest.approx(ranks, abs=1e-4)
    assert found.top10_overlap == pytest.approx(shared / len(a) / 10)


def test_one_wrong_row_shows():
    vectors = random_vectors(5)
    wrong = vectors.copy()
    wrong[7] = -wrong[7]
    found = compare_vectors(vectors, wrong)
    assert found.min_cosine == pytest.approx(-1, abs=1e-6)
    assert found.mean_cosine < 0.96


def test_a_zero_vector_agrees_with_nothing():
    vectors = random_vectors(6)
    wrong = vectors.copy()
    wrong[0] = 0
    assert compare_vectors(vectors, wrong).min_cosine == 0


def test_vectors_that_are_all_the_same_are_measured_without_a_warning():
    found = compare_vectors(random_vectors(7), np.ones((40, 12), np.float32))
    assert found.min_cosine < 0.9
    assert not found.spearman > 0.5


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((1, 4), (1, 4))])
def test_shapes_that_cannot_be_compared_are_named(shapes):
    left, right = (np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=r"at least 2 rows, got \(\d, 4\) and"):
        compare_vectors(left, right)


# Texts


def test_verification_texts_are_many_different_and_unseen_by_calibration():
    texts = verification_texts()
    assert len(texts) >= 100
    assert len(set(texts)) == len(texts)
    assert not set(texts) & set(bundled_texts("calibration.jsonl"))


# References


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_numpy_reference_equals_pytorch(tmp_path, activation):
    config = bert_config(hidden_act=activation)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", config=config))
    ours = numpy_reference(config, bert_tensors(config))
    theirs = torch_reference(checkpoint)
    for tokens in (1, 2, 9, 64):
        ids = np.random.default_rng(tokens).integers(0, 100, (1, tokens))
        hidden = ours(ids)
        assert hidden.dtype == np.float32
        assert hidden.shape == (1, tokens, 32)
        assert np.abs(hidden - theirs(ids)).max() < 1e-5


def test_reference_vectors_run_text_by_text():
    def hidden(ids):
        return np.repeat(ids[:, :, None], 3, axis=2).astype(np.float32)

    ids = [np.array([1, 3]), np.array([5]), np.array([2, 2, 2])]
    found = reference_vectors(hidden, lambda h: h.mean(axis=1), ids)
    assert np.array_equal(found, np.array([[2] * 3, [5] * 3, [2] * 3], np.float32))


# Known answers


@pytest.fixture(scope="module")
def model(artifact) -> Embedder:
    return Embedder(artifact, precision="fp32", threads=1)


@pytest.fixture(scope="module")
def answer(model) -> KnownAnswer:
    """What the tiny model itself says, as if it had been published."""
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
    assert check_known_answer(model, answer) == []


@pytest.mark.parametrize("name", QUANTITIES)
def test_each_published_quantity_is_compared(model, answer, name):
    wrong = np.array(getattr(answer, name))
    wrong.flat[-1] += 2e-4
    published = tuple(map(tuple, wrong)) if wrong.ndim == 2 else tuple(wrong)
    problems = check_known_answer(model, replace(answer, **{name: published}))
    assert len(problems) == 1
    assert f"{name} published by a test is off by 0.0002 (tolerance 1e-05)" in problems[0]


def test_what_is_not_a_number_is_a_problem(model, answer):
    assert check_known_answer(model, replace(answer, norms=(1.0, 1.0, float("nan"))))


def test_the_published_length_applies_and_is_put_back(model, answer):
    before = model.max_seq_length
    assert check_known_answer(model, replace(answer, max_length=10))  # the long text is cut
    assert model.max_seq_length == before


def test_the_published_prompt_applies(model, answer):
    assert check_known_answer(model, replace(answer, prompt_name="query"))


def test_a_model_shorter_than_the_published_one_still_answers_short_texts(model, answer):
    before = model.max_seq_length
    assert check_known_answer(model, replace(answer, max_length=10_000)) == []
    assert model.max_seq_length == before


def test_token_counts_are_part_of_a_known_answer(model, answer):
    counts = tuple(map(len, model.token_ids(answer.texts)))
    assert check_known_answer(model, replace(answer, token_counts=counts)) == []
    (problem,) = check_known_answer(model, replace(answer, token_counts=(99, *counts[1:])))
    assert "token_counts" in problem


def test_a_known_answer_that_cannot_be_run_leaves_the_model_as_it_was(model, answer):
    before = model.max_seq_length
    with pytest.raises(ValueError, match="nonsense"):
        check_known_answer(model, replace(answer, prompt_name="nonsense", max_length=10))
    assert model.max_seq_length == before


# The report


def test_both_precisions_are_reported(checkpoint, artifact):
    opened, made = open_checkpoint(checkpoint), Artifact.open(artifact)
    fp32 = verify_fp32(made, opened, opened.tensors())
    int8 = verify_derived("int8", made)
    for part in (fp32, int8):
        assert part["problems"] == []
        assert part["texts"] >= 50
        assert part["min_cosine"] <= part["mean_cosine"] <= 1
    assert (fp32["reference"], int8["reference"]) == ("PyTorch", "fp32")
    assert fp32["min_cosine"] > 0.99999


def test_texts_of_the_caller_are_compared(checkpoint, artifact):
    opened = open_checkpoint(checkpoint)
    report = verify_fp32(Artifact.open(artifact), opened, opened.tensors(), texts=TEXTS)
    assert report["texts"] == len(TEXTS)
    assert report["problems"] == []


def test_another_checkpoint_is_a_problem_with_numbers(tmp_path, artifact):
    other = open_checkpoint(write_checkpoint(tmp_path / "c", seed=1))
    report = verify_fp32(Artifact.open(artifact), other, other.tensors(), texts=TEXTS)
    assert len(report["problems"]) == 1
    assert re.search(r"fp32 .*mean cosine -?0\.\d+ \(threshold", report["problems"][0])
