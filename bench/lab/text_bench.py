"""Texts to unit vectors: throughput, fidelity, latency, growth, start, memory, and share of the roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.bench import Bench
from lab.corpus import Corpus
from lab.peers import OURS, TEXT_SYSTEMS, Environments
from lab.text_plan import TextPlan, count_tokens, most_tokens
from lab.text_result import Measured, ratio_of, stages, text_result
from lab.workers import Crew, Request, Roof, SystemFailedError, Worker, ratio, spread
from onnxsim_embed.artifact.cache import locate_artifact
from onnxsim_embed.benchmark import worker as text_worker
from onnxsim_embed.benchmark.measure import fidelity, find_checkpoint, system_settings

FILE, SYSTEMS = "text_systems.py", Path(text_worker.__file__)
# Peers take the fastest of these, found for each kind of texts; our batches are our own affair.
# Not those of more tokens than this: they leave the caches, and take GBs. Those that come near the
# fastest get a second go.
BATCHES = (8, 32, 128)
BATCH_TOKENS = 4096
NEAR = 1.2
SEARCH_TEXTS = 64

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


class TextBench(Bench):
    """One run of a plan."""

    systems = TEXT_SYSTEMS

    def __init__(
        self, plan: TextPlan, environments: Environments, say: Callable[[str], None]
    ) -> None:
        super().__init__(plan, environments, say)
        self._artifact = locate_artifact(plan.model)
        self._checkpoint = plan.checkpoint or find_checkpoint(plan.model, self._artifact)
        settings = system_settings(self._artifact, self._checkpoint, plan.work, plan.threads)
        self._settings = settings | {"systems": str(SYSTEMS)}
        self._batches: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        """Measure; return what is written as JSON."""
        plan = self._plan
        vectors = plan.work / "vectors"
        vectors.mkdir(parents=True, exist_ok=True)
        precisions, logs = self._artifact.manifest.precisions, plan.work / "logs"
        ours = [name for name in (OURS, "ours-fp32") if name.partition("-")[2] in precisions]
        with Crew(FILE, logs, self._say) as crew:
            with Roof(plan.threads, logs, plan.roof_seconds) as roof:
                self._start(crew, [*ours, *plan.peers], self._settings)
                if not crew.workers:
                    raise SystemFailedError(f"no system runs: {crew.failed}")
                for corpus in plan.corpora:
                    self._throughput(crew, corpus, roof, vectors)
                rates = roof.rates()
            if plan.sts is not None:
                self._sts(crew, plan.sts, vectors)
            if "latency" in plan.cases:
                self._latency(crew)
            if "growth" in plan.cases:
                self._growth(crew)
            alive, failed = [worker.name for worker in crew.workers], crew.failed
        if "start" in plan.cases:
            self._starts(alive, failed)
        measured = Measured(
            rows={name: self._rows[name] for name in alive},
            failed=failed,
            rates=rates,
            load=self._watch.load(),
            ratios=self._ratios,
        )
        return text_result(plan, self._artifact, measured)

    def _find(self, name: str) -> tuple[str | None, str]:
        python, reason = super()._find(name)
        if python and TEXT_SYSTEMS[name].loads_checkpoint and self._checkpoint is None:
            made_from = "needs the checkpoint the artifact was made from"
            return None, f"{made_from}; name it: --checkpoint DIRECTORY"
        return python, reason

    def _ask(self, calls: list[list[str]], batch: int, kind: str = "") -> Request:
        """Return the request to encode some texts; without a kind, of the length that the model takes."""
        return {"calls": calls, "batch": batch, "tokens": most_tokens(self._artifact, kind)}

    def _throughput(self, crew: Crew, corpus: Corpus, roof: Roof, directory: Path) -> None:
        """Measure texts a second on one kind of texts, and fidelity on the same texts."""
        kind, texts = corpus.kind, list(corpus.texts)
        self._watch.begin(f"throughput, {kind}")
        batches: dict[str, int] = {}
        for worker in list(crew.workers):
            batch = self._best_batch(crew, worker, corpus)
            # All texts once: the warm-up, and the vectors.
            file = str(directory / f"{worker.name}-{kind}.npy")
            if crew.ask(worker, self._ask([texts], batch, kind) | {"save": file}) is not None:
                batches[worker.name] = batch
        self._batches |= batches
        answers = crew.take_turns(
            lambda name: self._ask([texts], batches[name], kind), self._plan.rounds, roof.measure
        )
        seconds = {name: [a["seconds"][0] for a in found] for name, found in answers.items()}
        lead = next(iter(seconds))
        reference_name = next(name for name in (*REFERENCES, lead) if name in seconds)
        reference = np.load(directory / f"{reference_name}-{kind}.npy")
        for name, taken in seconds.items():
            vectors = np.load(directory / f"{name}-{kind}.npy")
            self._rows[name].setdefault("throughput", {})[kind] = {
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
            self._keep(key, row["session_is"]["median"], ratio_of(self._artifact, corpus))
        self._keep_ratios(f"throughput, {kind}", seconds, ratio_of(self._artifact, corpus))

    def _best_batch(self, crew: Crew, worker: Worker, corpus: Corpus) -> int:
        """Return the batch size at which a peer is fastest on a part of the texts."""
        if worker.name.startswith("ours"):
            return 0
        texts = list(corpus.texts)
        length = count_tokens(self._artifact, corpus) / len(texts)
        most = min(len(texts), int(BATCH_TOKENS / length))
        sizes = [size for size in BATCHES if size <= most] or [BATCHES[0]]
        number = max(SEARCH_TEXTS, sizes[-1])
        part = texts[:: max(1, len(texts) // number)][:number]
        taken = dict.fromkeys(sizes, float("inf"))
        crew.ask(worker, self._ask([part[:8]], 8, corpus.kind))

        def go(size: int) -> None:
            answer = crew.ask(worker, self._ask([part], size, corpus.kind))
            if answer is not None:
                taken[size] = min(taken[size], answer["seconds"][0])

        for size in sizes if len(sizes) > 1 else ():
            go(size)
        # The second go is backwards: what else happened meanwhile must not decide.
        least = min(taken.values())
        for size in reversed([size for size in sizes if taken[size] < NEAR * least]):
            go(size)
        return min(taken, key=taken.__getitem__)

    def _sts(self, crew: Crew, file: Path, directory: Path) -> None:
        """Correlate each system's cosines with human scores."""
        from scipy.stats import spearmanr

        from onnxsim_embed.files.texts import read_scored_pairs

        self._watch.begin(f"Spearman on {file.name}")
        left, right, scores = read_scored_pairs(file)
        for worker in list(crew.workers):
            vectors_file = str(directory / f"{worker.name}-sts.npy")
            request = self._ask([[*left, *right]], 32) | {"save": vectors_file}
            if crew.ask(worker, request) is None:
                continue
            vectors = np.load(vectors_file)
            cosines = np.einsum("ij,ij->i", vectors[: len(left)], vectors[len(left) :])
            rank = 100 * float(spearmanr(cosines, scores).statistic)
            self._rows[worker.name]["sts_spearman"] = rank

    def _latency(self, crew: Crew) -> None:
        """Measure calls of one text and of a few."""
        self._watch.begin("latency")
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
                warm_up = crew.ask(worker, self._ask(calls[:WARM_UP_CALLS], size))
                if warm_up is not None:
                    fits = int(LATENCY_SECONDS / min(warm_up["seconds"]))
                    part = calls[: max(LEAST_CALLS, fits)]
                    requests[worker.name] = self._ask(part, size)
            answers = crew.take_turns(requests.get, self._plan.rounds)
            medians = {}
            for name, found in answers.items():
                every = np.concatenate([answer["seconds"] for answer in found])
                values = 1e3 * np.percentile(every, [50, 90, 99])
                row = self._rows[name].setdefault("latency_ms", {})
                row[str(size)] = dict(zip(("p50", "p90", "p99"), values.tolist(), strict=True))
                medians[name] = [float(np.median(answer["seconds"])) for answer in found]
            self._keep_ratios(
                f"latency of {size}", medians, ratio_of(self._artifact, self._plan.corpora[0])
            )

    def _growth(self, crew: Crew) -> None:
        """Measure calls of more and more texts."""
        self._watch.begin("growth")
        texts = list(self._plan.corpora[0].texts)
        for size in (size for size in GROWTH if size <= len(texts)):
            calls = [texts[:size]] * max(1, 100 // size)

            def request(name: str, calls: list[list[str]] = calls) -> Request:
                return self._ask(calls, self._batches[name])

            for name, found in crew.take_turns(request, self._plan.rounds).items():
                every = [seconds for answer in found for seconds in answer["seconds"]]
                row = self._rows[name].setdefault("growth_seconds", {})
                row[str(size)] = float(np.median(every))

    def _starts(self, names: Sequence[str], failed: dict[str, str]) -> None:
        """Measure fresh processes up to their first vector, and the most memory each ever holds.

        :param failed: those that cannot are added, with the reason.
        """
        self._watch.begin("start and memory")
        corpora = self._plan.corpora
        texts = list(corpora[min(1, len(corpora) - 1)].texts)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(min(STARTS, self._plan.rounds)):
            for name in names[:: 1 if number % 2 == 0 else -1]:
                log = self._plan.work / "logs" / f"{name}-start.log"
                try:
                    worker = Worker(name, self._pythons[name], FILE, self._settings, log)
                    if number == 0:
                        asked = self._ask([texts], self._batches[name])
                        self._rows[name]["peak_mb"] = worker.ask(asked)["highest_mb"]
                except SystemFailedError as error:
                    failed[name] = f"in a fresh process: {error}"
                    self._say(f"{name}: {failed[name]}")
                    continue
                seconds[name].append(worker.seconds_to_first)
                worker.close()
        seconds = {name: taken for name, taken in seconds.items() if name not in failed}
        for name, taken in seconds.items():
            self._rows[name]["start_seconds"] = spread(taken)
        self._keep_ratios("start", seconds, self._artifact.manifest.name)
