"""Token counts -> batches. Pure numpy; knows nothing of texts or models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

# Tokens in one batch on the CPU. Flat from 192 to 384 on the machines measured; at 512 and above the
# activations of one batch (tokens x 1,536 float32 for a 384-wide model) leave a second-level cache
# of 2 MB and a seventh of the speed is lost.
TOKEN_BUDGET = 320

# On a GPU, padding included. Not measured: no GPU was at hand.
PADDED_TOKEN_BUDGET = 16384


def plan_batches(
    counts: npt.NDArray[np.int64], token_budget: int = TOKEN_BUDGET, max_rows: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Group rows of equal token count into batches of about `token_budget` tokens, longest first.

    Equal counts need no padding: nothing is computed in vain, and a row's result cannot depend on
    its company. Longest first lets several workers finish at about the same time.

    :param counts: int64 array (n,), tokens of each row.
    :param token_budget: tokens a batch may hold; a longer row is a batch of its own.
    :param max_rows: rows a batch may hold, or None for no limit.
    :returns: int64 arrays of row numbers; together each row exactly once.
    :raises ValueError: if a limit is below 1.
    """
    _check_limits(token_budget, max_rows)
    order = np.argsort(-counts, kind="stable")
    starts = np.flatnonzero(np.diff(counts[order], prepend=-1))
    for start, end in zip(starts, np.append(starts[1:], len(order)), strict=False):
        rows = max(1, token_budget // max(1, int(counts[order[start]])))
        if max_rows is not None:
            rows = min(rows, max_rows)
        for first in range(start, end, rows):
            yield order[first : min(first + rows, end)]


def plan_padded_batches(
    counts: npt.NDArray[np.int64],
    token_budget: int = PADDED_TOKEN_BUDGET,
    max_rows: int | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """Group rows of similar token count into batches to be padded to their longest, longest first.

    :param counts: int64 array (n,), tokens of each row.
    :param token_budget: tokens a batch may hold with its padding; a longer row is a batch of its own.
    :param max_rows: rows a batch may hold, or None for no limit.
    :returns: int64 arrays of row numbers; together each row exactly once.
    :raises ValueError: if a limit is below 1.
    """
    _check_limits(token_budget, max_rows)
    order = np.argsort(-counts, kind="stable")
    first = 0
    while first < len(order):
        rows = max(1, token_budget // max(1, int(counts[order[first]])))
        if max_rows is not None:
            rows = min(rows, max_rows)
        yield order[first : first + rows]
        first += rows


def _check_limits(token_budget: int, max_rows: int | None) -> None:
    if token_budget < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(
            f"token_budget and max_rows must be at least 1, got {token_budget}, {max_rows}"
        )
