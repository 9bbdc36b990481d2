"""Approximate scores with a guaranteed error bound, for candidate pruning.

A comparison scores every pair approximately and rescores the few candidates exactly. Approximate scores
are matrix products: in float32, whose last bits depend on the shape of the tile, or in int8, which
processors with VNNI multiply several times faster.

The int8 bound: with x = x' + e and y = y' + f (quantized rows and their quantization errors) and |x| = 1,
|x . y - x' . y'| = |x . f + e . y'| <= |f| + |e| (1 + |f|) by Cauchy-Schwarz. |e| and |f| are computed
for each row; x' . y' is a product of integers, hence exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.selection import Float32, Float64, Scores
from onnxsim_embed.system.hardware import CPU_PROVIDER, int8_supported
from onnxsim_embed.system.threads import map_chunks, row_chunks

# Of the columns, which one int8 step for all does not suit: they are compared in float32.
OUTLIER_SHARE = 0.01
INT8_COLUMNS = 1024  # of a product: 4 MB of scores for 1,024 rows; fewer cost more work per tile
QUANTIZED_ROWS = 1024  # at once: 1.5 MB of 384-dimensional float32 stay in a second-level cache


def rounding_bound(dim: int) -> float:
    """Return by how much two float32 computations of a cosine may differ (Higham, gamma_n, twice)."""
    return dim * 2.0**-23 + 1e-6


class Float32Scorer:
    """Approximate scores of unit rows by float32 matrix products; base of scorers in other units."""

    # Width of the blocks in which columns are stored, whose edges no tile may cross; None: no blocks.
    block_columns: int | None = None

    def __init__(self, left: Float32, right: Float32) -> None:
        self._left = left
        self._right = right
        self._error = rounding_bound(left.shape[1])

    def scores(self, rows: slice, columns: slice) -> Scores:
        """Return approximate scores, (rows, columns)."""
        return self._left[rows] @ self._right[columns].T

    def lower_bounds(self, rows: slice, exact: float | Float64) -> Scores:
        """Return (rows, 1): pairs whose exact score exceeds `exact` have a larger approximate score."""
        bounds = np.broadcast_to(exact, rows.stop - rows.start) - self._error
        return bounds.astype(np.float32)[:, None]

    def exact_lower_bounds(self, rows: slice, scores: Float64) -> Float64:
        """Return (rows,): the least exact score of pairs with at least these approximate scores."""
        return scores - 1.5 * self._error


class Int8Scorer(Float32Scorer):
    """Approximate scores by int8 products: uint8 rows with a step each, int8 columns with one step."""

    block_columns = INT8_COLUMNS

    def __init__(self, left: Float32, right: Float32) -> None:
        super().__init__(left, right)
        chunks = row_chunks(len(right), QUANTIZED_ROWS)
        largest = list(map_chunks(lambda chunk: _largest(right[chunk]), chunks))
        typical = _typical(np.concatenate([np.zeros(0, np.float32), *largest]))
        # No unit row has a smaller largest component, and larger products would not fit into int32.
        scale = np.float32(127 / max(typical, left.shape[1] ** -0.5))
        codes = np.empty(right.shape, np.int8)
        errors = np.empty(len(right), np.float32)

        def quantize(chunk: slice) -> None:
            rounded = np.clip(np.rint(right[chunk] * scale), -127, 127)
            codes[chunk] = rounded
            errors[chunk] = _norms(right[chunk] - rounded / scale)

        for _ in map_chunks(quantize, chunks):
            pass
        column_error = 1.1 * _typical(errors)
        self._outliers = np.flatnonzero(errors > column_error)
        self._columns = [
            np.ascontiguousarray(codes[block].T) for block in row_chunks(len(right), INT8_COLUMNS)
        ]
        self._rows = QuantizedRows(left.shape, left.__getitem__)
        self._units = float(scale) / self._rows.steps.astype(np.float64)
        added = added_error(self._rows.errors, column_error, left.shape[1])
        self._errors = column_error + added

    def scores(self, rows: slice, columns: slice) -> Scores:
        """Return approximate scores in units of the row, int32 (rows, columns)."""
        number, start = divmod(columns.start, INT8_COLUMNS)
        block = self._columns[number]
        stop = min(columns.stop - number * INT8_COLUMNS, block.shape[1])
        if (start, stop) != (0, block.shape[1]):
            block = np.ascontiguousarray(block[:, start:stop])
        scores = int8_matmul(self._rows.codes[rows], block)
        first, last = np.searchsorted(self._outliers, (columns.start, columns.stop))
        outliers = self._outliers[first:last]
        exact = self._left[rows] @ self._right[outliers].T
        scores[:, outliers - columns.start] = np.floor(exact * self._units[rows, None])
        return scores

    def lower_bounds(self, rows: slice, exact: float | Float64) -> Scores:
        """See `Float32Scorer`; int32."""
        bounds = np.floor((exact - self._errors[rows]) * self._units[rows]) - 1
        limits = np.iinfo(np.int32)
        return np.clip(bounds, limits.min, limits.max).astype(np.int32)[:, None]

    def exact_lower_bounds(self, rows: slice, scores: Float64) -> Float64:
        """See `Float32Scorer`."""
        return scores / self._units[rows] - self._errors[rows]


class QuantizedRows:
    """Unit rows as uint8 codes around 128, with a step and a quantization error (a norm) for each row."""

    def __init__(self, shape: tuple[int, ...], load: Callable[[slice], Float32]) -> None:
        self.codes = np.empty(shape, np.uint8)
        self.steps = np.empty(shape[0], np.float32)
        self.errors = np.empty(shape[0], np.float32)

        def quantize(chunk: slice) -> None:
            codes, steps, self.errors[chunk] = quantize_rows(load(chunk))
            self.codes[chunk] = codes + 128
            self.steps[chunk] = steps[:, 0]

        for _ in map_chunks(quantize, row_chunks(shape[0], QUANTIZED_ROWS)):
            pass


def quantize_rows(rows: Float32, max_code: int = 127) -> tuple[Float32, Float32, Float32]:
    """Return codes up to `max_code` (n, dim), the step (n, 1) and the quantization error (n,) of rows."""
    largest = _largest(rows)[:, None]
    steps = np.asarray(np.where(largest > 0, largest, np.float32(1)) / max_code, np.float32)
    codes = np.rint(rows / steps)
    return codes, steps, _norms(rows - codes * steps)


def added_error(errors: Float32, other: float, dim: int) -> Float64:
    """Return what one side's quantization errors add to the error of a score; `other`: the other side's."""
    # The norms, the steps, the approximate scores and the exact ones are float32 themselves.
    return errors.astype(np.float64) * (1 + other) * (1 + 1e-5) + rounding_bound(dim) + 2e-6


def int8_scoring_supported(dim: int) -> bool:
    """Return whether `Int8Scorer` is correct on this machine, where products must not saturate."""
    return dim <= 1 << 15 and int8_supported()[0] and onnxruntime_installed()


@cache
def onnxruntime_installed() -> bool:
    """Return whether onnxruntime, which multiplies in int8, can be imported."""
    try:
        import onnxsim_embed.system.onnx_session  # noqa: F401
    except ImportError:
        return False
    return True


def int8_matmul(
    left: npt.NDArray[np.uint8], right: npt.NDArray[np.int8], threads: int = 1, process: int = 0
) -> npt.NDArray[np.int32]:
    """Return (left - 128) @ right; a forked child, `process`, has none of its parent's `threads`."""
    feed = {"left": left, "right": right, "zero": np.array(128, np.uint8)}
    product: npt.NDArray[np.int32] = _matmul_session(threads, process).run(None, feed)[0]
    return product


@cache
def _matmul_session(threads: int, process: int) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    from onnxsim_embed.system.onnx_session import start_session

    graph = files("onnxsim_embed").joinpath("data/product.onnx").read_bytes()
    return start_session(graph, [CPU_PROVIDER], threads, spin=False)


def _typical(values: Float32) -> float:
    """Return what all but OUTLIER_SHARE of the values stay below."""
    return float(np.quantile(values, 1 - OUTLIER_SHARE)) if len(values) else 0.0


def _largest(rows: Float32) -> Float32:
    return np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))


def _norms(rows: npt.NDArray[Any]) -> Float32:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float32))
