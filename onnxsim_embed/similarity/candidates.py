"""CandidateScorer scores of blocks of pairs, with a proven bound of their error.

A search for scores above a threshold, or for the k best, computes every pair roughly and the few that
may count exactly. CandidateScorer scores come from matrix products: in float32, whose last bits depend on the
shape of the block, or in int8, which processors with VNNI multiply several times faster.

The int8 bound: with x = x' + e and y = y' + f (what is kept in int8, and what is lost), and |x| = 1,
|x . y - x' . y'| = |x . f + e . y'| <= |f| + |e| (1 + |f|) by Cauchy-Schwarz. |e| and |f| are computed for
each row; x' . y' is a product of whole numbers, hence free of error.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxsim_embed.system.hardware import CPU_PROVIDER, int8_supported
from onnxsim_embed.system.threads import map_chunks, row_chunks

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Scores = npt.NDArray[Any]

# Columns share one int8 step. It suits all but a hundredth of them (those with an outstanding
# component); the rest are compared in float32.
SHARE_APART = 0.01

# Columns multiplied at once in int8: with 1,024 rows, 4 MB of scores. Products of fewer are faster by
# themselves, and what is done for each block costs more.
INT8_COLUMNS = 1024


class CandidateScorer(Protocol):
    """CandidateScorer scores of rows with columns.

    :param outliers: columns whose scorer scores say nothing; ascending.
    :param stored: columns are stored in blocks of so many, and `block` takes none that crosses an edge;
        None: any block will do.
    """

    outliers: Int64
    stored: int | None

    def __init__(self, left: Float32, right: Float32) -> None: ...

    def block(self, rows: slice, columns: slice) -> Scores:
        """Return scorer scores, (rows, columns), in units of their own."""
        ...

    def limits(self, rows: slice, threshold: float) -> Scores:
        """Return (rows, 1): where an exact score is above the threshold, the scorer one is above this."""
        ...

    def below(self, rows: slice, bound: npt.NDArray[np.float64]) -> Scores:
        """Return (rows, 1): what a pair passes that scores no less than one of scorer score `bound`."""
        ...

    def exact_below(self, rows: slice, bound: npt.NDArray[np.float64]) -> Float32:
        """Return (rows, 1): an exact score that pairs with scorer score `bound`, (rows,), reach."""
        ...


def rounding(width: int) -> float:
    """Return by how much two float32 computations of a cosine may differ (Higham, gamma_n, twice)."""
    return width * 2.0**-23 + 1e-7


class Float32Scorer:
    """CandidateScorer scores by float32 matrix products.

    :param left: float32 unit vectors (n, dim).
    :param right: float32 unit vectors (m, dim).
    """

    outliers: Int64 = np.zeros(0, np.int64)
    stored: int | None = None

    def __init__(self, left: Float32, right: Float32) -> None:
        self._left = left
        self._right = right
        self._error = np.float32(rounding(left.shape[1]))

    def block(self, rows: slice, columns: slice) -> Scores:
        """See `CandidateScorer`."""
        return self._left[rows] @ self._right[columns].T

    def limits(self, rows: slice, threshold: float) -> Scores:
        """See `CandidateScorer`."""
        return np.full((rows.stop - rows.start, 1), threshold, np.float32) - self._error

    def below(self, rows: slice, bound: npt.NDArray[np.float64]) -> Scores:
        """See `CandidateScorer`."""
        return np.asarray(bound[:, None] - 2.5 * self._error, np.float32)

    def exact_below(self, rows: slice, bound: npt.NDArray[np.float64]) -> Float32:
        """See `CandidateScorer`."""
        return np.asarray(bound[:, None] - 1.5 * self._error, np.float32)


class Int8Scorer:
    """CandidateScorer scores by int8 matrix products: uint8 rows with a step each, int8 columns with one step.

    :param left: float32 unit vectors (n, dim).
    :param right: float32 unit vectors (m, dim).
    """

    stored: int | None = INT8_COLUMNS

    def __init__(self, left: Float32, right: Float32) -> None:
        self._product = int8_matmul()
        parts = row_chunks(len(right), 1024)
        largest = list(map_chunks(lambda part: _largest(right[part]), parts))
        usual = _usual(np.concatenate([np.zeros(0, np.float32), *largest]))
        self._steps = np.float32(127 / usual if usual > 0 else 1)
        kept = np.empty(right.shape, np.int8)
        lost = np.empty(len(right), np.float32)

        def keep_right(part: slice) -> None:
            whole = np.clip(np.rint(right[part] * self._steps), -127, 127)
            kept[part] = whole
            lost[part] = _norms(right[part] - whole / self._steps)

        for _ in map_chunks(keep_right, parts):
            pass
        self._lost = 1.1 * _usual(lost)
        self.outliers = np.flatnonzero(lost > self._lost)
        kept[self.outliers] = 0
        self._right = [
            np.ascontiguousarray(kept[part].T) for part in row_chunks(len(right), INT8_COLUMNS)
        ]
        self._left = np.empty(left.shape, np.uint8)
        self._row_steps = np.empty(len(left), np.float64)
        self._error = np.empty(len(left), np.float64)

        def keep_left(part: slice) -> None:
            whole, steps, row_lost = quantize_rows(left[part])
            self._left[part] = whole + 128
            self._row_steps[part] = 1 / steps[:, 0].astype(np.float64)
            self._error[part] = self._lost + row_lost * (1 + self._lost)

        for _ in map_chunks(keep_left, row_chunks(len(left), 1024)):
            pass
        # The norms above, the steps and the exact scores are float32 themselves.
        self._error = self._error * (1 + 1e-5) + rounding(left.shape[1]) + 1e-6
        self._zero = np.array(128, np.uint8)

    def block(self, rows: slice, columns: slice) -> Scores:
        """See `CandidateScorer`."""
        number, start = divmod(columns.start, INT8_COLUMNS)
        right = self._right[number]
        stop = min(columns.stop - number * INT8_COLUMNS, right.shape[1])
        if (start, stop) != (0, right.shape[1]):
            right = np.ascontiguousarray(right[:, start:stop])
        feed = {"left": self._left[rows], "right": right, "zero": self._zero}
        found: Scores = self._product.run(None, feed)[0]
        return found

    def limits(self, rows: slice, threshold: float) -> Scores:
        """See `CandidateScorer`."""
        return self._whole(rows, threshold - self._error[rows])

    def below(self, rows: slice, bound: npt.NDArray[np.float64]) -> Scores:
        """See `CandidateScorer`."""
        scale = self._row_steps[rows] * float(self._steps)
        return self._whole(rows, bound / scale - 2 * self._error[rows])

    def exact_below(self, rows: slice, bound: npt.NDArray[np.float64]) -> Float32:
        """See `CandidateScorer`."""
        scale = self._row_steps[rows] * float(self._steps)
        return np.asarray((bound / scale - self._error[rows])[:, None], np.float32)

    def _whole(self, rows: slice, scores: npt.NDArray[np.float64]) -> Scores:
        """Return the largest whole scorer scores, int32 (rows, 1), that are surely below `scores`."""
        whole = np.floor(scores * self._row_steps[rows] * float(self._steps)) - 1
        limits = np.iinfo(np.int32)
        return np.clip(whole, limits.min, limits.max).astype(np.int32)[:, None]


def int8_scoring_supported(width: int) -> bool:
    """Return whether `Int8Scorer` is right on this machine, where products must not saturate."""
    return width <= 1 << 15 and int8_supported()[0]


@cache
def int8_matmul(threads: int = 1, process: int = 0) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """Return onnxruntime's product of uint8 (m, k) and int8 (k, n): int32 (m, n).

    :param threads: threads inside one call.
    :param process: number of this process, where there are several: a forked child has none of its
        parent's threads.
    """
    from onnxsim_embed.system.onnx_session import start_session

    graph = files("onnxsim_embed").joinpath("data/product.onnx").read_bytes()
    return start_session(graph, [CPU_PROVIDER], threads, spin=False)


def quantize_rows(rows: Float32, most: int = 127) -> tuple[Float32, Float32, Float32]:
    """Round each row to whole numbers by a step of its own.

    :param rows: float32 array (n, dim).
    :param most: what the largest component of a row becomes.
    :returns: the whole numbers, float32 (n, dim); the steps, (n, 1); the norms of what is lost, (n,).
    """
    top = _largest(rows)[:, None]
    steps = np.asarray(np.where(top > 0, top, np.float32(1)) / most, np.float32)
    whole = np.rint(rows / steps)
    return whole, steps, _norms(rows - whole * steps)


def _usual(values: Float32) -> float:
    """Return what all but SHARE_APART of the values stay below."""
    return float(np.quantile(values, 1 - SHARE_APART)) if len(values) else 0.0


def _largest(rows: Float32) -> Float32:
    return np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))


def _norms(rows: npt.NDArray[Any]) -> Float32:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float32))
