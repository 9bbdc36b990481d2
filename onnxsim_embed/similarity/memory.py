"""Entries, memory and time of a comparison: estimated from a sample, and kept within a memory budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from onnxsim_embed.similarity.nearest import top_k
from onnxsim_embed.similarity.selection import RowPairs
from onnxsim_embed.similarity.tiles import TiledComparison
from onnxsim_embed.similarity.unit_rows import COMPONENT_BYTES, TiledRows, UnitRows
from onnxsim_embed.system.arrays import Int64
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.memory import available_memory
from onnxsim_embed.system.progress import progress_bar
from onnxsim_embed.system.units import format_bytes, format_duration

ENTRY_BYTES = 8  # of an entry of the result: a float32 score and an int32 column
PEAK_ENTRY_BYTES = 16  # of an entry while the matrix is assembled from its chunks
TOP_K_BYTES = 24  # of an entry of a top-k: a float32 score, an int64 column; twice while gathered
MEMORY_SHARE = 0.75  # of the available memory that is used by default
SAMPLE_ROWS = 256  # rows differ in entries by about their mean: an estimate is within a tenth or so
CHECK_ROWS = 64  # show whether a result is far too large; sampled before every long comparison
SMALL_COMPARISON = 1 << 24  # pairs below which no sample is worthwhile
ADVICE = "raise the threshold, use top_k, or use write_graph, which writes any size to disk"


class Estimate(NamedTuple):
    """Estimated cost of `similarity_matrix`, or of the top-k of each row."""

    entries: int  # scores above the threshold, the diagonal included, or k of each row
    result_bytes: int  # in memory and as a file
    peak_bytes: int  # beyond the input
    seconds: float  # on this machine, if nothing else runs
    exact: bool = False  # whether `entries` is exact, not estimated

    def __str__(self) -> str:
        entries = f"{self.entries:,}" if self.exact else f"about {_two_digits(self.entries)}"
        return (
            f"{entries} scores, {format_bytes(self.result_bytes)} "
            f"({format_bytes(self.peak_bytes)} at the peak), {format_duration(self.seconds)}"
        )


class ResultTooLargeError(MemoryError):
    """The result of a comparison exceeds the memory budget."""


class MemoryBudget:
    """Memory that a comparison may use beyond its input; by default MEMORY_SHARE of what is available."""

    def __init__(self, max_memory: float | None) -> None:
        if max_memory is None:
            max_memory = max(1, available_memory() * MEMORY_SHARE)
        if not isinstance(max_memory, Real) or isinstance(max_memory, bool):
            raise TypeError(f"max_memory must be a number of bytes, got {max_memory!r}")
        if not 1 <= max_memory < math.inf:
            raise ValueError(f"max_memory must be positive, got {max_memory}")
        self.max_bytes: int = int(max_memory)  # also 4e9
        self.vector_bytes: int = self.max_bytes // 2

    def max_entries(self, left: TiledRows, right: TiledRows) -> int:
        """Return how many entries fit beside the loaded vectors."""
        return max(0, self.max_bytes - _loaded_bytes(left, right)) // PEAK_ENTRY_BYTES

    def max_rows(self, units: UnitRows, threshold: float | None, k: int | None) -> int:
        """Return how many rows of a set can be compared at once such that their entries fit."""
        if threshold is None:
            row_bytes = float(TOP_K_BYTES + PEAK_ENTRY_BYTES) * (k or 0)
        else:
            counts, _ = _sample(units, units, threshold)
            row_bytes = float(counts.mean() if len(counts) else 0) * PEAK_ENTRY_BYTES
        available = max(0, self.max_bytes - _loaded_bytes(units, units)) / 2
        return min(units.tile_rows, int(available / max(row_bytes, 1)))

    def check_top_k(self, left: TiledRows, right: TiledRows, k: int) -> None:
        """Raise ResultTooLargeError if the top-k of all rows does not fit."""
        required = left.rows * k * TOP_K_BYTES
        if required > self.max_bytes - _loaded_bytes(left, right):
            raise ResultTooLargeError(
                f"the top {k} of {left.rows:,} rows take {format_bytes(required)}, but max_memory is "
                f"{format_bytes(self.max_bytes)}, vectors included; reduce k, or use write_graph"
            )

    def check_above(self, left: UnitRows, right: UnitRows, threshold: float) -> None:
        """Raise ResultTooLargeError if a sample of rows shows beyond doubt that the result does not fit."""
        max_entries, pairs = self.max_entries(left, right), left.rows * right.rows
        if pairs <= max_entries or pairs < SMALL_COMPARISON:
            return
        counts, _ = _sample(left, right, threshold, CHECK_ROWS)
        margin = 3 * float(counts.std()) / len(counts) ** 0.5
        if (float(counts.mean()) - margin) * left.rows > max_entries:
            raise ResultTooLargeError(
                f"the result above {threshold} would hold {estimate(left, right, threshold)}, but "
                f"max_memory allows {_two_digits(max_entries)} scores; {ADVICE}"
            )


def pair_counter(
    max_pairs: int, threshold: float, advice: str = ADVICE
) -> Callable[[RowPairs], None]:
    """Return a function that counts pairs, and raises ResultTooLargeError when there are too many."""
    remaining = max_pairs

    def count(pairs: RowPairs) -> None:
        nonlocal remaining
        remaining -= len(pairs.scores)
        if remaining < 0:
            raise ResultTooLargeError(
                f"more than {_two_digits(max_pairs)} pairs score above {threshold}, and the matrix does "
                f"not fit in max_memory; {advice}"
            )

    return count


def _loaded_bytes(left: TiledRows, right: TiledRows) -> int:
    sets = [left] if left is right else [left, right]
    components = sum(min(units.tile_rows, units.rows) * units.dim for units in sets)
    # Two tiles of one set are compared, or a tile of each of two sets.
    return COMPONENT_BYTES * components * (2 if left is right and not left.in_memory else 1)


def estimate(left: UnitRows, right: UnitRows, threshold: float, k: int | None = None) -> Estimate:
    """Estimate the comparison above a threshold, or the top-k, from a sample of rows."""
    counts, seconds = _sample(left, right, threshold, k=k)
    seconds /= 2 if left is right else 1  # each tile of one set is computed once
    loaded = _loaded_bytes(left, right)
    if k is not None:
        entries = left.rows * k
        peak_bytes = entries * TOP_K_BYTES + loaded
        return Estimate(entries, entries * (ENTRY_BYTES + 4), peak_bytes, seconds, exact=True)
    entries = round(float(counts.sum()) * left.rows / max(1, len(counts)))
    return Estimate(entries, entries * ENTRY_BYTES, entries * PEAK_ENTRY_BYTES + loaded, seconds)


def _sample(
    left: UnitRows, right: UnitRows, threshold: float, size: int = SAMPLE_ROWS, k: int | None = None
) -> tuple[Int64, float]:
    """Return the entries of sampled rows, always the same, and the estimated seconds of all rows."""
    chosen = np.arange(left.rows)
    if left.rows > size:
        chosen = np.sort(np.random.default_rng(0).choice(left.rows, size, replace=False))
    rows, seconds = left.take(chosen), 0.0
    counts = np.zeros(len(rows), np.int64)
    for tile in right.tiles():
        part = TiledComparison(rows, right.load(tile), 8 << 20)
        started = time.perf_counter()
        if k is not None:
            top_k(part, min(k, len(part.right)), skip_self=False)
        else:
            counts += sum(pairs.counts for pairs in part.above(threshold, upper=False))
        seconds += time.perf_counter() - started
    threads = min(available_cpus(), max(1, left.rows // SAMPLE_ROWS))
    return counts, seconds * left.rows / max(1, len(rows)) / threads


class Progress:
    """Progress bar over the rows of a comparison, if it is shown."""

    def __init__(self, rows: int, show: bool) -> None:
        self._done = 0
        self._bar: Any = progress_bar(desc="Comparing", unit=" rows", total=rows) if show else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def move(self, rows: int) -> None:
        """Set the number of rows that are done; fewer than before where some are done again."""
        if self._bar is not None:
            self._bar.update(rows - self._done)
        self._done = rows

    def add(self, rows: int) -> None:
        """Count rows as done."""
        self.move(self._done + rows)

    def count(self, pairs: RowPairs) -> RowPairs:
        """Count the rows of a chunk as done, and return it."""
        self.add(len(pairs.counts))
        return pairs


def _two_digits(number: int) -> str:
    """Return a number rounded to two significant digits."""
    return f"{round(number, 2 - len(str(number))) if number > 99 else number:,}"
