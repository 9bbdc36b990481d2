"""Evaluation on pairs with sentence-transformers' evaluators, for its models and for ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import ConstantInputWarning
from sentence_transformers.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.util import cos_sim

from onnxsim_embed.finetune.pairs import TextPairs, normalize

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from onnxsim_embed.runtime.embedder import Embedder

# A scored pair counts as relevant from this fraction of the score range on: 4 of 5, where human scores
# say "equivalent but for details".
RELEVANT_SCORE = 0.8

# Cosines closer than float32 rounds them are ties.
TIE = 1e-6

# Keys of report.json, by the name of sentence-transformers' metric.
METRICS = {
    "cosine_accuracy@1": "accuracy_at_1",
    "cosine_mrr@10": "mrr_at_10",
    "cosine_ndcg@10": "ndcg_at_10",
    "spearman_cosine": "spearman",
}


class RetrievalEvaluator(InformationRetrievalEvaluator):  # type: ignore[misc]
    """Search of targets with sources, where a relevant target loses ties."""

    first_hits: Sequence[bool] = ()

    def compute_metrics(self, queries_result_list: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Compute the metrics, and note for which queries the first result is relevant."""
        self.first_hits = []
        for query, results in zip(self.queries_ids, queries_result_list, strict=True):
            relevant = self.relevant_docs[query]
            for result in results:
                result["score"] -= TIE * (result["corpus_id"] in relevant)
            best = min(results, key=lambda result: (-result["score"], result["corpus_id"]))
            self.first_hits.append(best["corpus_id"] in relevant)
        return super().compute_metrics(queries_result_list)


Evaluators = list[RetrievalEvaluator | EmbeddingSimilarityEvaluator]


class Evaluation(NamedTuple):
    """Metrics by the values of METRICS, which queries found a relevant target first, and all embeddings."""

    metrics: Mapping[str, float | None]
    first_hits: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[np.float32]

    @property
    def main(self) -> float:
        """The metric that models are compared by: Spearman for scored pairs, else NDCG@10."""
        spearman = self.metrics["spearman"]
        return spearman if spearman is not None else self.metrics["ndcg_at_10"] or 0.0


def make_evaluators(
    pairs: TextPairs,
    others: Sequence[TextPairs],
    max_targets: int,
    seed: int,
    prompts: tuple[str, str] = ("", ""),
) -> Evaluators:
    """Return the evaluators of pairs; the last one has the main metric.

    :param others: pairs whose targets are searched too, and whose pairings are relevant as well.
    :param max_targets: more targets of `others` than this are sampled.
    :param prompts: of sources and of targets.
    """
    relevant_pairs = [_relevant(part) for part in (pairs, *others)]
    queries = _distinct(relevant_pairs[0].sources)
    corpus = _distinct(relevant_pairs[0].targets)
    evaluators: Evaluators = []
    if queries:
        targets = _distinct(target for part in (pairs, *others) for target in part.targets)
        rest = [key for key in targets if key not in corpus]
        corpus |= {key: targets[key] for key in sample(rest, max_targets - len(corpus), seed)}
        # At rank 10 ties go to the lowest id: not to the evaluated targets.
        ids = {key: f"{len(corpus) - row:09d}" for row, key in enumerate(corpus)}
        relevant: dict[str, set[str]] = {key: set() for key in queries}
        for part in relevant_pairs:
            for source, target in zip(part.sources, part.targets, strict=True):
                if (key := normalize(source)) in relevant and normalize(target) in ids:
                    relevant[key].add(ids[normalize(target)])
        documents = {ids[key]: target for key, target in corpus.items()}
        options: dict[str, Any] = {"query_prompt": prompts[0], "corpus_prompt": prompts[1]}
        options |= {f"{metric}_at_k": [1] for metric in ("accuracy", "precision_recall", "map")}
        options |= {"score_functions": {"cosine": cos_sim}, "write_csv": False}
        evaluators.append(RetrievalEvaluator(queries, documents, relevant, **options))
    if pairs.scores is not None:
        columns = (list(pairs.sources), list(pairs.targets), list(pairs.scores))
        evaluators.append(
            EmbeddingSimilarityEvaluator(*columns, main_similarity="cosine", write_csv=False)
        )
    return evaluators


def sample(texts: list[str], size: int, seed: int) -> list[str]:
    """Return at most `size` texts, sampled at random, in their order."""
    if len(texts) <= max(0, size):
        return texts
    chosen = np.random.default_rng(seed).choice(len(texts), max(0, size), replace=False)
    return [texts[i] for i in sorted(chosen.tolist())]


def evaluate(model: SentenceTransformer | Embedder, evaluators: Evaluators) -> Evaluation:
    """Evaluate a model. An undefined correlation, where all cosines or all scores are equal, is 0."""
    embeddings: list[npt.NDArray[np.float32]] = []

    def encode(texts: list[str], prompt: str | None = None, **_: object) -> torch.Tensor:
        vectors = model.encode(texts, prompt=prompt or "", show_progress_bar=False)
        embeddings.append(np.asarray(vectors, np.float32))
        return torch.from_numpy(embeddings[-1])

    card = SimpleNamespace(set_evaluation_metrics=lambda *_: None)
    recorder = SimpleNamespace(
        encode=encode, encode_query=encode, encode_document=encode, model_card_data=card
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        results = {k: finite(v) for evaluator in evaluators for k, v in evaluator(recorder).items()}
    return Evaluation(
        {name: results.get(key) for key, name in METRICS.items()},
        np.array(getattr(evaluators[0], "first_hits", ()), np.bool_),
        np.concatenate(embeddings[:2]),
    )


def finite(metric: float) -> float:
    """Return a metric, or 0 if it is undefined."""
    return float(metric) if math.isfinite(metric) else 0.0


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
