"""Exact scores of pairs of unit rows."""

from __future__ import annotations

import threading

import numpy as np

from onnxsim_embed.similarity.candidates import rounding_bound
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.threads import row_chunks

# Copied rows of pairs that are scored at once: more leave the caches. numpy holds the interpreter's lock
# while it multiplies fewer than 500 pairs, and other threads wait.
PAIR_BYTES, MIN_PAIRS = 1 << 20, 512

# Share of a tile from which on the products of all its pairs, which need no copies, are faster.
DENSE_SHARE = 0.25

_thread = threading.local()


def exact_scores(left: Float32, right: Float32, rows: Int64, columns: Int64) -> Float32:
    """Return the score of each pair, computed on its own; fastest if pairs are sorted by row.

    It is BLAS's dot product of the two rows, in the range of a cosine, and 1 for equal rows.
    """
    if len(rows) > DENSE_SHARE * len(left) * len(right):
        tile = np.empty((len(left), len(right)), np.float32)
        scores = _dot(left[:, None], right[None], tile)[rows, columns]
    else:
        scores = np.empty(len(rows), np.float32)
        a, b = _buffers(len(rows), left.shape[1])
        for pairs in row_chunks(len(rows), len(a)):
            size = pairs.stop - pairs.start
            x = left.take(rows[pairs], axis=0, out=a[:size], mode="clip")
            y = right.take(columns[pairs], axis=0, out=b[:size], mode="clip")
            _dot(x, y, scores[pairs])
    near = np.flatnonzero(scores > 1 - rounding_bound(left.shape[1]))
    for pairs in row_chunks(len(near), MIN_PAIRS):
        chosen = near[pairs]
        equal = (left[rows[chosen]] == right[columns[chosen]]).all(axis=1)
        scores[chosen[equal]] = 1  # whatever the rounding, as is the clipping
    return np.clip(scores, np.float32(-1), np.float32(1), out=scores)


def _buffers(pairs: int, dim: int) -> Float32:
    """Return the thread's memory for rows of pairs, (2, m, dim): new memory would cost as much as scores."""
    pairs = max(1, min(pairs, max(MIN_PAIRS, PAIR_BYTES // (4 * max(1, dim)))))
    held: Float32 | None = getattr(_thread, "buffers", None)
    if held is None or held.shape[1] < pairs or held.shape[2] != dim:
        held = _thread.buffers = np.empty((2, pairs, dim), np.float32)
    return held


def _dot(left: Float32, right: Float32, out: Float32) -> Float32:
    # A row times a column, pair by pair: BLAS's dot product, which depends on nothing else.
    np.matmul(left[..., None, :], right[..., None], out=out[..., None, None])
    return out


def dense_scores(left: Float32, right: Float32) -> Float32:
    """Return the scores of all pairs, in the range of a cosine, and 1 for equal rows."""
    scores = np.clip(left @ right.T, np.float32(-1), np.float32(1))
    near = scores > 1 - rounding_bound(left.shape[1])
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    if len(rows):
        both = np.concatenate([left[rows], right[columns]]) + np.float32(0)  # no negative zeros
        _, equal = np.unique(both.view(f"V{both[0].nbytes}")[:, 0], return_inverse=True)
        first, second = np.nonzero(equal[: len(rows), None] == equal[len(rows) :])
        scores[rows[first], columns[second]] = 1
    return scores
