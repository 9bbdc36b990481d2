"""Whether something became slower: ratios of one run against those of another, never times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Ratios of alternating rounds still move by a tenth on a shared machine.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Fall:
    """A ratio that is lower than it was."""

    name: str
    before: float
    now: float

    def __str__(self) -> str:
        share = 1 - self.now / self.before
        return f"{self.name}: {self.before:.2f} -> {self.now:.2f}, {share:.0%} less"


def falls(
    before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float = TOLERANCE
) -> tuple[list[Fall], int]:
    """Compare the ratios that two results share; in each of them more is better.

    :param before: a result with `ratios`.
    :param now: another one.
    :param tolerance: a fall by more than this share counts.
    :returns: what fell, worst first, and how many ratios were compared.
    """
    old, new = before.get("ratios", {}), now.get("ratios", {})
    shared = [name for name in old if name in new and old[name] > 0]
    found = [
        Fall(name, old[name], new[name])
        for name in shared
        if new[name] < old[name] * (1 - tolerance)
    ]
    return sorted(found, key=lambda fall: fall.now / fall.before), len(shared)
