"""Retrieval metrics against their definitions, and what counts as relevant."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxsim_embed.finetune import TextPairs
from onnxsim_embed.finetune.evaluation import PairEvaluator


class Lookup:
    """A model that looks vectors up; a prompt counts as part of the text."""

    def __init__(self, table):
        self.table = table

    def encode(self, texts, prompt, show_progress_bar):
        return np.array([self.table[prompt + text] for text in texts], np.float32)


def evaluated(pairs, others, table, prompts=("", "")):
    return PairEvaluator(pairs, others, 100, 0, prompts).evaluate(Lookup(table))


def corpus_of(pairs, others=(), max_targets=100):
    evaluator = PairEvaluator(pairs, others, max_targets, 0)
    return evaluator.queries, evaluator.targets, list(evaluator.relevant.values())


@pytest.mark.parametrize("scores", [None, [0.1, 0.9]])
def test_vectors_of_a_model_that_diverged_score_nothing(scores):
    pairs = TextPairs(["a", "b"], ["c", "d"], scores=scores)
    table = {"a": [np.nan, 1], "b": [np.inf, -np.inf], "c": [1, np.nan], "d": [np.inf, np.inf]}
    values = [v for v in evaluated(pairs, [], table).metrics.values() if v is not None]
    assert values
    assert np.isfinite(values).all()


def test_metrics_by_rank():
    """Query k finds its target at rank k + 1."""
    n = 12
    table = {f"t{i}": np.eye(n)[i] for i in range(n)}
    for k in range(n):
        order = [i for i in range(n) if i != k]
        order.insert(k, k)
        table[f"s{k}"] = np.empty(n)
        table[f"s{k}"][order] = np.linspace(1, 0.1, n)
    pairs = TextPairs([f"s{i}" for i in range(n)], [f"t{i}" for i in range(n)])
    got = evaluated(pairs, [], table)
    assert got.metrics["accuracy_at_1"] == 1 / n
    assert got.metrics["mrr_at_10"] == pytest.approx(sum(1 / (k + 1) for k in range(10)) / n)
    ndcg = sum(1 / math.log2(k + 2) for k in range(10)) / n
    assert got.metrics["ndcg_at_10"] == pytest.approx(ndcg)
    assert got.metrics["spearman"] is None
    assert got.first_hits.tolist() == [True] + [False] * (n - 1)
    assert got.embeddings.shape == (2 * n, n)


def test_a_source_with_two_targets():
    table = {"s": [1, 0], "a": [1, 0.1], "b": [1, 2], "c": [1, 0.5]}
    got = evaluated(TextPairs(["s", "s"], ["a", "b"]), [TextPairs(["other"], ["c"])], table)
    assert (got.metrics["accuracy_at_1"], got.metrics["mrr_at_10"]) == (1, 1)
    # relevant, not, relevant; ideal: relevant, relevant
    assert got.metrics["ndcg_at_10"] == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))


def test_targets_of_other_pairs_are_searched_and_may_be_relevant():
    others = [TextPairs(["S", "s"], ["b", "c"]), TextPairs(["x", "s"], ["A", "d"])]
    corpus = corpus_of(TextPairs(["s"], ["a"]), others)
    assert corpus == (["s"], ["b", "c", "d", "a"], [{0, 1, 2, 3}])
    # Texts that differ in case and whitespace are one.
    assert corpus_of(TextPairs(["s", " S"], ["a b", "A  b"])) == (["s"], ["a b"], [{0}])


@pytest.mark.parametrize("copies", [1, 20])
def test_a_tie_with_a_training_target_is_no_hit(copies):
    """Also where more targets tie than are ranked."""
    others = TextPairs([f"x{i}" for i in range(copies)], [f"b{i}" for i in range(copies)])
    table = {text: [1, 0] for text in ("s", "a", *others.targets)}
    got = evaluated(TextPairs(["s"], ["a"]), [others], table)
    assert got.first_hits.tolist() == [False]
    assert got.metrics["mrr_at_10"] == (0.5 if copies == 1 else 0)


def test_sampled_targets_include_those_of_the_evaluated_pairs():
    pairs = TextPairs(["s1", "s2"], ["a", "b"])
    others = [TextPairs([f"o{i}" for i in range(50)], [f"t{i}" for i in range(50)])]
    corpus = corpus_of(pairs, others, 10)[1]
    assert corpus[-2:] == ["a", "b"]
    assert len(set(corpus)) == 10
    assert corpus == corpus_of(pairs, others, 10)[1]
    assert corpus_of(pairs, others, 1)[1] == ["a", "b"]


def test_high_scores_are_relevant():
    pairs = TextPairs(["p", "q", "r"], ["a", "b", "c"], scores=[5, 4, 0])
    angles = {"a": 0.1, "b": 0.4, "c": 1.2}
    table = {"p": [1, 0], "q": [1, 0], "r": [1, 0]}
    table |= {name: [math.cos(x), math.sin(x)] for name, x in angles.items()}
    assert corpus_of(pairs)[:2] == (["p", "q"], ["c", "a", "b"])  # 4 of 5 and above
    got = evaluated(pairs, [], table)
    assert got.metrics["spearman"] == pytest.approx(1)
    assert got.metrics["accuracy_at_1"] == 0.5  # "a" is the nearest of both


def test_prompts_and_constant_cosines_which_have_no_correlation():
    table = {"query: s": [1, 0], "passage: a": [1, 0]}
    got = evaluated(TextPairs(["s"], ["a"]), [], table, prompts=("query: ", "passage: "))
    assert got.metrics["accuracy_at_1"] == 1
    pairs = TextPairs(["p", "q"], ["a", "b"], scores=[1, 0])
    assert evaluated(pairs, [], {text: [1, 1] for text in "pqab"}).metrics["spearman"] == 0.0
