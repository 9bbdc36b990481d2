"""How well cosine similarities agree with human scores of sentence pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.similarity.compare import score_pairs


@dataclass(frozen=True)
class StsResult:
    """Correlations of cosine and human score, each times 100.

    :param spearman: rank correlation, the measure that leaderboards quote.
    :param pearson: linear correlation.
    """

    pairs: int
    spearman: float
    pearson: float


def evaluate_sts(
    model: Embedder, left: Sequence[str], right: Sequence[str], scores: npt.ArrayLike
) -> StsResult:
    """Compare the cosine of pairs of texts with human scores.

    :param left: n texts.
    :param right: n texts, the other side of each pair.
    :param scores: (n,) human scores on any scale.
    :raises ValueError: if lengths differ, a score is not finite, or all scores are the same.
    """
    from scipy.stats import pearsonr, spearmanr

    human = np.asarray(scores, np.float64)
    if not len(left) == len(right) == len(human):
        raise ValueError(
            f"pairs need equal lengths, got {len(left)}, {len(right)} and {len(human)}"
        )
    if not np.isfinite(human).all() or len(np.unique(human)) < 2:
        raise ValueError(
            "scores must be finite and not all the same: a correlation needs a difference"
        )
    vectors = model.encode([*left, *right])
    cosines = score_pairs(vectors[: len(left)], vectors[len(left) :], "cosine")
    if np.ptp(cosines) == 0:  # a constant has no correlation
        return StsResult(len(human), float("nan"), float("nan"))
    return StsResult(
        len(human),
        100 * float(spearmanr(cosines, human).statistic),
        100 * float(pearsonr(cosines, human).statistic),
    )
