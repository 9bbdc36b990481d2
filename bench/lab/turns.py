"""What the scripts beside run.py share: arguments, jobs of one process timed in turns, results written."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnxsim_embed.system.hardware import available_cpus, cpu_name

RESULTS = Path(__file__).parents[1] / "results"
HERE = {"machine": cpu_name(), "threads": available_cpus()}


def parser(doc: str, *names: str, rounds: int = 3) -> argparse.ArgumentParser:
    """Return a parser of arguments that are strings, and of --rounds."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name in names:
        made.add_argument(name)
    made.add_argument("--rounds", type=int, default=rounds)
    return made


def in_turns(
    jobs: Mapping[str, Callable[[], object]], rounds: int, pause: float = 0
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return each job's seconds of wall and of processor time, one of each a round.

    Every other round goes backwards, so that no job always follows the same one.

    :param pause: seconds before each job.
    """
    wall: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name in list(jobs)[:: -1 if number % 2 else 1]:
            time.sleep(pause)
            started, used = time.perf_counter(), time.process_time()
            jobs[name]()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    return wall, cpu


def save(name: str, table: Mapping[str, Any]) -> None:
    """Write a table to bench/results/NAME.json."""
    (RESULTS / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
