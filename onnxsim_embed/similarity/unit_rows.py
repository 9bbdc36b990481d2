"""Vectors of any kind -> float32 unit vectors, all at once or a panel of rows at a time. numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.system.threads import map_chunks, row_chunks

Float32 = npt.NDArray[np.float32]

# Bytes that a component of a loaded row takes: float32, and int8 as a row and as a column.
COMPONENT_BYTES = 6

# Rows done at once: they go through the processor's caches several times, not through memory.
UNIT_ROWS = 1024

# Squared norms that float32 holds without a component's square becoming nothing or infinite.
SAFE_SQUARES = (1e-24, 1e30)

# Strips from which on threads are worth their start.
MIN_PARALLEL_CHUNKS = 8


def unit_vectors(vectors: npt.ArrayLike, *, first_row: int = 0) -> Float32:
    """Return vectors as float32 rows of L2 norm 1; zero rows stay zero.

    :param vectors: (n, dim), float16, float32, float64 or integers.
    :param first_row: what errors call the first row.
    :raises ValueError: naming the first row with NaN or infinity, or the shape if it is not 2-D.
    """
    array = np.asarray(vectors)
    check_vectors(array)
    values = np.empty(array.shape, np.float32)

    def fill(part: slice) -> None:
        _fill(values[part], array[part], first_row + part.start)

    if len(array) < MIN_PARALLEL_CHUNKS * UNIT_ROWS:
        fill(slice(0, len(array)))
    else:
        for _ in map_chunks(fill, row_chunks(len(array), UNIT_ROWS)):
            pass
    return values


def _fill(values: Float32, array: npt.NDArray[Any], first_row: int) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        values[...] = array
        squares = np.einsum("ij,ij->i", values, values)
    usual = (squares > SAFE_SQUARES[0]) & (squares < SAFE_SQUARES[1])
    values /= np.where(usual, np.sqrt(squares), np.float32(1))[:, None]
    rare = np.flatnonzero(~usual)
    if len(rare):
        values[rare] = _unit_rows_of_any_size(array[rare], rare + first_row)


def _unit_rows_of_any_size(array: npt.NDArray[Any], numbers: npt.NDArray[np.int64]) -> Float32:
    """Return unit vectors of rows whose squares may leave float32's range.

    :param numbers: what errors call the rows.
    """
    # As float64 while it matters: what is beyond float32 there has a direction nevertheless.
    wide: npt.NDArray[Any] = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    if not np.isfinite(largest).all():
        row = int(numbers[~np.isfinite(largest[:, 0])][0])
        raise ValueError(f"vectors hold NaN or infinity, first in row {row}")
    wide /= np.where(largest > 0, largest, np.float32(1))
    values: Float32 = wide.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))[:, None]
    values /= np.where(norms > 0, norms, np.float32(1))
    return values


def check_vectors(array: npt.NDArray[Any]) -> None:
    """Refuse what is no table of numbers.

    :raises ValueError: naming the shape or the dtype.
    """
    if array.ndim != 2:
        raise ValueError(f"vectors must have shape (n, dim), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"vectors must be numbers, got dtype {array.dtype}")


def check_dims(left: int, right: int) -> None:
    """Refuse two sets of different widths.

    :raises ValueError: naming both.
    """
    if left != right:
        raise ValueError(f"vectors have different widths: {left} and {right}")


class UnitRows:
    """The unit vectors of a set: in memory where they fit, else loaded a panel at a time.

    :param vectors: (n, dim), an array in memory or memory-mapped.
    :param max_bytes: most bytes that two panels may take, what comparing them needs included; None: all
        rows are one panel.
    :raises ValueError: as `unit_vectors`; of a set that does not fit, rows are looked at when they are
        loaded.
    """

    def __init__(self, vectors: npt.ArrayLike, max_bytes: int | None = None) -> None:
        array = np.asarray(vectors)
        check_vectors(array)
        self.rows, self.width = array.shape
        row_bytes = COMPONENT_BYTES * max(1, self.width)
        self.tile_rows = max(1, self.rows)
        if max_bytes is not None and self.rows * row_bytes > max_bytes // 2:
            self.tile_rows = max(1, max_bytes // 2 // row_bytes)
        self._vectors = array
        self._whole = unit_vectors(array) if self.whole else None

    @property
    def whole(self) -> bool:
        """Whether all rows are in memory."""
        return self.tile_rows >= self.rows

    def load(self, rows: slice) -> Float32:
        """Return the unit vectors of some rows, float32 (rows, dim)."""
        if self._whole is not None:
            return self._whole[rows]
        return unit_vectors(self._vectors[rows], first_row=rows.start)

    def take(self, rows: npt.NDArray[np.int64]) -> Float32:
        """Return the unit vectors of rows anywhere, float32 (rows, dim)."""
        if self._whole is not None:
            return self._whole[rows]
        try:
            return unit_vectors(self._vectors[rows])
        except ValueError:
            for panel in self.panels():  # names the first such row of the set
                self.load(panel)
            raise

    def diagonal(self, threshold: float) -> Float32:
        """Return the cosine of each row with itself, float32 (rows,), NaN where it is not above a threshold.

        It is 1 for any direction and 0 for a zero row, whatever the rounding of a product.
        """
        parts = [np.any(self.load(panel) != 0, axis=1) for panel in self.panels()]
        scores = np.concatenate([np.zeros(0, np.float32), *parts], dtype=np.float32)
        scores[~(scores > threshold)] = np.nan
        return scores

    def panels(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Yield slices of at most `tile_rows` rows, from `start` to `stop`."""
        stop = self.rows if stop is None else stop
        for first in range(start, stop, self.tile_rows):
            yield slice(first, min(first + self.tile_rows, stop))
