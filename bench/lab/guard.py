"""Whether something became slower: ratios of one run against those of another, never times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Ratios of alternating rounds still move by a tenth on a shared machine.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Ratio:
    """A measured ratio; more is better.

    :param value: how many times, or which share.
    :param of: the texts or vectors it was measured on: only ratios of the same are compared.
    """

    value: float
    of: str


@dataclass(frozen=True)
class Fall:
    """A ratio that is lower than it was."""

    name: str
    before: float
    now: float

    def __str__(self) -> str:
        share = 1 - self.now / self.before
        return f"{self.name}: {self.before:.2f} -> {self.now:.2f}, {share:.0%} less"


@dataclass(frozen=True)
class Comparison:
    """What comparing two results found.

    :param falls: worst first.
    :param compared: how many ratios were compared.
    :param different: names of ratios that both have, of different texts or vectors.
    """

    falls: tuple[Fall, ...]
    compared: int
    different: tuple[str, ...]


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float = TOLERANCE
) -> Comparison:
    """Compare the ratios that two results share.

    :param before: a result with `ratios`: by their names, dictionaries as of `Ratio`.
    :param now: another one.
    :param tolerance: a fall by more than this share counts.
    """
    old, new = before.get("ratios", {}), now.get("ratios", {})
    both = [name for name in old if name in new and old[name]["value"] > 0]
    same = [name for name in both if old[name]["of"] == new[name]["of"]]
    found = [
        Fall(name, old[name]["value"], new[name]["value"])
        for name in same
        if new[name]["value"] < old[name]["value"] * (1 - tolerance)
    ]
    return Comparison(
        tuple(sorted(found, key=lambda fall: fall.now / fall.before)),
        len(same),
        tuple(name for name in both if name not in same),
    )
