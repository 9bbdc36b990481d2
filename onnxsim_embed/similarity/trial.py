"""Choice of the candidate scorer that takes the least time, estimated on a sample of the pairs.

A comparison takes the time of its products, which is measured, and that of the exact scores of its
candidates, whose number follows from the sample's scores and the scorer's error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from onnxsim_embed.similarity.candidates import (
    INT8_COLUMNS,
    Float32Scorer,
    Int8Scorer,
    PrefixRotation,
    int8_scoring_supported,
    principal_axes,
    rounding_bound,
)
from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.threads import row_chunks, single_blas_thread

ROWS, COLUMNS = 256, 2048  # of the sample
MIN_PAIRS, MIN_ROWS = 1 << 24, 6144  # below which a trial costs more than it saves
PREFIX_PAIRS, PREFIX_DIM = 1 << 27, 48  # from which on prefixes are worth their rotations
PREFIX_PARTS = (6, 4, 3, 2)  # of the dimension that are tried, the shortest first
PREFIX_COST = 0.85  # of the whole, at most: rows must be projected

# Time of the selection of candidates beside that of a product of all components.
SELECTION = 0.1

MakeScorer = Callable[..., Float32Scorer]  # of left and right
Limits = Callable[[slice, slice, Float32], float | Float32]


def choose_scorer(
    left: Float32,
    right: Float32,
    limits: Limits,
    *,
    prefix: bool = False,
    kind: MakeScorer | None = None,
) -> MakeScorer:
    """Return the fastest scorer of candidates.

    :param limits: what exact scores must exceed, broadcastable to the scores of a sample, from the
        sample's rows, columns and scores.
    :param prefix: try prefixes, for at least PREFIX_PAIRS pairs.
    :param kind: the scorer of all components; None chooses it.
    """
    pairs, dim = len(left) * len(right), left.shape[1]
    prefix = prefix and pairs >= PREFIX_PAIRS and dim >= PREFIX_DIM
    if len(left) < MIN_ROWS or pairs < MIN_PAIRS or not (prefix or kind is None):
        return kind or Float32Scorer
    kinds = [Float32Scorer, *[Int8Scorer] * int8_scoring_supported(dim)]
    with single_blas_thread():  # others would wait busily, and steal the time of what follows
        trial = _Trial(left, right, limits)
        fastest: MakeScorer = min([kind] if kind else kinds, key=trial.cost)
        return trial.prefix(fastest) if prefix else fastest


class _Trial:
    """A sample of the pairs of two sets of unit rows, with what its exact scores must exceed."""

    def __init__(self, left: Float32, right: Float32, limits: Limits) -> None:
        rows, columns = _spread(len(left), ROWS), _spread(len(right), COLUMNS)
        self._left, self._right = map(np.ascontiguousarray, (left[rows], right[columns]))
        started = time.thread_time()
        self._scores = self._left @ self._right.T
        seconds = time.thread_time() - started
        self._limits = limits(rows, columns, self._scores)
        row = np.arange(8 * ROWS) // 8
        tile = self._right[:INT8_COLUMNS]
        score = partial(exact_scores, self._left, tile, row, np.arange(len(row)) % len(tile))
        self._pair_seconds = _seconds(score) / len(row)
        error = rounding_bound(left.shape[1])
        self._measured: dict[MakeScorer, tuple[float, float]] = {Float32Scorer: (seconds, error)}

    def cost(self, kind: MakeScorer) -> float:
        """Return the seconds that a scorer of all components takes for the sample."""
        if kind not in self._measured:
            scorer = kind(self._left, self._right)
            tiles = row_chunks(len(self._right), scorer.block_columns or len(self._right))
            rows = slice(0, len(self._left))
            product = _seconds(lambda: [scorer.scores(rows, tile) for tile in tiles])
            self._measured[kind] = product, scorer.error
        return self._cost(1, kind, self._scores)

    def prefix(self, kind: MakeScorer) -> MakeScorer:
        """Return the scorer, or the one of those of prefixes that takes clearly less time."""
        dim = self._left.shape[1]
        axes = principal_axes(self._right)
        first = axes[:, : dim // PREFIX_PARTS[-1]].astype(np.float32)
        costs: dict[int, float] = {}
        scores, start = np.zeros_like(self._scores), 0
        left, right = self._left @ first, self._right @ first
        for part in PREFIX_PARTS:
            stop = dim // part - 1  # one component is for the norm of the others
            scores += left[:, start:stop] @ right[:, start:stop].T
            a, b = (1 - np.square(rows[:, :stop]).sum(axis=1) for rows in (left, right))
            rest = np.sqrt(np.maximum(a, 0))[:, None] * np.sqrt(np.maximum(b, 0))
            costs[part] = self._cost(1 / part, kind, scores + rest)
            start = stop
        best = min(costs, key=costs.__getitem__)
        if costs[best] > PREFIX_COST * self._cost(1, kind, self._scores):
            return kind
        return partial(kind, rotation=PrefixRotation(axes, dim // best))

    def _cost(self, share: float, kind: MakeScorer, scores: Float32) -> float:
        product, error = self._measured[kind]
        found = np.count_nonzero(scores > self._limits - np.float32(error))
        return product * (share + SELECTION) + found * self._pair_seconds


def _spread(count: int, size: int) -> slice:
    """Return about `size` of the rows, evenly spread."""
    step = max(1, count // size)
    return slice(0, step * size, step)


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(2):  # the first one allocates, and starts onnxruntime
        started = time.thread_time()  # neither waiting nor other threads count
        run()
        times.append(time.thread_time() - started)
    return min(times)
