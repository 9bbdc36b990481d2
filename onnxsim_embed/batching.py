"""Token counts -> batches. Pure numpy; knows nothing of texts or models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

# Tokens in one batch. Flat between 256 and 1,024 on the machines measured; above, the activations of
# one batch (tokens x 1,536 float32 for a 384-wide model) leave the second-level cache.
TOKEN_BUDGET = 320


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
    if token_budget < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(
            f"token_budget and max_rows must be at least 1, got {token_budget}, {max_rows}"
        )
    order = np.argsort(-counts, kind="stable")
    starts = np.flatnonzero(np.diff(counts[order], prepend=-1))
    for start, end in zip(starts, np.append(starts[1:], len(order)), strict=False):
        rows = max(1, token_budget // max(1, int(counts[order[start]])))
        if max_rows is not None:
            rows = min(rows, max_rows)
        for first in range(start, end, rows):
            yield order[first : min(first + rows, end)]
