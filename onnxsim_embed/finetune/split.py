"""Pairs to learn from, to choose the checkpoint by, and to judge by: no text is in two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxsim_embed.finetune.pairs import LEAST_PAIRS, TextPairs, drop_sources, normalize

# More pairs than this judge no better, and each costs an encoding for every evaluation.
MOST_JUDGED = 2000


@dataclass(frozen=True)
class Split:
    """Pairs for three uses.

    :param train: to learn from.
    :param validation: to choose the checkpoint by, and to stop early.
    :param held_out: to judge by, once before and once after.
    :param dropped: pairs left out of the first two because their source is held out.
    """

    train: TextPairs
    validation: TextPairs
    held_out: TextPairs
    dropped: int = 0


def split_pairs(
    pairs: TextPairs, share: float, seed: int, held_out: TextPairs | None = None
) -> Split:
    """Split pairs at random, so that no text, whatever its case and spaces, is on both sides.

    Pairs that share a text, directly or through other pairs, stay together.

    :param share: part of the pairs that is kept from training: half of it for validation, half held
        out; the half is all where `held_out` is given.
    :param held_out: pairs to judge by instead. Pairs with a source of theirs are not learnt from;
        their targets may be among those learnt from, as the answers of a fixed set are. The same
        then holds for validation.
    :raises ValueError: if there is no such split, with the next step.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"the held-out share must be above 0 and at most 0.5, got {share:g}")
    usable = pairs if held_out is None else drop_sources(pairs, held_out.sources)
    dropped = len(pairs) - len(usable)
    if len(usable) < LEAST_PAIRS:
        raise ValueError(
            f"only {len(usable)} pairs are left to learn from: {dropped} of {len(pairs)} have a source "
            "that the evaluation file holds too"
        )
    wanted = max(1, min(MOST_JUDGED, round(len(usable) * share / 2)))
    parts = {"validation": wanted} | ({} if held_out is not None else {"held out": wanted})
    filled = _fill(_together(usable, held_out is None), parts, seed)
    for name in parts:
        if not filled[name]:
            raise ValueError(
                f"no pairs can be {name}: nearly all of the {len(usable)} hang together through "
                "repeated texts, so a split would test on texts that were learnt"
                + ("; give a file of other pairs with --eval" if held_out is None else "")
            )
    return Split(
        usable.rows(filled["train"]),
        usable.rows(filled["validation"]),
        usable.rows(filled["held out"]) if held_out is None else held_out,
        dropped,
    )


def _together(pairs: TextPairs, targets_too: bool) -> npt.NDArray[np.int32]:
    """Return each pair's group: pairs that share a text, directly or through others, are of one.

    :param targets_too: False where only sources count.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}

    def number(texts: Sequence[str]) -> npt.NDArray[np.int64]:
        return np.array([numbers.setdefault(normalize(t), len(numbers)) for t in texts], np.int64)

    left = number(pairs.sources)
    right = number(pairs.targets) if targets_too else left
    links = coo_array((np.ones(len(left), np.int8), (left, right)), (len(numbers), len(numbers)))
    return np.asarray(connected_components(links, directed=False)[1][left], np.int32)


def _fill(groups: npt.NDArray[np.int32], parts: dict[str, int], seed: int) -> dict[str, list[int]]:
    """Give whole groups, in random order, to the first part that has room; the rest is for training."""
    order = np.argsort(groups, kind="stable")
    rows_of = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    room = dict(parts)
    filled: dict[str, list[int]] = {"train": [], "validation": [], "held out": []}
    for group in np.random.default_rng(seed).permutation(len(rows_of)):
        rows = rows_of[group]
        part = next((name for name, left in room.items() if left >= len(rows)), "train")
        if part != "train":
            room[part] -= len(rows)
        filled[part] += rows.tolist()
    return {name: sorted(rows) for name, rows in filled.items()}
