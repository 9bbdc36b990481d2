"""Correlation of cosine similarities with human scores."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from support import SCORED_PAIRS

from onnxsim_embed import Embedder
from onnxsim_embed.evaluation import evaluate_sts

LEFT, RIGHT, SCORES = SCORED_PAIRS


@pytest.fixture(scope="module")
def model(artifact) -> Embedder:
    return Embedder(artifact, precision="fp32", threads=1)


class Fixed:
    """A model of known cosines: it puts each pair at a fixed angle."""

    def __init__(self, cosines):
        self.cosines = np.asarray(cosines, np.float64)

    def encode(self, texts):
        n = len(texts) // 2
        left = np.tile([1, 0], (n, 1))
        right = np.stack([self.cosines, np.sqrt(1 - self.cosines**2)], axis=1)
        return np.concatenate([left, right]).astype(np.float32)


def test_correlations_of_a_model_equal_scipy_s(model):
    a, b = model.encode(LEFT).astype("f8"), model.encode(RIGHT).astype("f8")
    cosines = (a * b).sum(axis=1)
    result = evaluate_sts(model, LEFT, RIGHT, SCORES)
    assert result.pairs == 6
    assert result.spearman == pytest.approx(100 * spearmanr(cosines, SCORES).statistic, abs=1e-6)
    assert result.pearson == pytest.approx(100 * pearsonr(cosines, SCORES).statistic, abs=1e-3)


def test_neither_the_scale_of_scores_nor_the_order_of_sides_matters(model):
    expected = evaluate_sts(model, LEFT, RIGHT, SCORES)
    result = evaluate_sts(model, RIGHT, LEFT, np.array(SCORES) * 0.01 + 7)
    assert result.spearman == pytest.approx(expected.spearman)
    assert result.pearson == pytest.approx(expected.pearson)


@pytest.mark.parametrize(
    ("left", "right", "scores", "message"),
    [
        (LEFT, RIGHT[:-1], SCORES, "equal lengths, got 6, 5 and 6"),
        (LEFT[:2], RIGHT[:2], [1, float("nan")], "finite"),
        (LEFT[:3], RIGHT[:3], [2, 2, 2], "two different"),
        ([], [], [], "two different"),
    ],
)
def test_invalid_pairs_are_errors(model, left, right, scores, message):
    with pytest.raises(ValueError, match=message):
        evaluate_sts(model, left, right, scores)


@pytest.mark.parametrize("sides", [("abc", "abc"), (LEFT[:3], {"a", "b", "c"})])
def test_only_ordered_iterables_are_pairs(model, sides):
    with pytest.raises(TypeError, match="iterable"):
        evaluate_sts(model, *sides, [1, 2, 3])


@pytest.mark.parametrize("cosines", [[1, 1, 1], [0.5, 0.5, 0.5 + 1e-7]])
def test_cosines_equal_up_to_rounding_have_no_correlation(cosines, caplog):
    result = evaluate_sts(Fixed(cosines), LEFT[:3], LEFT[:3], [1, 2, 3])
    assert result.pairs == 3
    assert np.isnan([result.spearman, result.pearson]).all()
    assert "undefined" in caplog.text
