"""Token counts -> batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxsim_embed.system.arrays import Int64

# Tokens in one batch on the CPU. Flat from 192 to 384 on the machines measured; at 512 and above the
# activations of one batch (tokens x 1,536 float32 for a 384-wide model) leave a second-level cache
# of 2 MB and a seventh of the speed is lost.
TOKEN_BUDGET = 320

# On a GPU, padding included. Flat from 16,384 to 131,072 on an H200, where the tokenizer is the limit;
# twice as many tokens take twice the memory.
PADDED_TOKEN_BUDGET = 32768

# Batches in flight on a GPU: one runs while the inputs of the next are laid out.
GPU_CALLERS = 2


def plan_batches(
    counts: Int64,
    token_budget: int = TOKEN_BUDGET,
    max_rows: int | None = None,
    *,
    padded: bool = False,
) -> Iterator[Int64]:
    """Group rows of equal token count into batches of about `token_budget` tokens, longest first.

    Equal counts need no padding: no computation is wasted, and a row's result cannot depend on the
    batch composition. Longest first lets several workers finish at about the same time.

    :param counts: int64 array (n,), tokens of each row.
    :param token_budget: maximum tokens per batch; a longer row is a batch of its own.
    :param max_rows: maximum rows per batch, or None for no limit.
    :param padded: whether batches mix counts, to be padded to their longest; padding counts as tokens.
    :returns: int64 arrays of row numbers; together each row exactly once.
    """
    order = np.argsort(-counts, kind="stable")
    ends = np.searchsorted(-counts[order], -counts[order], side="right")
    first = 0
    while first < len(order):
        rows = max(1, token_budget // max(1, int(counts[order[first]])))
        stop = first + (rows if max_rows is None else min(rows, max_rows))
        stop = stop if padded else min(stop, int(ends[first]))
        yield order[first:stop]
        first = stop
