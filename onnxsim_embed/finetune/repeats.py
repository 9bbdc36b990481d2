"""Batches and loss of pairs, whose texts may repeat: every pair is used.

sentence-transformers' sampler without duplicates spreads the pairs of a repeated target over batches of few pairs,
in the end of one, and an epoch ends before all are used. Here all batches have nearly the same size, and the right
targets of a source are masked among the negatives of its batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sampler import DefaultBatchSampler

from onnxsim_embed.finetune.pairs import normalize


class RightTargets:
    """The right targets of each source; texts that differ only in case and whitespace are equal.

    :param columns: sources, targets, and any number of columns of hard negatives.
    """

    def __init__(self, columns: Sequence[Sequence[str]]) -> None:
        numbers: dict[str, int] = {}
        self.ids = np.array(
            [[numbers.setdefault(normalize(text), len(numbers)) for text in c] for c in columns]
        )
        self._right: dict[int, set[int]] = defaultdict(set)
        for source, target in self.ids[:2].T.tolist():
            self._right[source] |= {source, target}  # a text is no negative of itself either

    def mask(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return which texts of a batch are no negatives of each source, bool (rows, targets and negatives)."""
        texts = self.ids[1:, rows].ravel()
        right = [np.isin(texts, list(self._right[source])) for source in self.ids[0, rows].tolist()]
        mask = np.array(right)
        np.fill_diagonal(mask, False)
        return torch.from_numpy(mask)


class MaskedRankingLoss(CachedMultipleNegativesRankingLoss):  # type: ignore[misc]
    """MultipleNegativesRankingLoss in which right targets are no negatives; labels are row numbers.

    :param capacity: texts of one forward and backward pass; batches of more are cached (GradCache).
    """

    def __init__(self, model: SentenceTransformer, targets: RightTargets, capacity: int) -> None:
        super().__init__(model, mini_batch_size=capacity)
        self.targets, self.capacity = targets, capacity

    def forward(
        self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a batch."""
        self.rows = labels.cpu().numpy()
        columns = list(sentence_features)
        if len(labels) * len(columns) > self.capacity:
            cached: torch.Tensor = super().forward(columns, labels)
            return cached
        return self.calculate_loss([[self.model(texts)["sentence_embedding"]] for texts in columns])

    def calculate_loss(
        self, reps: list[list[torch.Tensor]], *_: object, with_backward: bool = False
    ) -> torch.Tensor:
        """Return the cross-entropy of embeddings, by column and mini-batch, without right targets."""
        sources, *others = map(torch.cat, reps)
        scores = self.similarity_fct(sources, torch.cat(others)) * self.scale
        scores = scores.masked_fill(self.targets.mask(self.rows).to(scores.device), -torch.inf)
        own = torch.arange(len(scores), device=scores.device)
        loss = torch.nn.functional.cross_entropy(scores, own)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


class EvenBatchSampler(DefaultBatchSampler):  # type: ignore[misc]
    """Shuffled batches of nearly equal size, over which the pairs of each target are spread evenly."""

    def __init__(self, dataset: Dataset, *, targets: RightTargets, **options: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, **options)
        self.targets = targets

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        targets = np.unique(self.targets.ids[1], return_inverse=True)[1]
        shuffled = rng.permutation(len(targets))
        groups = rng.permutation(targets.max() + 1)[targets[shuffled]]
        order = shuffled[np.argsort(groups, kind="stable")]
        for batch in rng.permutation(len(self)):
            yield order[batch :: len(self)].tolist()

    def __len__(self) -> int:
        return -(-self.targets.ids.shape[1] // self.batch_size)
