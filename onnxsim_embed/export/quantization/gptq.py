"""float32 weights -> int8 weights with one scale per output channel: nearest rounding and GPTQ."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import cholesky, solve
from scipy.linalg.lapack import dtrtri

from onnxsim_embed.export.encoder import Int8Table
from onnxsim_embed.system.arrays import Float32

Int8 = npt.NDArray[np.int8]

INT8_MAX = 127  # symmetric: -128 has no counterpart
# Share of the second moments' mean added to their diagonal. GPTQ takes a hundredth; with hardly more
# sampled tokens than channels, a tenth was better on unseen texts.
DAMPING = 0.1
# The same where weights absorb the error of their inputs: what few tokens say is believed little.
RIDGE = 5
BLOCK_ROWS = 64  # rows that propagate errors one by one before all later rows are updated


def channel_scales(weight: Float32) -> Float32:
    """Return the symmetric scale of each output channel."""
    scales = np.abs(weight).max(axis=0) / np.float32(INT8_MAX)
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def quantize_nearest(weight: Float32) -> tuple[Int8, Float32]:
    """Round a weight (in_features, out_features) to the nearest levels; return int8 and scales."""
    scales = channel_scales(weight)
    return np.rint(weight / scales).astype(np.int8), scales


def quantize_gptq(weight: Float32, inputs: Float32) -> tuple[Int8, Float32]:
    """Quantize a weight, minimizing the change of inputs @ weight (GPTQ, arXiv:2210.17323).

    Rows are rounded in turn, the one with the largest inputs first; the remaining rows compensate
    each rounding error as far as the inputs (tokens, in_features) are correlated.
    """
    moments = (inputs.T @ inputs).astype(np.float64)
    mean = float(np.diag(moments).mean())
    if mean == 0:
        return quantize_nearest(weight)
    scales = channel_scales(weight)
    moments[np.diag_indices(len(moments))] += DAMPING * mean
    order = np.argsort(-np.diag(moments), kind="stable")
    upper = inverse_cholesky(moments[np.ix_(order, order)]).astype(np.float32)
    remaining = weight[order]
    levels = np.empty(weight.shape, np.float32)
    for start in range(0, len(remaining), BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, len(remaining))
        errors = np.empty((end - start, weight.shape[1]), np.float32)
        for row in range(start, end):
            levels[row] = np.clip(np.rint(remaining[row] / scales), -INT8_MAX, INT8_MAX)
            errors[row - start] = (remaining[row] - levels[row] * scales) / upper[row, row]
            remaining[row + 1 : end] -= upper[row, row + 1 : end, None] * errors[row - start]
        remaining[end:] -= upper[start:end, end:].T @ errors
    quantized = np.empty(weight.shape, np.int8)
    quantized[order] = levels.astype(np.int8)
    return quantized, scales


def absorb_error(weight: Float32, exact: Float32, inputs: Float32) -> Float32:
    """Return the weight with which quantized inputs give most nearly what exact ones give with `weight`.

    Ridge regression of the difference, as in asymmetric calibration (GPTAQ, arXiv:2504.02692), up to a
    constant, which is the bias's.
    """
    centred = inputs - inputs.mean(axis=0)
    moments = centred.T @ centred
    moments[np.diag_indices(len(moments))] += RIDGE * float(np.diag(moments).mean()) + 1e-6
    error = centred.T @ ((exact - inputs) @ weight)
    change = solve(moments, error, assume_a="pos", check_finite=False, overwrite_a=True)
    return np.asarray(weight + change, np.float32)


def inverse_cholesky(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the upper triangular U with U.T @ U = inverse of a positive definite matrix.

    Factoring the matrix from its last row backwards gives U's inverse directly, for half the work of
    inverting first.
    """
    backwards = cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
    factor, _ = dtrtri(backwards[::-1, ::-1], lower=0)
    return np.asarray(factor)


def quantize_table(table: Float32) -> Int8Table:
    """Quantize an embedding table (rows, hidden), one scale per row."""
    values, scales = quantize_nearest(table.T)
    return Int8Table(np.ascontiguousarray(values.T), scales)
