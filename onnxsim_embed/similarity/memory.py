"""What a comparison will take: entries, memory and time, estimated from a sample and kept within bounds."""

from __future__ import annotations

import math
import time
from numbers import Real
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from onnxsim_embed.similarity.scoring import RowPairs, TiledComparison
from onnxsim_embed.similarity.unit_rows import COMPONENT_BYTES, Float32, TiledRows, UnitRows
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.memory import available_memory
from onnxsim_embed.system.progress import progress_bar
from onnxsim_embed.system.units import format_bytes, format_duration

# Bytes of an entry of the result: a float32 score and an int32 column.
ENTRY_BYTES = 8

# Bytes that an entry takes at the peak, while the matrix is put together from its parts.
PEAK_ENTRY_BYTES = 24

# A row's best: a float32 score and an int64 column, twice while they are gathered.
BEST_BYTES = 24

# Share of the free memory that is used where none is named.
MEMORY_SHARE = 0.75

# Rows of a sample. The number of entries differs between rows by about as much as their mean, so that
# an estimate from 256 of them is right within a tenth or so.
SAMPLE_ROWS = 256

# Rows that show whether a result is far too large; they are looked at before every long comparison.
FEW_ROWS = 64

# Pairs below which no sample is worth its while.
SMALL = 1 << 24


class Estimate(NamedTuple):
    """What `similarity_matrix`, or the k best of each row, would take.

    :param entries: scores: those above the threshold, the diagonal included, or k of each row.
    :param result_bytes: bytes of the result, in memory and as a file.
    :param peak_bytes: bytes at the peak, beyond the input.
    :param seconds: on this machine, if nothing else runs.
    :param exact: whether the number of scores is known, not estimated.
    """

    entries: int
    result_bytes: int
    peak_bytes: int
    seconds: float
    exact: bool = False

    def __str__(self) -> str:
        number = f"{self.entries:,}" if self.exact else f"about {_about(self.entries)}"
        return (
            f"{number} scores, {format_bytes(self.result_bytes)} "
            f"({format_bytes(self.peak_bytes)} at the peak), {format_duration(self.seconds)}"
        )


class MemoryBudget:
    """The memory that a comparison may use.

    :param max_memory: bytes beyond the input; None for three quarters of what is free.
    :raises TypeError: if it is no number.
    :raises ValueError: if it is not positive.
    """

    def __init__(self, max_memory: float | None) -> None:
        if max_memory is None:
            free = available_memory()
            self.max_bytes = None if free is None else int(free * MEMORY_SHARE)
        elif not isinstance(max_memory, Real):
            raise TypeError(f"max_memory must be a number of bytes, got {max_memory!r}")
        elif not 1 <= max_memory < math.inf:
            raise ValueError(f"max_memory must be positive, got {max_memory}")
        else:
            self.max_bytes = int(max_memory)  # 4e9 is a number of bytes, too
        self.vector_bytes = None if self.max_bytes is None else self.max_bytes // 2

    def max_entries(self, left: TiledRows, right: TiledRows) -> int:
        """Return how many entries fit beside the loaded vectors."""
        if self.max_bytes is None:
            return np.iinfo(np.int64).max
        return max(0, self.max_bytes - _loaded(left, right)) // PEAK_ENTRY_BYTES

    def max_rows(self, units: UnitRows, threshold: float | None, k: int | None) -> int:
        """Return how many rows may be compared at a time, so that what they find fits beside the vectors.

        :param threshold: as for `similarity_matrix`, or None for the k best.
        """
        if self.max_bytes is None:
            return units.tile_rows
        if threshold is None:
            each = float(BEST_BYTES + PEAK_ENTRY_BYTES) * (k or 0)
        else:
            counts, _ = _sample(units, units, threshold)
            each = float(counts.mean() if len(counts) else 0) * PEAK_ENTRY_BYTES
        room = max(0, self.max_bytes - _loaded(units, units)) / 2
        return min(units.tile_rows, int(room / max(each, 1)))

    def check_top_k(self, left: TiledRows, right: TiledRows, k: int) -> None:
        """Refuse k best of each row that do not fit.

        :raises MemoryError: with what to do instead.
        """
        need = left.rows * k * BEST_BYTES
        if self.max_bytes is not None and need > self.max_bytes - _loaded(left, right):
            raise MemoryError(
                f"the {k} best of {left.rows:,} rows take {format_bytes(need)}, more than max_memory allows "
                f"({format_bytes(self.max_bytes)}, vectors included): ask for fewer, or take write_graph "
                "(similarity --top-k K -o DIRECTORY), which writes them part by part"
            )


_ADVICE = (
    "raise the threshold, ask for the best of each row instead (top_k, --top-k), or take write_graph "
    "(similarity -o DIRECTORY), which writes a matrix of any size part by part"
)


class ResultTooLargeError(MemoryError):
    """The result of a comparison exceeds the memory it may use."""


