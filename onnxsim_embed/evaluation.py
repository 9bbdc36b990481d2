"""Agreement of cosine similarities with human scores of sentence pairs (STS)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.texts import check_iterable
from onnxsim_embed.similarity.compare import score_pairs

logger = logging.getLogger(__name__)

# Cosines that differ by less differ only by rounding: float32 sums of a few hundred products.
ROUNDING = 1e-6


@dataclass(frozen=True)
class StsResult:
    """Correlations of cosine similarity and human score, times 100; NaN if undefined.

    :param spearman: rank correlation, the measure of leaderboards.
    :param pearson: linear correlation.
    """

    pairs: int
    spearman: float
    pearson: float


def evaluate_sts(
    model: Embedder, left: Sequence[str], right: Sequence[str], scores: npt.ArrayLike
) -> StsResult:
    """Correlate the cosine similarities of pairs of texts with human scores.

    If the cosines are constant up to rounding, the correlations are undefined: NaN, with a logged warning.

    :param left: n texts.
    :param right: n texts, the other side of each pair.
    :param scores: (n,) human scores on any scale.
    :raises ValueError: if lengths differ, or the scores are not finite or constant.
    """
    from scipy.stats import pearsonr, spearmanr

    check_iterable(left)
    check_iterable(right)
    human = np.asarray(scores, np.float64)
    if not len(left) == len(right) == len(human):
        raise ValueError(
            f"pairs need equal lengths, got {len(left)}, {len(right)} and {len(human)}"
        )
    if not np.isfinite(human).all() or len(np.unique(human)) < 2:
        raise ValueError("scores must be finite, with at least two different values")
    vectors = model.encode([*left, *right])
    cosines = score_pairs(vectors[: len(left)], vectors[len(left) :], "cosine")
    if np.ptp(cosines) < ROUNDING:
        logger.warning(
            "the correlation is undefined: all %d pairs have the same cosine similarity, %.6f",
            len(human),
            cosines[0],
        )
        return StsResult(len(human), float("nan"), float("nan"))
    return StsResult(
        len(human),
        100 * float(spearmanr(cosines, human).statistic),
        100 * float(pearsonr(cosines, human).statistic),
    )
