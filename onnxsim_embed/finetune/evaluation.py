"""Evaluation of a model on pairs: sentence-transformers' evaluators, for its models and for ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


class _KeepsEmbeddings:
    """Encodes with a SentenceTransformer or an Embedder, and keeps the embeddings for comparison."""

    embeddings: tuple[npt.NDArray[np.float32], ...] = ()

    def embed_inputs(
        self,
        model: SentenceTransformer | Embedder,
        sentences: Sequence[str],
        prompt: str = "",
        **_: object,
    ) -> torch.Tensor:
        embeddings = model.encode(list(sentences), prompt=prompt, show_progress_bar=False)
        embeddings = np.asarray(embeddings, np.float32)
        self.embeddings = (*self.embeddings[-1:], embeddings)  # an evaluation encodes two lists
        return torch.from_numpy(embeddings)

    def store_metrics_in_model_card_data(self, *_: object) -> None:
        """Metrics are in report.json; an Embedder has no card data."""


class RetrievalEvaluator(_KeepsEmbeddings, InformationRetrievalEvaluator):  # type: ignore[misc]
    """Search of targets with sources, where a relevant target loses ties."""

    first_hits: Sequence[bool] = ()

    def compute_metrics(self, queries_result_list: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Compute the metrics, and note for which queries the first result is relevant."""
        hits = []
        for query, results in zip(self.queries_ids, queries_result_list, strict=True):
            relevant = self.relevant_docs[query]
            for result in results:
                result["score"] -= TIE * (result["corpus_id"] in relevant)
            best = min(results, key=lambda result: (-result["score"], result["corpus_id"]))
            hits.append(best["corpus_id"] in relevant)
        self.first_hits = hits
        return super().compute_metrics(queries_result_list)


class ScoreEvaluator(_KeepsEmbeddings, EmbeddingSimilarityEvaluator):  # type: ignore[misc]
    """Rank correlation of cosine and score."""


Evaluators = list[RetrievalEvaluator | ScoreEvaluator]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model.

    :param metrics: by the keys of METRICS' values; None for those that do not apply.
    :param first_hits: bool array (queries,), whether the nearest target is relevant.
    :param embeddings: float32 array of all evaluated texts, (n, dim).
    """

    metrics: Mapping[str, float | None]
    first_hits: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[np.float32]

    @property
    def main(self) -> float:
        """The metric that models are compared by: Spearman for scored pairs, else NDCG@10."""
        spearman, ndcg = self.metrics["spearman"], self.metrics["ndcg_at_10"]
        return spearman if spearman is not None else ndcg or 0.0


def make_evaluators(
    pairs: TextPairs,
    others: Sequence[TextPairs],
    max_targets: int,
    seed: int,
    prompts: tuple[str, str] = ("", ""),
) -> Evaluators:
    """Return the evaluators of pairs; the last one has the main metric.

    Texts that differ only in case and whitespace are one target.

    :param others: pairs whose targets are searched too, and whose pairings are relevant as well.
    :param max_targets: more targets of `others` than this are sampled.
    :param prompts: of sources and of targets.
    """
    relevant_pairs = [_relevant(part) for part in (pairs, *others)]
    queries = _distinct(relevant_pairs[0].sources)
    texts = _distinct(relevant_pairs[0].targets)
    evaluators: Evaluators = []
    if queries:
        rest = _distinct(target for part in (pairs, *others) for target in part.targets)
        keys = [key for key in rest if key not in texts]
        if (room := max(0, max_targets - len(texts))) < len(keys):
            chosen = np.random.default_rng(seed).choice(len(keys), room, replace=False)
            keys = [keys[i] for i in sorted(chosen.tolist())]
        corpus = texts | {key: rest[key] for key in keys}
        rows = {key: row for row, key in enumerate(corpus)}
        relevant: dict[str, set[int]] = {key: set() for key in queries}
        for part in relevant_pairs:
            for source, target in zip(part.sources, part.targets, strict=True):
                if (key := normalize(source)) in relevant and normalize(target) in rows:
                    relevant[key].add(rows[normalize(target)])
        # At rank 10 ties go to the lowest id: not to the evaluated targets.
        ids = [f"{len(corpus) - row:09d}" for row in range(len(corpus))]
        retrieval = RetrievalEvaluator(
            queries,
            dict(zip(ids, corpus.values(), strict=True)),
            {query: {ids[row] for row in targets} for query, targets in relevant.items()},
            accuracy_at_k=[1],
            precision_recall_at_k=[1],
            map_at_k=[1],
            write_csv=False,
            score_functions={"cosine": cos_sim},
            query_prompt=prompts[0],
            corpus_prompt=prompts[1],
        )
        retrieval.primary_metric = "cosine_ndcg@10"
        evaluators.append(retrieval)
    if pairs.scores is not None:
        scored = ScoreEvaluator(
            list(pairs.sources),
            list(pairs.targets),
            list(pairs.scores),
            main_similarity="cosine",
            write_csv=False,
        )
        scored.primary_metric = "spearman_cosine"
        evaluators.append(scored)
    return evaluators


def evaluate(model: SentenceTransformer | Embedder, evaluators: Evaluators) -> Evaluation:
    """Evaluate a model. The correlation is 0 where all cosines or all scores are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        results = {k: v for evaluator in evaluators for k, v in evaluator(model).items()}
    return Evaluation(
        {name: finite(results[key]) if key in results else None for key, name in METRICS.items()},
        np.array(getattr(evaluators[0], "first_hits", ()), np.bool_),
        np.concatenate(evaluators[0].embeddings),
    )


def finite(metric: float) -> float:
    """Return a metric, or 0 if it is undefined."""
    return float(metric) if math.isfinite(metric) else 0.0


def _distinct(texts: Iterable[str]) -> dict[str, str]:
    """Return the first text of each normalized form."""
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
