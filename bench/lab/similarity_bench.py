"""All-pairs similarity and top-k: time, memory and exactness beside other systems, and growth with n."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lab.bench import Bench, Plan
from lab.conditions import machine, today
from lab.exactness import check_above, check_best
from lab.peers import SIMILARITY_SYSTEMS, Environments
from lab.workers import Crew, Request, Roof, SystemFailedError, Worker, ratio, rounded, spread
from onnxsim_embed.similarity.compare import unit_vectors

FILE = "similarity_systems.py"

# Numbers of rows to measure, besides all: how time grows.
SIZES = (2_500, 5_000, 10_000)

# Rows up to which a system takes part that would take minutes for more, and why it does.
LIMITS = {
    "sparse-dot-topn": (
        2_500,
        "it is made for sparse rows, such as TF-IDF, where most products are zero; these rows are dense",
    )
}

# Noise of tiled vectors: each component, against a unit norm. Copies stay close neighbours, not equal.
NOISE = 0.01

CLOCK = (
    "inside the process that holds the system, from the array of unit vectors to the system's own result: "
    "a sparse matrix of all entries above the threshold, or scores and indices of the k best"
)


@dataclass(frozen=True, kw_only=True)
class SimilarityPlan(Plan):
    """What to measure.

    :param vectors: float array (n, dim).
    :param source: where they come from, for whoever reads the figures.
    :param large: rows of the large top-k of ours alone, made by tiling; 0: none.
    """

    vectors: npt.NDArray[np.float32]
    source: str
    threshold: float = 0.5
    k: int = 10
    large: int = 0


def tiled(vectors: npt.NDArray[np.float32], rows: int) -> npt.NDArray[np.float32]:
    """Return so many unit rows: the given ones again and again, each with noise of its own.

    :param vectors: (n, dim) unit rows.
    """
    random = np.random.default_rng(0)
    result = np.empty((rows, vectors.shape[1]), np.float32)
    for start in range(0, rows, len(vectors)):
        part = result[start : start + len(vectors)]
        random.standard_normal(dtype=np.float32, out=part)
        part *= np.float32(NOISE)
        part += vectors[: len(part)]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return result


class SimilarityBench(Bench):
    """One run of a plan."""

    systems = SIMILARITY_SYSTEMS

    def __init__(
        self, plan: SimilarityPlan, environments: Environments, say: Callable[[str], None]
    ) -> None:
        super().__init__(plan, environments, say)
        self._unit = unit_vectors(plan.vectors)
        self._of = f"{plan.source}, {self._unit.shape[1]} wide"

    def run(self) -> dict[str, Any]:
        """Measure; return what is written as JSON."""
        plan, total = self._plan, len(self._unit)
        plan.work.mkdir(parents=True, exist_ok=True)
        file = plan.work / "vectors.npy"
        np.save(file, self._unit)
        logs = plan.work / "logs"
        with Crew(FILE, logs, self._say) as crew:
            with Roof(plan.threads, logs, plan.roof_seconds) as roof:
                self._start(crew, ["ours", "ours-float32", *plan.peers], self._settings(file))
                for rows in [*(size for size in SIZES if size < total), total]:
                    self._measure(crew, "above", rows, roof)
                    self._measure(crew, "best", rows, roof)
                rates = roof.rates()
            alive, failed = [worker.name for worker in crew.workers], crew.failed
        large = self._large() if plan.large else None
        return self._result({name: self._rows[name] for name in alive}, failed, rates, large)

    def _settings(self, file: Path) -> dict[str, Any]:
        return {"vectors": str(file.absolute()), "threads": self._plan.threads}

    def _takes_part(self, name: str, task: str, rows: int) -> bool:
        if name in LIMITS and rows > LIMITS[name][0]:
            return False
        return task in {"notebook": ("above",), "st-util": ("best",)}.get(name, ("above", "best"))

    def _measure(self, crew: Crew, task: str, rows: int, roof: Roof) -> None:
        """Measure one task on the first rows, with every system that does it."""
        plan, case = self._plan, f"{task}, {rows} rows"
        self._watch.begin(case)
        request: Request = {"task": task, "rows": rows, "threshold": plan.threshold,
                            "k": min(plan.k, rows)}  # fmt: skip
        files: dict[str, Path] = {}
        for worker in list(crew.workers):  # the warm-up, and what is checked
            file = plan.work / f"{worker.name}-{task}.npz"
            if not self._takes_part(worker.name, task, rows):
                continue
            if crew.ask(worker, request | {"save": str(file)}) is not None:
                files[worker.name] = file
        answers = crew.take_turns(
            lambda name: request if name in files else None, plan.rounds, roof.measure
        )
        checks = self._check(task, rows, {name: files[name] for name in answers})
        seconds = {name: [a["seconds"] for a in found] for name, found in answers.items()}
        for name, found in answers.items():
            cell = {
                "seconds": spread(seconds[name]),
                "ours_is": ratio(seconds[name], seconds["ours"]),
                "entries": found[-1]["entries"],
                **checks[name],
            }
            if rows == len(self._unit):
                cell |= self._memory(name, request)
            self._rows[name].setdefault(task, {})[str(rows)] = cell
        self._keep_ratios(case, seconds, self._of)

    def _memory(self, name: str, request: Request) -> dict[str, float]:
        """Return the memory of a task in a fresh process: what earlier ones freed would hide some."""
        python, plan = self._pythons[name], self._plan
        settings = self._settings(plan.work / "vectors.npy")
        log = plan.work / "logs" / f"{name}-memory.log"
        try:
            worker = Worker(name, python, FILE, settings, log)
            # A small task first: it loads what is loaded on first use.
            worker.ask(request | {"rows": min(64, request["rows"])})
            found = worker.ask(request)
        except SystemFailedError as error:
            self._say(f"{name}: no memory measured: {error}")
            return {}
        worker.close()
        above = found["peak_mb"] - found["before_mb"] - found["output_mb"]
        return {"peak_mb": found["highest_mb"], "above_input_and_output_mb": max(0.0, above)}

    def _check(self, task: str, rows: int, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        results = {}
        for name, file in files.items():
            with np.load(file) as arrays:
                results[name] = dict(arrays)
            file.unlink()
        if task == "above":
            return check_above(self._unit[:rows], self._plan.threshold, results)
        return check_best(self._unit[:rows], min(self._plan.k, rows), results)

    def _large(self) -> dict[str, Any]:
        """Measure the k best of many rows, by ours alone, in a process that did nothing before."""
        plan, base = self._plan, len(self._unit)
        case = f"best, {plan.large} rows"
        self._watch.begin(case)
        file, settings = plan.work / "large.npy", self._settings(plan.work / "large.npy")
        np.save(file, tiled(self._unit, plan.large))
        request = {"task": "best", "rows": plan.large, "k": plan.k}
        with Crew(FILE, plan.work / "logs", self._say) as crew:
            worker = crew.start("ours", self._find("ours")[0], settings)
            small = found = None
            if worker is not None:
                crew.ask(worker, request | {"rows": base})  # the warm-up
                small = crew.ask(worker, request | {"rows": base})
                found = crew.ask(worker, request) if small is not None else None
            failed = crew.failed.get("ours")
        file.unlink()
        if found is None or small is None:
            return {"rows": plan.large, "failed": failed}
        per_pair = {rows: answer["seconds"] / rows**2 for rows, answer in
                    ((base, small), (plan.large, found))}  # fmt: skip
        cost = per_pair[plan.large] / per_pair[base]
        self._keep(f"cost per pair, {base} over {plan.large} rows", 1 / cost, self._of)
        return {
            "rows": plan.large,
            "seconds": found["seconds"],
            "highest_mb": found["highest_mb"],
            "seconds_base": small["seconds"],
            "rows_base": base,
            "cost_per_pair_to_base": cost,
        }

    def _result(
        self,
        rows: dict[str, dict[str, Any]],
        failed: Mapping[str, str],
        rates: Mapping[str, Any],
        large: dict[str, Any] | None,
    ) -> dict[str, Any]:
        total, dim = self._unit.shape
        # One set with itself above a threshold: half the square is enough.
        operations = 2 * dim * total * (total - 1) / 2
        shares = {}
        for name in ("ours", "ours-float32"):
            if name in rows:
                taken = rows[name]["above"][str(total)]["seconds"]["median"]
                shares[name] = operations / taken / 1e9 / rates["numpy"]["median"]
                key = f"share of the float32 roofline, {total} rows: {name}"
                self._keep(key, shares[name], self._of)
        found: dict[str, Any] = rounded(
            {
                "date": today(),
                "clock": CLOCK,
                "machine": machine(self._plan.threads),
                "vectors": {
                    "source": self._plan.source,
                    "rows": total,
                    "dim": dim,
                    "sha256": hashlib.sha256(self._unit.tobytes()).hexdigest()[:16],
                },
                "threshold": self._plan.threshold,
                "k": min(self._plan.k, total),
                "rounds": self._plan.rounds,
                "load": self._watch.load(),
                "systems": rows,
                "limits": {
                    name: {"rows": most, "because": reason}
                    for name, (most, reason) in LIMITS.items()
                    if name in rows and most < total
                },
                "failed": dict(failed),
                "products_1e9_per_second": dict(rates),
                "share_of_float32_roofline": shares,
                "large": large,
                "ratios": self._ratios,
            }
        )
        return found
