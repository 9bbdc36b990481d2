"""Pairs with repeated texts: every pair is used, and no right target is a negative."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import MultipleNegativesRankingLoss
from support import jargon_pairs

from onnxsim_embed.finetune import TextPairs, finetune, training
from onnxsim_embed.finetune.repeats import EvenBatchSampler, MaskedRankingLoss, RightTargets

FAQ = (
    [f"question {i}" for i in range(50)],
    ["Ask the office", "ask the  OFFICE"] * 15 + [f"answer {i}" for i in range(20)],
)


def batches(columns, batch_size, epoch=0):
    data = Dataset.from_dict({"source": columns[0]})
    sampler = EvenBatchSampler(
        data, targets=RightTargets(columns), batch_size=batch_size, drop_last=False, seed=3
    )
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


def test_right_targets_are_masked():
    targets = RightTargets([["s", "S ", "t", "c"], ["a", "b", "B", "d"], ["x", "a", "t", "y"]])
    expected = [  # a b B d x a t y: all texts but the own target that are right for the source
        [0, 1, 1, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert targets.mask(np.arange(4)).int().tolist() == expected
    assert targets.mask(np.array([2])).int().tolist() == [[0, 1]]


@pytest.mark.parametrize("batch_size", [2, 7, 16, 49, 64])
def test_batches_use_every_pair_once_and_spread_targets(batch_size):
    parts = batches(FAQ, batch_size)
    assert sorted(row for part in parts for row in part) == list(range(50))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert min(map(len, parts)) > 1
    frequent = [sum(row < 30 for row in part) for part in parts]
    assert max(frequent) - min(frequent) <= 1
    assert batches(FAQ, batch_size) == parts
    if batch_size < 50:
        assert batches(FAQ, batch_size, epoch=1) != parts


def test_batches_of_distinct_pairs_are_shuffled_over_epochs():
    columns = jargon_pairs(40)
    together = Counter(
        frozenset((0, row)) for epoch in range(50) for part in batches(columns, 8, epoch)
        if 0 in part for row in part if row
    )  # fmt: skip
    assert len(together) == 39


def test_the_loss_without_repeats_is_that_of_sentence_transformers(checkpoint):
    model = SentenceTransformer(str(checkpoint), device="cpu")
    loss = MaskedRankingLoss(model, RightTargets([["a", "b"], ["c", "d"], ["e", "f"]]), 8)
    loss.rows = np.arange(2)
    embeddings = list(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)))
    reference = MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(embeddings, None)
    columns = [[column] for column in embeddings]
    torch.testing.assert_close(loss.calculate_loss(columns), reference)
    loss.targets = RightTargets([["a", "a"], ["c", "d"], ["C", "D"]])
    assert loss.calculate_loss(columns) == 0  # nothing but right targets


@pytest.mark.parametrize("memory", [2 << 30, 200_000])
def test_training_uses_every_pair_of_a_repeated_target(checkpoint, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(training, "ACTIVATION_BYTES", memory)
    rows = []
    forward = MaskedRankingLoss.forward

    def watched(self, features, labels):
        rows.extend(labels.tolist())
        return forward(self, features, labels)

    monkeypatch.setattr(MaskedRankingLoss, "forward", watched)
    monkeypatch.setattr("onnxsim_embed.finetune.job.Job.export", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(TextPairs(*FAQ), tmp_path / "out", model=checkpoint, batch_size=8, epochs=2)
    assert Counter(rows) == dict.fromkeys(range(40), 2)
    log = (tmp_path / ".out.finetune" / "trained.json").read_text(encoding="utf-8")
    assert "0.0]" not in log.partition('"loss": [')[2].partition("validation")[0]
