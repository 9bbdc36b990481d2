"""Texts to unit vectors: throughput, fidelity, latency, growth, start, memory, and share of the roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.benchmark.conditions import machine, wait_for_quiet
from onnxsim_embed.benchmark.corpus import Corpus
from onnxsim_embed.benchmark.exactness import fidelity
from onnxsim_embed.benchmark.peers import OURS, TEXT_SYSTEMS, Environments, title
from onnxsim_embed.benchmark.text_plan import (
    TextPlan,
    count_tokens,
    find_checkpoint,
    int8_kernels,
    linear_operations,
)
from onnxsim_embed.benchmark.workers import (
    Crew,
    Request,
    Roof,
    SystemRefusedError,
    Worker,
    ratio,
    rounded,
    spread,
)
from onnxsim_embed.cache import locate_artifact

FILE = "text_systems.py"
# Peers take the fastest of these, found for each kind of texts; our batches are our own affair.
BATCHES = (8, 32, 128)

# Texts of one call, and calls of a round: enough for a 99th percentile over five rounds.
LATENCY_CALLS = {1: 100, 8: 60, 32: 40}
WARM_UP_CALLS = 6

# Seconds of a round after which slower systems get fewer calls, and how many they get at least.
LATENCY_SECONDS = 2.0
LEAST_CALLS = 10

GROWTH = (10, 100, 1000)

# Fresh processes of each system. Loading PyTorch takes ten seconds on two cores.
STARTS = 3

# What is taken for the truth, the first that runs.
REFERENCES = ("torch", "st-torch", "ours-fp32")

CLOCK = (
    "inside the process that holds the system, from the list of texts to the array of unit vectors: "
    "tokenization, model, pooling, normalization"
)


class TextBench:
    """One run of a plan.

    :param say: told what happens.
    """

    def __init__(
        self, plan: TextPlan, environments: Environments, say: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._environments = environments
        self._say = say
        self._artifact = locate_artifact(plan.model)
        checkpoint = plan.checkpoint or find_checkpoint(plan.model, self._artifact)
        manifest = self._artifact.manifest
        self._checkpoint = checkpoint
        self._settings = {
            "artifact": str(self._artifact.directory),
            "checkpoint": str(checkpoint),
            "work": str(plan.work.absolute()),
            "threads": plan.threads,
            "pooling": list(manifest.pooling) if not manifest.dense else ["with dense layers"],
            "dim": manifest.dim,
            "max_seq_length": manifest.max_seq_length,
            "int8_kernels": int8_kernels(),
        }
        self._rows: dict[str, dict[str, Any]] = {}
        self._load: dict[str, Any] = {}
        self._ratios: dict[str, float] = {}
        self._batches: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        """Measure; return what is written as JSON."""
        plan = self._plan
        vectors = plan.work / "vectors"
        vectors.mkdir(parents=True, exist_ok=True)
        calibration = plan.work / "calibration" / "train.jsonl"
        calibration.parent.mkdir(exist_ok=True)
        shipped = files("onnxsim_embed").joinpath("data/calibration.jsonl")
        calibration.write_bytes(shipped.read_bytes())
        roof = Roof(plan.threads, plan.work / "logs", plan.roof_seconds)
        with Crew(FILE, plan.work / "logs", self._say) as crew:
            try:
                self._start(crew)
                for corpus in plan.corpora:
                    self._throughput(crew, corpus, roof, vectors)
                rates = roof.rates()
            finally:
                roof.close()
            if plan.sts is not None:
                self._sts(crew, plan.sts, vectors)
            if "latency" in plan.cases:
                self._latency(crew)
            if "growth" in plan.cases:
                self._growth(crew)
            alive = [worker.name for worker in crew.workers]
            refused = crew.refused
        if "start" in plan.cases:
            self._starts(alive)
        return self._result({name: self._rows[name] for name in alive}, refused, rates)

    def _start(self, crew: Crew) -> None:
        precisions = self._artifact.manifest.precisions
        ours = [name for name in (OURS, "ours-fp32") if name.partition("-")[2] in precisions]
        for name in [*ours, *self._plan.peers]:
            peer = TEXT_SYSTEMS[name]
            python, reason = self._environments.find(peer)
            if python and peer.loads_checkpoint and self._checkpoint is None:
                python, reason = (
                    None,
                    "needs the checkpoint the artifact was made from; name it: --checkpoint DIRECTORY",
                )
            worker = crew.start(name, python, self._settings, reason)
            about = None if worker is None else crew.ask(worker, {"about": True})
            if worker is not None and about is not None:
                versions = about["versions"]
                self._rows[name] = {
                    "title": title(name, TEXT_SYSTEMS, versions),
                    "python": python,
                    "versions": versions,
                    "throughput": {},
                }
        if not crew.workers:
            raise SystemRefusedError(f"no system runs: {crew.refused}")

    def _quiet(self, case: str) -> None:
        self._say(case)
        self._load[case] = wait_for_quiet(self._plan.patience, self._say)

    def _throughput(self, crew: Crew, corpus: Corpus, roof: Roof, directory: Path) -> None:
        """Measure texts a second on one kind of texts, and fidelity on the same texts."""
        kind, texts = corpus.kind, list(corpus.texts)
        self._quiet(f"throughput, {kind}")
        batches: dict[str, int] = {}
        for worker in list(crew.workers):
            batch = self._best_batch(crew, worker, texts)
            # All texts once: the warm-up, and the vectors.
            file = str(directory / f"{worker.name}-{kind}.npy")
            if crew.ask(worker, {"calls": [texts], "batch": batch, "save": file}) is not None:
                batches[worker.name] = batch
        self._batches |= batches
        answers = crew.take_turns(
            lambda name: {"calls": [texts], "batch": batches[name]},
            self._plan.rounds,
            roof.measure,
        )
        seconds = {name: [a["seconds"][0] for a in found] for name, found in answers.items()}
        lead = next(iter(seconds))
        reference_name = next(name for name in (*REFERENCES, lead) if name in seconds)
        reference = np.load(directory / f"{reference_name}-{kind}.npy")
        for name, taken in seconds.items():
            vectors = np.load(directory / f"{name}-{kind}.npy")
            self._rows[name]["throughput"][kind] = {
                "batch": batches[name] if not name.startswith("ours") else None,
                "seconds": spread(taken),
                "texts_per_second": len(texts) / float(np.median(taken)),
                "lead_is": ratio(taken, seconds[lead]),
                "fidelity": fidelity(vectors, reference) | {"to": reference_name},
                "stages": stages([answer["stages"][0] for answer in answers[name]]),
            }
        if kind == "descriptions" and {OURS, "ours-dynamic"} <= set(answers):
            runs = {n: [a["stages"][0]["run"] for a in answers[n]] for n in (OURS, "ours-dynamic")}
            row = self._rows["ours-dynamic"]["throughput"][kind]
            row["session_is"] = ratio(runs["ours-dynamic"], runs[OURS])
            key = "session alone, descriptions: ours-int8 over quantize_dynamic"
            self._ratios[key] = row["session_is"]["median"]
        self._keep_ratios(f"throughput, {kind}", seconds)

    def _keep_ratios(self, case: str, seconds: Mapping[str, Sequence[float]]) -> None:
        """Keep how many times as fast the first system is as each other one."""
        lead = next(iter(seconds))
        for name in list(seconds)[1:]:
            key = f"{case}: {lead} over {name}"
            self._ratios[key] = ratio(seconds[name], seconds[lead])["median"]

    def _best_batch(self, crew: Crew, worker: Worker, texts: list[str]) -> int:
        """Return the batch size at which a peer is fastest on a part of the texts."""
        if worker.name.startswith("ours"):
            return 0
        part = texts[:: max(1, len(texts) // 128)]
        sizes = [size for size in BATCHES if size <= len(part)] or [len(part)]
        crew.ask(worker, {"calls": [part[:8]], "batch": 8})
        taken = {}
        for size in sizes:
            answer = crew.ask(worker, {"calls": [part], "batch": size})
            taken[size] = answer["seconds"][0] if answer is not None else float("inf")
        return min(taken, key=taken.__getitem__)

    def _sts(self, crew: Crew, file: Path, directory: Path) -> None:
        """Correlate each system's cosines with human scores."""
        from scipy.stats import spearmanr

        from onnxsim_embed.tables import read_scored_pairs

        self._say(f"Spearman on {file.name}")
        left, right, scores = read_scored_pairs(file)
        for worker in list(crew.workers):
            vectors_file = str(directory / f"{worker.name}-sts.npy")
            request = {"calls": [[*left, *right]], "batch": 32, "save": vectors_file}
            if crew.ask(worker, request) is None:
                continue
            vectors = np.load(vectors_file)
            cosines = np.einsum("ij,ij->i", vectors[: len(left)], vectors[len(left) :])
            rank = 100 * float(spearmanr(cosines, scores).statistic)
            self._rows[worker.name]["sts_spearman"] = rank

    def _latency(self, crew: Crew) -> None:
        """Measure calls of one text and of a few."""
        self._quiet("latency")
        texts = list(self._plan.corpora[0].texts)
        for size, number in LATENCY_CALLS.items():
            if size > len(texts):
                self._say(f"latency of {size} texts: only {len(texts)} texts are given")
                continue
            calls = [
                [texts[(call * size + row) % len(texts)] for row in range(size)]
                for call in range(number)
            ]
            requests: dict[str, Request] = {}
            for worker in list(crew.workers):
                warm_up = crew.ask(worker, {"calls": calls[:WARM_UP_CALLS], "batch": size})
                if warm_up is not None:
                    fits = int(LATENCY_SECONDS / min(warm_up["seconds"]))
                    part = calls[: max(LEAST_CALLS, fits)]
                    requests[worker.name] = {"calls": part, "batch": size}
            answers = crew.take_turns(requests.get, self._plan.rounds)
            medians = {}
            for name, found in answers.items():
                every = np.concatenate([answer["seconds"] for answer in found])
                values = 1e3 * np.percentile(every, [50, 90, 99])
                row = self._rows[name].setdefault("latency_ms", {})
                row[str(size)] = dict(zip(("p50", "p90", "p99"), values.tolist(), strict=True))
                medians[name] = [float(np.median(answer["seconds"])) for answer in found]
            self._keep_ratios(f"latency of {size}", medians)

    def _growth(self, crew: Crew) -> None:
        """Measure calls of more and more texts."""
        self._quiet("growth")
        texts = list(self._plan.corpora[0].texts)
        for size in (size for size in GROWTH if size <= len(texts)):
            calls = [texts[:size]] * max(1, 100 // size)

            def request(name: str, calls: list[list[str]] = calls) -> Request:
                return {"calls": calls, "batch": self._batches[name]}

            for name, found in crew.take_turns(request, self._plan.rounds).items():
                every = [seconds for answer in found for seconds in answer["seconds"]]
                row = self._rows[name].setdefault("growth_seconds", {})
                row[str(size)] = float(np.median(every))

    def _starts(self, names: Sequence[str]) -> None:
        """Measure fresh processes up to their first vector, and the most memory each ever holds."""
        self._quiet("start and memory")
        corpora = self._plan.corpora
        texts = list(corpora[min(1, len(corpora) - 1)].texts)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(min(STARTS, self._plan.rounds)):
            for name in names[:: 1 if number % 2 == 0 else -1]:
                log = self._plan.work / "logs" / f"{name}-start.log"
                worker = Worker(name, self._rows[name]["python"], FILE, self._settings, log)
                seconds[name].append(worker.seconds_to_first)
                if number == 0:
                    asked = {"calls": [texts], "batch": self._batches[name]}
                    self._rows[name]["peak_mb"] = worker.ask(asked)["highest_mb"]
                worker.close()
        for name, taken in seconds.items():
            self._rows[name]["start_seconds"] = spread(taken)
        self._keep_ratios("start", seconds)

    def _result(
        self, rows: dict[str, dict[str, Any]], refused: Mapping[str, str], rates: Mapping[str, Any]
    ) -> dict[str, Any]:
        manifest = self._artifact.manifest
        tokens = {
            corpus.kind: count_tokens(self._artifact, corpus) for corpus in self._plan.corpora
        }
        operations = linear_operations(self._artifact)
        shares: dict[str, dict[str, float]] = {}
        for name, row in rows.items():
            row.pop("python")
            for kind, cell in row["throughput"].items():
                speed = cell["texts_per_second"] * tokens[kind] / len(self._corpus(kind).texts)
                cell["tokens_per_second"] = speed
                roof = rates.get(name.removeprefix("ours-"))
                if roof is not None:
                    share = speed * operations / roof["median"] / 1e9
                    shares.setdefault(name, {})[kind] = share
                    self._ratios[f"share of the roofline, {kind}: {name}"] = share
        found: dict[str, Any] = rounded(
            {
                "clock": CLOCK,
                "machine": machine(self._plan.threads),
                "model": {
                    "name": manifest.name,
                    "source": manifest.source,
                    "max_seq_length": manifest.max_seq_length,
                    "linear_operations_per_token": operations,
                },
                "corpora": {
                    corpus.kind: {
                        "source": corpus.source,
                        "texts": len(corpus.texts),
                        "tokens": tokens[corpus.kind],
                        "sha256": corpus.digest,
                    }
                    for corpus in self._plan.corpora
                },
                "sts": self._plan.sts.name if self._plan.sts is not None else None,
                "rounds": self._plan.rounds,
                "load": self._load,
                "systems": rows,
                "refused": dict(refused),
                "products_1e9_per_second": dict(rates),
                "share_of_roofline": shares,
                "ratios": self._ratios,
            }
        )
        return found

    def _corpus(self, kind: str) -> Corpus:
        return next(corpus for corpus in self._plan.corpora if corpus.kind == kind)


def stages(reports: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Return the median of each stage's seconds, and what is left of the whole; None without reports."""
    known = [report for report in reports if report is not None]
    if not known:
        return None
    found = {name: float(np.median([report[name] for report in known])) for name in known[0]}
    rest = found["all"] - found["tokenize"] - found["run"] - found["pool"]
    return found | {"rest": max(0.0, rest)}
