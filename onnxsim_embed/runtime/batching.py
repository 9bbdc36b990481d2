"""Token counts -> batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

# Tokens in one batch on the CPU. Flat from 192 to 384 on the machines measured; at 512 and above the
# activations of one batch (tokens x 1,536 float32 for a 384-wide model) leave a second-level cache
# of 2 MB and a seventh of the speed is lost.
TOKEN_BUDGET = 320

# On a GPU, padding included. Not measured.
PADDED_TOKEN_BUDGET = 16384


def plan_batches(
    counts: npt.NDArray[np.int64], token_budget: int = TOKEN_BUDGET, max_rows: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Group rows of equal token count into batches of about `token_budget` tokens, longest first.

    Equal counts need no padding: no computation is wasted, and a row's result cannot depend on the
    batch composition. Longest first lets several workers finish at about the same time.

    :param counts: int64 array (n,), tokens of each row.
    :param token_budget: maximum tokens per batch; a longer row is a batch of its own.
    :param max_rows: maximum rows per batch, or None for no limit.
    :returns: int64 arrays of row numbers; together each row exactly once.
    :raises ValueError: if a limit is below 1.
    """
    order = np.argsort(-counts, kind="stable")
    starts = np.flatnonzero(np.diff(counts[order], prepend=-1))
    for start, end in zip(starts, np.append(starts[1:], len(order)), strict=False):
        rows = _rows_within(token_budget, max_rows, int(counts[order[start]]))
        for first in range(start, end, rows):
            yield order[first : min(first + rows, end)]


def plan_padded_batches(
    counts: npt.NDArray[np.int64],
    token_budget: int = PADDED_TOKEN_BUDGET,
    max_rows: int | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """Group rows of similar token count into batches to be padded to their longest, longest first.

    For the parameters see `plan_batches`; padding counts as tokens.
    """
    order = np.argsort(-counts, kind="stable")
    first = 0
    while first < len(order):
        rows = _rows_within(token_budget, max_rows, int(counts[order[first]]))
        yield order[first : first + rows]
        first += rows


def _rows_within(token_budget: int, max_rows: int | None, tokens: int) -> int:
    """Return the number of rows of some token count in a batch."""
    if token_budget < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(
            f"token_budget and max_rows must be at least 1, got {token_budget}, {max_rows}"
        )
    rows = max(1, token_budget // max(1, tokens))
    return rows if max_rows is None else min(rows, max_rows)
