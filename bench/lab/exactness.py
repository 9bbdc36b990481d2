"""Whether results are right: vectors beside a reference, similarities beside dense float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

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
    n, wide = len(vectors), vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    matrices = {
        name: sparse.csr_array((found["scores"], (found["rows"], found["columns"])), shape=(n, n))
        for name, found in results.items()
    }
    checks = {name: {"wrong": 0, "largest_error": 0.0} for name in results}
    for start in range(0, n, BLOCK_ROWS):
        exact = wide[start : start + BLOCK_ROWS] @ wide.T
        wanted, clear = exact > threshold, np.abs(exact - threshold) > NEAR
        for name, matrix in matrices.items():
            part = matrix[start : start + BLOCK_ROWS].tocoo()
            got = np.zeros_like(wanted)
            got[part.row, part.col] = True
            checks[name]["wrong"] += int(((got != wanted) & clear).sum())
            errors = np.abs(part.data - exact[part.row, part.col])
            largest = max(checks[name]["largest_error"], float(errors.max(initial=0)))
            checks[name]["largest_error"] = largest
    return checks


def check_best(
    vectors: npt.NDArray[np.float32], k: int, results: Mapping[str, Result]
) -> dict[str, dict[str, Any]]:
    """Compare the k best of each row with the dense float64 cosines of all pairs.

    :param vectors: (n, dim) unit rows.
    :param results: for each system, arrays `rows`, `columns` and `scores`.
    :returns: for each system: `wrong`, entries that are missing, repeated, or more than NEAR below the
        k-th best; and `largest_error` of a score.
    """
    n, wide = len(vectors), vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    checks = {name: {"wrong": 0, "largest_error": 0.0} for name in results}
    ordered = {}
    for name, found in results.items():
        order = np.argsort(found["rows"], kind="stable")
        ordered[name] = tuple(found[part][order] for part in ("rows", "columns", "scores"))
    for start in range(0, n, BLOCK_ROWS):
        exact = wide[start : start + BLOCK_ROWS] @ wide.T
        least = np.partition(exact, n - k, axis=1)[:, n - k] - NEAR
        for name, (rows, columns, scores) in ordered.items():
            first, last = np.searchsorted(rows, [start, start + len(exact)])
            row, column = rows[first:last] - start, columns[first:last]
            different = len(np.unique(row.astype(np.int64) * n + column))
            missing = len(exact) * k - different
            low = int((exact[row, column] < least[row]).sum())
            checks[name]["wrong"] += missing + low
            errors = np.abs(scores[first:last] - exact[row, column])
            largest = max(checks[name]["largest_error"], float(errors.max(initial=0)))
            checks[name]["largest_error"] = largest
    return checks
