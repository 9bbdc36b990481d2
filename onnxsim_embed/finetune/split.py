"""Split of pairs into training, validation and held-out pairs that share no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onnxsim_embed.finetune.pairs import MIN_PAIRS, TextPairs, normalize

# More pairs give no better estimate, and each costs an encoding in every evaluation.
MAX_EVALUATED = 2000


class Split(NamedTuple):
    """Pairs to train on, to choose the checkpoint by, and to evaluate before and after."""

    train: TextPairs
    validation: TextPairs
    held_out: TextPairs


def split_pairs(
    pairs: TextPairs, share: float, seed: int, held_out: TextPairs | None = None
) -> tuple[Split, int]:
    """Split pairs at random, so that no text, in whatever case and whitespace, is in two parts.

    Pairs that share a text, directly or through other pairs, stay together.

    :param share: fraction of the pairs that is not trained on: half of it for validation, half held
        out. With `held_out` only the half for validation is set apart.
    :param held_out: evaluation pairs. Pairs with one of their sources are not trained on; their targets
        may be among those trained on, as the answers of a fixed set are. The same then holds for
        validation.
    :returns: the split, and the number of pairs skipped for their held-out source.
    :raises ValueError: if there is no such split, with the next step.
    """
    excluded = set(map(normalize, () if held_out is None else held_out.sources))
    sources = map(normalize, pairs.sources)
    usable = pairs.rows([row for row, text in enumerate(sources) if text not in excluded])
    skipped = len(pairs) - len(usable)
    if len(usable) < MIN_PAIRS:
        raise ValueError(
            f"only {len(usable)} pairs are left to train on: {skipped} of {len(pairs)} share their "
            "source with an evaluation pair"
        )
    size = max(1, min(MAX_EVALUATED, round(len(usable) * share / 2)))
    room = {"validation": size} | ({"held_out": size} if held_out is None else {})
    parts: dict[str, list[int]] = {"train": [], **{name: [] for name in room}}
    groups = _groups(usable, held_out is None)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    # Whole groups, in random order, go to the first part with room, else to training.
    for group in np.random.default_rng(seed).permutation(len(members)):
        rows = members[group].tolist()
        fits = (name for name, size in room.items() if len(parts[name]) + len(rows) <= size)
        parts[next(fits, "train")] += rows
    for name, rows in parts.items():
        if not rows and name != "train":
            raise ValueError(
                f"no pairs are left for the {name} part: nearly all of the {len(usable)} are connected "
                "through repeated texts, so that a split would evaluate on texts that were trained on"
                + ("; pass other pairs as evaluation" if held_out is None else "")
            )
    train, validation, *rest = (usable.rows(sorted(rows)) for rows in parts.values())
    return Split(train, validation, rest[0] if held_out is None else held_out), skipped


def _groups(pairs: TextPairs, targets_too: bool) -> npt.NDArray[np.int32]:
    """Return the connected component of each pair: pairs that share a text are connected."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}

    def number(texts: Sequence[str]) -> npt.NDArray[np.int64]:
        return np.array([numbers.setdefault(normalize(t), len(numbers)) for t in texts], np.int64)

    left = number(pairs.sources)
    right = number(pairs.targets) if targets_too else left
    edges = coo_array((np.ones(len(left), np.int8), (left, right)), (len(numbers), len(numbers)))
    return np.asarray(connected_components(edges, directed=False)[1][left], np.int32)
