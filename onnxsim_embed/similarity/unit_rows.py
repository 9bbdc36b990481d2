"""L2-normalized float32 rows, in memory or loaded tile by tile. numpy only."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.threads import map_chunks, row_chunks

COMPONENT_BYTES = 6  # of a component of a loaded row: float32, and int8 as a row and as a column
UNIT_ROWS = 1024  # normalized at once: they stay in the processor's caches
SAFE_SQUARES = (1e-24, 1e30)  # squared norms for which no component's square leaves float32's range
MIN_PARALLEL_CHUNKS = 8  # from which on threads are worth their start


def unit_vectors(vectors: npt.ArrayLike, *, first_row: int = 0) -> Float32:
    """Return vectors as float32 rows of L2 norm 1; zero rows stay zero.

    :param vectors: (n, dim), float16, float32, float64 or integers.
    :param first_row: number of the first row in error messages.
    :raises ValueError: naming the first row with NaN or infinity, or the shape if it is not 2-D.
    """
    array = np.asarray(vectors)
    check_vectors(array)
    unit = np.empty(array.shape, np.float32)

    def normalize(chunk: slice) -> None:
        out = unit[chunk]
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = array[chunk]
            squares = np.einsum("ij,ij->i", out, out)
        safe = (squares > SAFE_SQUARES[0]) & (squares < SAFE_SQUARES[1])
        out /= np.where(safe, np.sqrt(squares), np.float32(1))[:, None]
        extreme = np.flatnonzero(~safe)
        if len(extreme):
            rows = extreme + chunk.start
            out[extreme] = _normalize_extreme(array[rows], rows + first_row)

    if len(array) < MIN_PARALLEL_CHUNKS * UNIT_ROWS:
        normalize(slice(0, len(array)))
    else:
        for _ in map_chunks(normalize, row_chunks(len(array), UNIT_ROWS)):
            pass
    return unit


def _normalize_extreme(array: npt.NDArray[Any], numbers: Int64) -> Float32:
    """Normalize rows whose squares may leave float32's range; `numbers` are those of the rows."""
    # In float64 as long as it matters: values beyond float32's range have a direction nevertheless.
    rows: npt.NDArray[Any] = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    if not np.isfinite(largest).all():
        row = int(numbers[~np.isfinite(largest[:, 0])][0])
        raise ValueError(f"vectors hold NaN or infinity, first in row {row}")
    rows /= np.where(largest > 0, largest, np.float32(1))
    scaled: Float32 = rows.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    scaled /= np.where(norms > 0, norms, np.float32(1))
    return scaled


def check_vectors(array: npt.NDArray[Any]) -> None:
    """Raise ValueError unless `array` is a 2-D array of numbers; warn if they may be quantized."""
    if array.ndim != 2:
        raise ValueError(f"vectors must have shape (n, dim), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"vectors must be numbers, got dtype {array.dtype}")
    if array.dtype in (np.int8, np.uint8):
        warnings.warn(
            f"{array.dtype} vectors are compared as numbers. Those of encode(precision='int8') have a "
            "scale for each dimension, those of 'ubinary' are packed bits, and such cosines are not those "
            "of the texts: compare float32 or float16. If the values are components, pass "
            "vectors.astype('float32')",
            stacklevel=2,  # in one place, so that it is shown once
        )


def check_dims(left: int, right: int) -> None:
    """Raise ValueError, naming both, if two sets of vectors differ in dimension."""
    if left != right:
        raise ValueError(f"vectors have different dimensions: {left} and {right}")


class TiledRows(ABC):
    """Unit rows of a set, loaded in tiles of `tile_rows` rows, or all `in_memory` at once."""

    in_memory = False

    def __init__(self, rows: int, dim: int, tile_rows: int) -> None:
        self.rows = rows
        self.dim = dim
        self.tile_rows = tile_rows

    @abstractmethod
    def load(self, rows: slice) -> Float32:
        """Return the unit rows of a tile, float32 (rows, dim)."""

    def tiles(self, start: int = 0, stop: int | None = None) -> list[slice]:
        """Return slices of at most `tile_rows` rows, from `start` to `stop`."""
        return row_chunks(self.rows if stop is None else stop, self.tile_rows, start)

    def diagonal(self, threshold: float) -> Float32:
        """Return each row's cosine with itself, float32 (rows,), NaN where it does not exceed a threshold.

        It is 1 for any direction and 0 for a zero row, whatever the rounding of a product.
        """
        nonzero = [np.any(self.load(tile) != 0, axis=1) for tile in self.tiles()]
        scores = np.concatenate([np.zeros(0, np.float32), *nonzero], dtype=np.float32)
        scores[~(scores > threshold)] = np.nan
        return scores


class UnitRows(TiledRows):
    """Unit rows of an array: normalized once if two tiles of all rows fit, else one tile at a time.

    :param max_bytes: maximum bytes of two tiles, including what comparing them needs; None: no limit.
    :param normalized: the array holds float32 unit rows.
    """

    def __init__(
        self, vectors: npt.ArrayLike, max_bytes: int | None = None, *, normalized: bool = False
    ) -> None:
        self._vectors = np.asarray(vectors)
        check_vectors(self._vectors)
        rows, dim = self._vectors.shape
        fitting = rows if max_bytes is None else max_bytes // 2 // (COMPONENT_BYTES * max(1, dim))
        super().__init__(rows, dim, max(1, min(rows, fitting)))
        self.in_memory = self.tile_rows >= rows
        self._unit: Float32 | None = None
        if self.in_memory:
            self._unit = self._vectors if normalized else unit_vectors(self._vectors)

    def load(self, rows: slice) -> Float32:
        """See `TiledRows`; any rows."""
        if self._unit is not None:
            return self._unit[rows]
        return unit_vectors(self._vectors[rows], first_row=rows.start)

    def take(self, rows: Int64) -> Float32:
        """Return the unit rows of any row numbers, float32 (rows, dim)."""
        if self._unit is not None:
            return self._unit[rows]
        try:
            return unit_vectors(self._vectors[rows])
        except ValueError:
            for tile in self.tiles():  # names the first such row of the set
                self.load(tile)
            raise


class RowSubset(TiledRows):
    """Some rows of a set, in the order of their numbers."""

    def __init__(self, units: UnitRows, numbers: Int64) -> None:
        super().__init__(len(numbers), units.dim, max(1, min(len(numbers), units.tile_rows)))
        self.in_memory = self.tile_rows >= self.rows
        self._units = units
        self._numbers = numbers

    def load(self, rows: slice) -> Float32:
        """See `TiledRows`; any rows."""
        return self._units.take(self._numbers[rows])
