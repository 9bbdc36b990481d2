"""Whether results are right: vectors beside a reference, similarities beside dense float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]
Result = Mapping[str, npt.NDArray[Any]]

# A float32 cosine is exact to about this; a pair as close to the threshold may fall on either side.
NEAR = 1e-6

BLOCK_ROWS = 256


def check_above(
    vectors: npt.NDArray[np.float32], threshold: float, results: Mapping[str, Result]
) -> dict[str, dict[str, Any]]:
    """Compare sparse results with the dense float64 cosines of all pairs.

    :param vectors: (n, dim) unit rows.
    :param results: for each system, arrays `rows`, `columns` and `scores` of its entries.
    :returns: for each system: `wrong`, entries that are missing or too many, other than those within
        NEAR of the threshold; and `largest_error` of a score.
    """

    def wrong(exact: Float64, row: Integers, column: Integers) -> int:
        got = np.zeros(exact.shape, bool)
        got[row, column] = True
        return int(((got != (exact > threshold)) & (np.abs(exact - threshold) > NEAR)).sum())

    return _check(vectors, results, wrong)


def check_best(
    vectors: npt.NDArray[np.float32], k: int, results: Mapping[str, Result]
) -> dict[str, dict[str, Any]]:
    """Compare the k best of each row with the dense float64 cosines of all pairs.

    :param vectors: (n, dim) unit rows.
    :param results: for each system, arrays `rows`, `columns` and `scores`.
    :returns: for each system: `wrong`, entries that are missing, repeated, or more than NEAR below the
        k-th best; and `largest_error` of a score.
    """

    def wrong(exact: Float64, row: Integers, column: Integers) -> int:
        n = exact.shape[1]
        least = np.partition(exact, n - k, axis=1)[:, n - k] - NEAR
        different = len(np.unique(row.astype(np.int64) * n + column))
        return len(exact) * k - different + int((exact[row, column] < least[row]).sum())

    return _check(vectors, results, wrong)


def _check(
    vectors: npt.NDArray[np.float32],
    results: Mapping[str, Result],
    wrong: Callable[[Float64, Integers, Integers], int],
) -> dict[str, dict[str, Any]]:
    """Compare results with float64 cosines, block by block of rows.

    :param wrong: number of wrong entries, of cosines (rows, n) and the rows and columns of entries.
    """
    n, wide = len(vectors), vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    checks: dict[str, dict[str, Any]] = {n: {"wrong": 0, "largest_error": 0.0} for n in results}
    ordered = {}
    for name, found in results.items():
        order = np.argsort(found["rows"], kind="stable")
        ordered[name] = tuple(found[part][order] for part in ("rows", "columns", "scores"))
    for start in range(0, n, BLOCK_ROWS):
        exact = wide[start : start + BLOCK_ROWS] @ wide.T
        for name, (rows, columns, scores) in ordered.items():
            first, last = np.searchsorted(rows, [start, start + len(exact)])
            row, column = rows[first:last] - start, columns[first:last]
            check = checks[name]
            check["wrong"] += wrong(exact, row, column)
            errors = np.abs(scores[first:last] - exact[row, column])
            check["largest_error"] = max(check["largest_error"], float(errors.max(initial=0)))
    return checks
