"""Approximate scores with a guaranteed error bound, for candidate pruning.

A comparison scores every pair approximately and rescores the few candidates exactly. Approximate scores
are matrix products: in float32, whose last bits depend on the shape of the tile, or in int8, which
processors with VNNI multiply several times faster; of all components, or of a prefix in a rotated space.

The int8 bound: with x = x' + e and y = y' + f (quantized rows and their quantization errors) and |x| = 1,
|x . y - x' . y'| = |x . f + e . y'| <= |f| + |e| (1 + |f|) by Cauchy-Schwarz. x' . y' is a product of
integers, hence exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.selection import Float64, Scores
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import CPU_PROVIDER, int8_supported
from onnxsim_embed.system.threads import map_chunks, row_chunks, single_blas_thread

# Of the rows of a set, which one int8 step for all does not suit: they are compared in float32.
OUTLIER_SHARE = 0.0005
INT8_COLUMNS = 1024  # of a product: 4 MB of scores for 1,024 rows; fewer cost more work per tile
QUANTIZED_ROWS = 1024  # at once: 1.5 MB of 384-dimensional float32 stay in a second-level cache

T = TypeVar("T")


def rounding_bound(dim: int) -> float:
    """Return by how much two float32 computations of a cosine may differ (Higham, gamma_n, twice)."""
    return dim * 2.0**-23 + 1e-6


def principal_axes(rows: Float32) -> Float64:
    """Return the principal axes of unit rows as columns, that of most energy first."""
    with single_blas_thread():  # two take longer
        return np.linalg.eigh((rows.T @ rows).astype(np.float64))[1][:, ::-1]


class PrefixRotation:
    """Projects unit rows to fewer dimensions, such that products bound their cosines from above.

    On the principal axes of a sample, x . y is the product of the first components, x' . y', plus that of
    the others, which is at most r s with their norms r and s (Cauchy-Schwarz). The norm becomes one more
    component. A random rotation of all spreads them evenly, so that one int8 step suits them.

    :param axes: those of `principal_axes`.
    :param dim: of the projected rows, at most that of the axes.
    """

    def __init__(self, axes: Float64, dim: int) -> None:
        full = len(axes)
        with single_blas_thread():  # others would wait busily, and steal the time of what follows
            mix = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0]
            axes = (axes[:, : dim - 1] @ mix[:-1]).astype(np.float32)
            self._axes, self._norm_axis = axes, mix[-1].astype(np.float32)
            # How far the float32 axes are from orthonormal, and the error of a projected row (gamma_n).
            axes, last = axes.astype(np.float64), self._norm_axis.astype(np.float64)
            skew = float(np.linalg.norm(axes.T @ axes + np.outer(last, last) - np.eye(dim)))
            skew += float(np.linalg.norm(axes @ last))
        rounding = 1.01 * full * 2.0**-24 * dim**0.5
        self._slack = 2 * skew + 4 * rounding + 1e-6
        self.error = 4 * (skew + rounding) + 2 * rounding**2 + 1e-5

    def project(self, rows: Float32) -> Float32:
        """Return the projection of unit rows, (n, dim), of norm 1 but for rounding."""
        projected = np.empty((len(rows), len(self._norm_axis)), np.float32)

        def project(chunk: slice) -> None:
            part = rows[chunk] @ self._axes
            squares = np.einsum("ij,ij->i", rows[chunk], rows[chunk])
            squares -= np.einsum("ij,ij->i", part, part)
            norms = np.sqrt(np.maximum(squares, 0) + np.float32(self._slack))
            projected[chunk] = part + norms[:, None] * self._norm_axis

        for _ in map_chunks(project, row_chunks(len(rows), QUANTIZED_ROWS)):
            pass
        return projected


class Float32Scorer:
    """Approximate scores by float32 products; base of the int8 one.

    :param left: (n, dim) unit rows.
    :param right: (m, dim), the same array if a set is compared with itself.
    :param rotation: of both to fewer dimensions; None compares all.
    """

    # Width of the blocks in which columns are stored, whose edges no tile may cross; None: no blocks.
    block_columns: int | None = None
    # Scores are in units of it.
    unit = 1.0

    def __init__(
        self, left: Float32, right: Float32, rotation: PrefixRotation | None = None
    ) -> None:
        self.error = rounding_bound(left.shape[1])
        self.prefix = rotation is not None
        if rotation is not None:
            self.error += rotation.error
            same, left = left is right, rotation.project(left)
            right = left if same else rotation.project(right)
        self._left = left
        self._right = right

    def scores(self, rows: slice, columns: slice) -> Scores:
        """Return approximate scores, (rows, columns)."""
        return self._left[rows] @ self._right[columns].T

    def bounds(self, exact: float | Float32) -> Scores:
        """Return what the approximate score of a pair exceeds if its exact score exceeds `exact`."""
        bounds = np.asarray(exact, np.float64) - self.error
        return bounds.astype(np.float32)


class Int8Scorer(Float32Scorer):
    """Approximate scores by int8 products, with one step for all rows; outliers in float32."""

    block_columns = INT8_COLUMNS

    def __init__(
        self, left: Float32, right: Float32, rotation: PrefixRotation | None = None
    ) -> None:
        super().__init__(left, right, rotation)
        alone = self._left is self._right
        sets = [self._left] if alone else [self._left, self._right]
        # No unit row has a smaller largest component, and larger products would not fit into int32.
        largest = [_typical(list(_map_rows(_largest, rows))) for rows in sets]
        scale = np.float32(127 / max(self._left.shape[1] ** -0.5, *largest))

        def quantize(rows: Float32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8], Float32]:
            rounded = np.clip(np.rint(rows * scale), -127, 127)
            errors = _norms(rows - rounded / scale)
            codes = rounded.astype(np.int8)
            # MatMulInteger takes uint8 rows, and subtracts 128 from them.
            return codes.view(np.uint8) ^ 128, np.ascontiguousarray(codes.T), errors

        tiles = [list(_map_rows(quantize, rows)) for rows in sets]
        errors = [[error for _, _, error in quantized] for quantized in tiles]
        error = 1.05 * max(map(_typical, errors))
        none = np.zeros(0, np.float32)
        outliers = [np.flatnonzero(np.concatenate([none, *norms]) > error) for norms in errors]
        self._left_outliers, self._right_outliers = outliers[0], outliers[-1]
        empty = np.empty((0, self._left.shape[1]), np.uint8)
        self._rows = np.concatenate([empty, *(codes for codes, _, _ in tiles[0])])
        self._columns = [codes for _, codes, _ in tiles[-1]]
        self.unit = float(scale) ** 2
        # The norms of rows exceed 1 by rounding, and by the slack of a rotation.
        self.error += error * (2 + error) * 1.01 + 2e-6

    def scores(self, rows: slice, columns: slice) -> Scores:
        """Return approximate scores in units of `unit`, int32 (rows, columns)."""
        number, start = divmod(columns.start, INT8_COLUMNS)
        block = self._columns[number]
        stop = min(columns.stop - number * INT8_COLUMNS, block.shape[1])
        if (start, stop) != (0, block.shape[1]):
            block = np.ascontiguousarray(block[:, start:stop])
        scores = int8_matmul(self._rows[rows], block)
        unit = np.float32(self.unit)
        if len(chosen := _within(self._left_outliers, rows)):
            exact = self._left[chosen] @ self._right[columns].T
            scores[chosen - rows.start] = np.floor(exact * unit)
        if len(chosen := _within(self._right_outliers, columns)):
            exact = self._left[rows] @ self._right[chosen].T
            scores[:, chosen - columns.start] = np.floor(exact * unit)
        return scores

    def bounds(self, exact: float | Float32) -> Scores:
        """See `Float32Scorer`; int32."""
        bounds = np.floor((np.asarray(exact, np.float64) - self.error) * self.unit) - 1
        limits = np.iinfo(np.int32)
        return np.clip(bounds, limits.min, limits.max).astype(np.int32)


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


def _typical(values: list[Float32]) -> float:
    """Return what all but OUTLIER_SHARE of the values stay below."""
    return float(np.quantile(np.concatenate(values), 1 - OUTLIER_SHARE)) if values else 0.0


def _map_rows(function: Callable[[Float32], T], rows: Float32) -> Iterator[T]:
    """Yield the function's result for each INT8_COLUMNS rows."""
    return map_chunks(lambda chunk: function(rows[chunk]), row_chunks(len(rows), INT8_COLUMNS))


def _within(numbers: Int64, part: slice) -> Int64:
    """Return those of sorted numbers that are in a slice."""
    first, last = np.searchsorted(numbers, (part.start, part.stop))
    return numbers[first:last]


def _largest(rows: Float32) -> Float32:
    return np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))


def _norms(rows: npt.NDArray[Any]) -> Float32:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float32))
