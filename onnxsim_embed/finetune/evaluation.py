"""Evaluation on pairs, for sentence-transformers' models and for ours: search, and rank correlation of scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr
from sentence_transformers.evaluation import SentenceEvaluator

from onnxsim_embed.finetune.pairs import TextPairs, normalize
from onnxsim_embed.similarity.compare import score_pairs, top_k
from onnxsim_embed.system.arrays import Float32

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from onnxsim_embed.runtime.embedder import Embedder

# A scored pair counts as relevant from this fraction of the score range on: 4 of 5, where human scores
# say "equivalent but for details".
RELEVANT_SCORE = 0.8

# Cosines closer than float32 rounds them are ties.
TIE = 1e-6


class Evaluation(NamedTuple):
    """Metrics by their keys in report.json, which queries found a relevant target first, and the embeddings."""

    metrics: dict[str, Any]  # numbers; None for the correlation of pairs without scores
    first_hits: npt.NDArray[np.bool_]
    embeddings: Float32


class PairEvaluator(SentenceEvaluator):  # type: ignore[misc]
    """Search of targets with sources, where a relevant target loses ties, and correlation of scored pairs.

    :param others: pairs whose targets are searched too, and whose pairings are relevant as well.
    :param max_targets: more targets of `others` than this are sampled.
    :param prompts: of sources and of targets.
    """

    def __init__(
        self,
        pairs: TextPairs,
        others: Sequence[TextPairs],
        max_targets: int,
        seed: int,
        prompts: tuple[str, str] = ("", ""),
    ) -> None:
        super().__init__()
        self.primary_metric = "ndcg_at_10" if pairs.scores is None else "spearman"
        self.pairs, self.prompts = pairs, prompts
        relevant_pairs = [_relevant(part) for part in (pairs, *others)]
        queries = _distinct(relevant_pairs[0].sources)
        own = _distinct(relevant_pairs[0].targets)
        targets = _distinct(target for part in (pairs, *others) for target in part.targets)
        rest = sample([key for key in targets if key not in own], max_targets - len(own), seed)
        # Own targets last: of equal scores, top_k returns the first.
        corpus = {key: targets[key] for key in rest} | own
        self.queries, self.targets = list(queries.values()), list(corpus.values())
        rows = {key: row for row, key in enumerate(corpus)}
        self.relevant: dict[str, set[int]] = {key: set() for key in queries}
        for part in relevant_pairs:
            for source, target in zip(part.sources, part.targets, strict=True):
                if (key := normalize(source)) in queries and normalize(target) in rows:
                    self.relevant[key].add(rows[normalize(target)])

    def __call__(self, model: SentenceTransformer, *_: object, **__: object) -> dict[str, float]:
        """Return the main metric, for the trainer."""
        scored = self.primary_metric == "spearman"
        value = self.correlate(model) if scored else self.search(model).metrics["ndcg_at_10"]
        return {self.primary_metric: value}

    def evaluate(self, model: SentenceTransformer | Embedder) -> Evaluation:
        """Return all metrics of a model."""
        found = self.search(model)
        if self.primary_metric == "spearman":
            found.metrics["spearman"] = self.correlate(model)
        return found

    def search(self, model: SentenceTransformer | Embedder) -> Evaluation:
        """Return accuracy@1, MRR@10 and NDCG@10."""
        sources, targets = self._encode(model, self.queries, self.targets)
        best = top_k(_finite(sources), _finite(targets), min(10, len(targets)))
        rows = zip(best.indices, self.relevant.values(), strict=True)
        hits = np.array([np.isin(found, list(relevant)) for found, relevant in rows])
        order = np.argsort(-(best.scores - TIE * hits), axis=1, kind="stable")
        hits = np.take_along_axis(hits, order, axis=1)
        ranks = np.arange(1, hits.shape[1] + 1)
        gains = 1 / np.log2(ranks + 1)
        ideal = np.array([gains[: len(relevant)].sum() for relevant in self.relevant.values()])
        metrics = {
            "accuracy_at_1": float(hits[:, 0].mean()),
            "mrr_at_10": float((hits / ranks).max(axis=1).mean()),
            "ndcg_at_10": float((hits @ gains / ideal).mean()),
            "spearman": None,
        }
        return Evaluation(metrics, hits[:, 0], np.concatenate([sources, targets]))

    def correlate(self, model: SentenceTransformer | Embedder) -> float:
        """Return Spearman's correlation of cosines and scores; 0 where all of either are equal."""
        left, right = self._encode(model, self.pairs.sources, self.pairs.targets)
        cosines = score_pairs(_finite(left), _finite(right), "cosine")
        scores = np.asarray(self.pairs.scores)
        if not (np.ptp(cosines) and np.ptp(scores)):
            return 0.0
        return float(spearmanr(cosines, scores).statistic)

    def _encode(
        self, model: SentenceTransformer | Embedder, *sides: Sequence[str]
    ) -> list[Float32]:
        both = zip(sides, self.prompts, strict=True)
        encoded = (model.encode(texts, prompt=p, show_progress_bar=False) for texts, p in both)
        return [np.asarray(vectors, np.float32) for vectors in encoded]


def _finite(vectors: Float32) -> Float32:
    """Return vectors that score 0 where a model diverged, which `finetune` reports."""
    return np.nan_to_num(vectors, posinf=0, neginf=0)


def sample(texts: list[str], size: int, seed: int) -> list[str]:
    """Return at most `size` texts, sampled at random, in their order."""
    if len(texts) <= max(0, size):
        return texts
    chosen = np.random.default_rng(seed).choice(len(texts), max(0, size), replace=False)
    return [texts[i] for i in sorted(chosen.tolist())]


def _distinct(texts: Iterable[str]) -> dict[str, str]:
    """Return the first text of each form that differs by more than case and whitespace."""
    distinct: dict[str, str] = {}
    for text in texts:
        distinct.setdefault(normalize(text), text)
    return distinct


def _relevant(pairs: TextPairs) -> TextPairs:
    """Return the pairs whose texts belong together: all, or those of high scores."""
    if pairs.scores is None or not len(pairs):
        return pairs
    scores = np.asarray(pairs.scores)
    lowest = scores.min() + RELEVANT_SCORE * np.ptp(scores)
    return pairs.rows(np.flatnonzero(scores >= lowest).tolist())
