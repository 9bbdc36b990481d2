"""float32 weights -> int8 weights: scales for each output channel, and rounding that sees the input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri

from onnxsim_embed.export.bert import Int8Table

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

LARGEST = 127  # symmetric: -128 has no counterpart

# Added to the diagonal of the inputs' second moments, as a share of its mean (GPTQ's own choice).
DAMPING = 0.01

# Rows of the weight whose errors are passed on one by one before the rest is updated at once.
BLOCK_ROWS = 64


def weight_scales(weight: Float32) -> Float32:
    """Return the symmetric scale of each output channel, float32 array (out_features,)."""
    scales = np.abs(weight).max(axis=0) / np.float32(LARGEST)
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def round_nearest(weight: Float32) -> tuple[Int8, Float32]:
    """Quantize a weight, each value to the nearest step.

    :param weight: float32 array (in_features, out_features).
    :returns: int8 array of the same shape within [-127, 127], float32 scales (out_features,).
    """
    scales = weight_scales(weight)
    return np.rint(weight / scales).astype(np.int8), scales


def round_weight(weight: Float32, inputs: Float32) -> tuple[Int8, Float32]:
    """Quantize a weight so that inputs @ weight changes least (GPTQ, Frantar et al., arXiv:2210.17323).

    Rows are rounded in turn, the one with the largest inputs first; each rounding error is made up
    for by the rows still to come, as far as the inputs are correlated.

    :param weight: float32 array (in_features, out_features).
    :param inputs: float32 array (tokens, in_features), as the int8 model will see them.
    :returns: int8 array of the same shape, float32 scales (out_features,).
    """
    scales = weight_scales(weight)
    moments = (inputs.T @ inputs).astype(np.float64)
    mean = float(np.diag(moments).mean())
    if mean == 0:
        return np.clip(np.rint(weight / scales), -LARGEST, LARGEST).astype(np.int8), scales
    moments[np.diag_indices(len(moments))] += DAMPING * mean
    order = np.argsort(-np.diag(moments), kind="stable")
    upper = inverse_factor(moments[np.ix_(order, order)]).astype(np.float32)
    rest = weight[order]
    steps = np.empty(weight.shape, np.float32)
    for start in range(0, len(rest), BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, len(rest))
        errors = np.empty((end - start, weight.shape[1]), np.float32)
        for row in range(start, end):
            steps[row] = np.clip(np.rint(rest[row] / scales), -LARGEST, LARGEST)
            errors[row - start] = (rest[row] - steps[row] * scales) / upper[row, row]
            rest[row + 1 : end] -= upper[row, row + 1 : end, None] * errors[row - start]
        rest[end:] -= upper[start:end, end:].T @ errors
    rounded = np.empty(weight.shape, np.int8)
    rounded[order] = steps.astype(np.int8)
    return rounded, scales


def inverse_factor(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the upper triangular U with U.T @ U = inverse of a positive definite matrix.

    Row i of U holds what an error in row i asks of the rows after it. Factoring the matrix from its
    last row backwards gives U's inverse at once, for half the work of inverting first.
    """
    backwards = cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
    factor, _ = dtrtri(backwards[::-1, ::-1], lower=0)
    return np.asarray(factor)


def round_table(table: Float32) -> Int8Table:
    """Quantize an embedding table, one scale for each row.

    :param table: float32 array (rows, hidden).
    """
    values, scales = round_nearest(table.T)
    return Int8Table(np.ascontiguousarray(values.T), scales)
