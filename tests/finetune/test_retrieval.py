"""Retrieval metrics against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxsim_embed.finetune.pairs import TextPairs
from onnxsim_embed.finetune.retrieval import make_task, measure


def encoder(table):
    """An encoder that looks vectors up; a prompt counts as part of the text."""

    def encode(texts, prompt):
        return np.array([table[prompt + text] for text in texts], np.float32)

    return encode


def one_hot(i, n=12):
    return [float(j == i) for j in range(n)]


def test_a_right_target_at_each_rank():
    """Query k ranks target k at place k + 1."""
    n = 12
    targets = {f"t{i}": one_hot(i) for i in range(n)}
    # Scores fall from target 0 on, but a query's own target is put at place k.
    queries = {}
    for k in range(n):
        order = [i for i in range(n) if i != k]
        order.insert(k, k)
        vector = np.empty(n)
        vector[order] = np.linspace(1, 0.1, n)
        queries[f"s{k}"] = vector.tolist()
    pairs = TextPairs(list(queries), list(targets))
    got = measure(encoder(queries | targets), make_task(pairs, [], 100, 0))
    assert got.metrics.accuracy_at_1 == 1 / n
    assert got.metrics.mrr_at_10 == pytest.approx(sum(1 / (k + 1) for k in range(10)) / n)
    assert got.metrics.ndcg_at_10 == pytest.approx(sum(1 / math.log2(k + 2) for k in range(10)) / n)
    assert got.metrics.spearman is None
    assert got.metrics.main == got.metrics.ndcg_at_10
    assert got.first_right.tolist() == [True] + [False] * (n - 1)
    assert got.vectors.shape == (2 * n, n)


def test_a_source_with_two_targets():
    pairs = TextPairs(["s", "s"], ["a", "b"])
    others = TextPairs(["other"], ["c"])
    table = {"s": [1, 0], "a": [1, 0.1], "b": [1, 2], "c": [1, 0.5]}
    task = make_task(pairs, [others], 100, 0)
    assert (task.queries, task.corpus, task.relevant) == (["s"], ["a", "b", "c"], [[0, 1]])
    metrics = measure(encoder(table), task).metrics
    assert (metrics.accuracy_at_1, metrics.mrr_at_10) == (1, 1)
    # right, wrong, right; best would be right, right
    assert metrics.ndcg_at_10 == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))


def test_targets_of_other_pairs_are_searched_and_may_be_right():
    judged = TextPairs(["s"], ["a"])
    others = [TextPairs(["S", "s"], ["b", "c"]), TextPairs(["x"], ["a"])]
    task = make_task(judged, others, 100, 0)
    assert task.corpus == ["a", "b", "c"]
    assert task.relevant == [[0, 2]]


def test_a_bound_on_the_targets_keeps_the_judged_ones():
    judged = TextPairs(["s1", "s2"], ["a", "b"])
    others = TextPairs([f"o{i}" for i in range(50)], [f"t{i}" for i in range(50)])
    task = make_task(judged, [others], 10, 0)
    assert task.corpus[:2] == ["a", "b"]
    assert len(set(task.corpus)) == 10
    assert task == make_task(judged, [others], 10, 0)
    assert len(make_task(judged, [others], 1, 0).corpus) == 2


def test_prompts_go_before_queries_and_targets():
    task = make_task(TextPairs(["s"], ["a"]), [], 10, 0, ("query: ", "passage: "))
    table = {"query: s": [1, 0], "passage: a": [1, 0]}
    assert measure(encoder(table), task).metrics.accuracy_at_1 == 1


def test_scores_are_ranked_and_high_ones_are_matches():
    scored = TextPairs(["p", "q", "r"], ["a", "b", "c"], scores=[5, 4, 0])
    angles = {"a": 0.1, "b": 0.4, "c": 1.2}
    table = {"p": [1, 0], "q": [1, 0], "r": [1, 0]}
    table |= {name: [math.cos(x), math.sin(x)] for name, x in angles.items()}
    task = make_task(scored, [], 100, 0)
    assert task.queries == ["p", "q"]  # 4 of 5 and above
    assert task.corpus == ["a", "b", "c"]
    metrics = measure(encoder(table), task).metrics
    assert metrics.spearman == pytest.approx(1)
    assert metrics.main == metrics.spearman
    assert metrics.accuracy_at_1 == 0.5  # "a" is the first for both


def test_cosines_that_are_all_the_same_order_nothing():
    scored = TextPairs(["p", "q"], ["a", "b"], scores=[1, 0])
    metrics = measure(
        lambda texts, _: np.ones((len(texts), 3), np.float32), make_task(scored, [], 9, 0)
    ).metrics
    assert metrics.spearman == 0.0
