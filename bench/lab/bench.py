"""What both measurements share: systems that start, cases that are watched, ratios that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lab.conditions import Watch
from lab.peers import Environments, Peer, title
from lab.workers import Crew, ratio


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    :param peers: names of systems beside ours.
    :param work: a directory for vectors, logs and peers' exports; kept for the next time.
    :param patience: seconds to wait for a quiet machine before each case.
    :param roof_seconds: for each matrix product, before each round.
    """

    peers: tuple[str, ...]
    threads: int
    rounds: int
    work: Path
    patience: float = 60
    roof_seconds: float = 0.5


class Bench:
    """One run of a plan.

    :param say: called with a line of text for what happens.
    """

    systems: ClassVar[dict[str, Peer]]

    def __init__(self, plan: Any, environments: Environments, say: Callable[[str], None]) -> None:  # noqa: ANN401
        self._plan, self._environments, self._say = plan, environments, say
        self._rows: dict[str, dict[str, Any]] = {}
        self._pythons: dict[str, str] = {}
        self._watch = Watch(plan.patience, say)
        self._ratios: dict[str, dict[str, Any]] = {}

    def _find(self, name: str) -> tuple[str | None, str]:
        """Return a system's interpreter, or None and the reason why there is none."""
        return self._environments.find(self.systems[name])

    def _start(self, crew: Crew, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Let systems take part, each with a row that tells its title and versions."""
        for name in names:
            python, reason = self._find(name)
            worker = crew.start(name, python, settings, reason)
            about = None if worker is None else crew.ask(worker, {"about": True})
            if python is not None and about is not None:
                self._pythons[name], versions = python, about["versions"]
                self._rows[name] = {
                    "title": title(name, self.systems, versions),
                    "versions": versions,
                }

    def _keep(self, name: str, value: float, of: str) -> None:
        """Keep a ratio; more is better.

        :param of: the texts or vectors it was measured on: only ratios of the same are compared.
        """
        self._ratios[name] = {"value": value, "of": of}

    def _keep_ratios(self, case: str, seconds: Mapping[str, Sequence[float]], of: str) -> None:
        """Keep how many times as fast the first system is as each other one."""
        lead, *others = seconds
        for name in others:
            median = ratio(seconds[name], seconds[lead])["median"]
            self._keep(f"{case}: {lead} over {name}", median, of)
