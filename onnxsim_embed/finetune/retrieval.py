"""How well a model finds the target of a source among all targets, and orders pairs as their scores do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.finetune.pairs import TextPairs
from onnxsim_embed.similarity.compare import score_pairs, top_k

Float32 = npt.NDArray[np.float32]

# From texts and a prompt to vectors (n, dim).
Encode = Callable[[list[str], str], Float32]

DEPTH = 10

# A scored pair counts as one that belongs together from here on, as a part of the way from the lowest
# to the highest score: 4 of 5, where human scores say "equivalent but for details".
MATCH = 0.8


@dataclass(frozen=True)
class Task:
    """What to search with, what to search in, and what is right.

    :param queries: different sources of the judged pairs.
    :param corpus: different targets, those of the judged pairs first.
    :param relevant: for each query, the numbers of its targets in the corpus.
    :param scored: judged pairs with scores, or None.
    :param prompts: texts put before each query and each target.
    """

    queries: list[str]
    corpus: list[str]
    relevant: list[list[int]]
    scored: TextPairs | None
    prompts: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Metrics:
    """How good a model is at a task; None where the task has no such part.

    :param accuracy_at_1: share of queries whose first result is right.
    :param mrr_at_10: mean of 1 / rank of the first right result, 0 beyond the tenth.
    :param ndcg_at_10: normalized discounted cumulative gain of the first ten (Järvelin and Kekäläinen
        2002), with gain 1 for right results.
    :param spearman: rank correlation of cosine and score.
    """

    accuracy_at_1: float | None
    mrr_at_10: float | None
    ndcg_at_10: float | None
    spearman: float | None

    @property
    def main(self) -> float:
        """The one number that models are chosen by: Spearman where there are scores, else NDCG@10."""
        value = self.spearman if self.spearman is not None else self.ndcg_at_10
        assert value is not None
        return value

    def table(self) -> dict[str, float | None]:
        """Return the numbers by name, rounded as they are printed and saved."""
        return {k: None if v is None else round(v, 4) for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Measured:
    """A model's metrics at a task, and what they come from.

    :param first_right: bool array (queries,), whether the first result is right.
    :param vectors: float32 array (queries + targets, dim); or, where no pair counts as a match, those of
        the scored pairs.
    """

    metrics: Metrics
    first_right: npt.NDArray[np.bool_]
    vectors: Float32


def make_task(
    judged: TextPairs,
    others: Sequence[TextPairs],
    most: int,
    seed: int,
    prompts: tuple[str, str] = ("", ""),
) -> Task:
    """Say what judged pairs ask of a model.

    :param others: pairs whose targets are searched too, and whose pairings are right as well.
    :param most: at most so many targets are searched; beyond, a random part of those of `others`.
    :param prompts: see `Task`.
    """
    matching = [_matches(pairs) for pairs in (judged, *others)]
    corpus = list(dict.fromkeys(matching[0].targets))
    if not corpus:
        return Task([], [], [], judged, prompts)
    known = set(corpus)
    rest = [t for pairs in (judged, *others) for t in pairs.targets if t not in known]
    rest = list(dict.fromkeys(rest))
    if (room := max(0, most - len(corpus))) < len(rest):
        chosen = np.random.default_rng(seed).choice(len(rest), room, replace=False)
        rest = [rest[i] for i in sorted(chosen.tolist())]
    corpus += rest
    number = {text: i for i, text in enumerate(corpus)}
    right: dict[str, set[int]] = {source: set() for source in matching[0].sources}
    for pairs in matching:
        for source, target in zip(pairs.sources, pairs.targets, strict=True):
            if source in right and target in number:
                right[source].add(number[target])
    scored = None if judged.scores is None else judged
    return Task(list(right), corpus, [sorted(rows) for rows in right.values()], scored, prompts)


def _matches(pairs: TextPairs) -> TextPairs:
    if pairs.scores is None or not len(pairs):
        return pairs
    scores = np.asarray(pairs.scores)
    bar = scores.min() + MATCH * np.ptp(scores)
    return pairs.rows(np.flatnonzero(scores >= bar).tolist())


def measure(encode: Encode, task: Task) -> Measured:
    """Measure a model at a task."""
    accuracy = mrr = ndcg = None
    hits = np.zeros((0, DEPTH), np.bool_)
    vectors = None
    if task.queries:
        vectors = np.concatenate(
            [encode(task.queries, task.prompts[0]), encode(task.corpus, task.prompts[1])]
        )
        queries, targets = vectors[: len(task.queries)], vectors[len(task.queries) :]
        found = top_k(queries, targets, min(DEPTH, len(targets))).indices
        hits = np.array(
            [np.isin(row, right) for row, right in zip(found, task.relevant, strict=True)]
        )
        accuracy, mrr, ndcg = _rank_metrics(hits, np.array([len(r) for r in task.relevant]))
    spearman = None
    if task.scored is not None:
        pair_vectors, spearman = _correlate(encode, task)
        vectors = pair_vectors if vectors is None else vectors
    assert vectors is not None
    return Measured(Metrics(accuracy, mrr, ndcg, spearman), hits[:, 0], vectors)


def _rank_metrics(
    hits: npt.NDArray[np.bool_], relevant: npt.NDArray[np.int64]
) -> tuple[float, float, float]:
    """Return accuracy@1, MRR@10 and NDCG@10.

    :param hits: bool array (queries, at most 10), whether each result is right, best first.
    :param relevant: int64 array (queries,), right targets there are.
    """
    ranks = np.arange(1, hits.shape[1] + 1)
    reciprocal = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0)
    discounts = 1 / np.log2(ranks + 1)
    best = np.cumsum(discounts)[np.minimum(relevant, hits.shape[1]) - 1]
    return (
        float(hits[:, 0].mean()),
        float(reciprocal.mean()),
        float(((hits * discounts).sum(axis=1) / best).mean()),
    )


def _correlate(encode: Encode, task: Task) -> tuple[Float32, float]:
    from scipy.stats import spearmanr

    scored = task.scored
    assert scored is not None
    vectors = np.concatenate(
        [
            encode(list(scored.sources), task.prompts[0]),
            encode(list(scored.targets), task.prompts[1]),
        ]
    )
    cosines = score_pairs(vectors[: len(scored)], vectors[len(scored) :], "cosine")
    scores: Any = scored.scores
    if np.ptp(cosines) == 0 or np.ptp(scores) == 0:  # a constant has no ranks to agree with
        return vectors, 0.0
    return vectors, float(spearmanr(cosines, scores).statistic)