class PairCounter:
    """Counts pairs when they are found, and stops a comparison that finds more than fit.

    :param most: pairs that fit.
    :param advice: what to do where there are more.
    """

    def __init__(self, most: int, threshold: float, advice: str = _ADVICE) -> None:
        self._left = self._most = most
        self._threshold = threshold
        self._advice = advice

    def __call__(self, part: RowPairs) -> None:
        """Count the pairs of a part.

        :raises MemoryError: with the advice.
        """
        self._left -= len(part.scores)
        if self._left < 0:
            raise ResultTooLargeError(
                f"more than {_about(self._most)} pairs score above {self._threshold}, and max_memory has "
                f"no room for their matrix; {self._advice}"
            )


def _loaded(left: TiledRows, right: TiledRows) -> int:
    sets = [left] if left is right else [left, right]
    tiles = [min(part.tile_rows, part.rows) * part.dim for part in sets]
    # Of one set two tiles are compared, of two sets a tile of each.
    return COMPONENT_BYTES * sum(tiles) * (2 if left is right and not left.in_memory else 1)


def check_result_size(left: UnitRows, right: UnitRows, threshold: float, most: int) -> None:
    """Refuse a result that would not fit, where a sample of rows says so beyond doubt.

    :param most: entries that fit.
    :raises MemoryError: with the estimate, and what to do instead.
    """
    pairs = left.rows * right.rows
    if pairs <= most or pairs < SMALL:
        return
    counts, _ = _sample(left, right, threshold, FEW_ROWS)
    doubt = 3 * float(counts.std()) / len(counts) ** 0.5
    if (float(counts.mean()) - doubt) * left.rows > most:
        expected = estimate_entries(left, right, threshold)
        raise MemoryError(
            f"above {threshold} there would be {expected}; max_memory has room for {_about(most)} "
            f"scores; {_ADVICE}"
        )


def estimate_entries(left: UnitRows, right: UnitRows, threshold: float) -> Estimate:
    """Return what comparing two sets takes, from a sample of rows; the same sample every time."""
    counts, seconds = _sample(left, right, threshold)
    share = left.rows / max(1, len(counts))
    entries = round(float(counts.sum()) * share)
    threads = min(available_cpus(), max(1, left.rows // SAMPLE_ROWS))
    return Estimate(
        entries,
        entries * ENTRY_BYTES,
        entries * PEAK_ENTRY_BYTES + _loaded(left, right),
        seconds * share / threads / (2 if left is right else 1),
    )


def estimate_best(left: UnitRows, right: UnitRows, k: int) -> Estimate:
    """Return what the k best of each row take; the time is that of a sample of rows."""
    rows = _sample_rows(left, SAMPLE_ROWS)
    seconds = 0.0
    for tile in right.tiles():
        search = TiledComparison(rows, right.load(tile), 8 << 20)
        started = time.perf_counter()
        for _ in search.top_k(min(k, tile.stop - tile.start), skip_self=False):
            pass
        seconds += time.perf_counter() - started
    entries = left.rows * k
    threads = min(available_cpus(), max(1, left.rows // SAMPLE_ROWS))
    return Estimate(
        entries,
        entries * (ENTRY_BYTES + 4),
        entries * BEST_BYTES + _loaded(left, right),
        seconds * left.rows / max(1, len(rows)) / threads,
        exact=True,
    )


def _sample_rows(left: UnitRows, size: int) -> Float32:
    """Return the unit vectors of some rows, of all where there are few; the same ones every time."""
    chosen = np.arange(left.rows)
    if left.rows > size:
        chosen = np.sort(np.random.default_rng(0).choice(left.rows, size, replace=False))
    return left.take(chosen)


def _sample(
    left: UnitRows, right: UnitRows, threshold: float, size: int = SAMPLE_ROWS
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], float]:
    """Return the entries of some rows, and the seconds that these took on one thread."""
    rows = _sample_rows(left, size)
    counts = np.zeros(len(rows), np.int64)
    seconds = 0.0
    for tile in right.tiles():
        search = TiledComparison(rows, right.load(tile), 8 << 20)
        started = time.perf_counter()
        for found in search.above(threshold, upper=False):
            counts += found.counts
        seconds += time.perf_counter() - started
    return counts, seconds


class Progress:
    """A progress bar over the pairs of a comparison, or none.

    :param rows: rows to compare.
    :param upper: whether a row is compared with those beyond it only.
    """

    def __init__(self, rows: int, show: bool, upper: bool) -> None:
        self._rows = rows
        self._upper = upper
        self._done = 0
        self._bar: Any = None
        if show:
            self._bar = progress_bar(
                desc="Comparing", unit=" pairs", total=self._pairs(rows), unit_scale=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _pairs(self, rows: int) -> int:
        return rows * self._rows - (rows * rows // 2 if self._upper else 0)

    def add(self, rows: int) -> None:
        """Count rows as done."""
        self.move(self._done + rows)

    def move(self, rows: int) -> None:
        """Say how many rows are done; fewer than before where some are to be done again."""
        before, self._done = self._done, rows
        if self._bar is not None:
            self._bar.update(self._pairs(self._done) - self._pairs(before))

    def count(self, part: RowPairs) -> RowPairs:
        """Count a part's rows as done, and hand it on."""
        self.add(len(part.counts))
        return part


def _about(number: int) -> str:
    """Return a number with at most two digits that say something."""
    digits = max(0, len(str(number)) - 2)
    return f"{round(number, -digits):,}"
