"""Runs systems in turns, each round of a system in a fresh process, and collects the figures."""

from __future__ import annotations

import json
import os
import platform
import pydoc
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.artifact.cache import cache_directory, locate_artifact, locate_checkpoint
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import CheckpointError, OnnxsimEmbedError
from onnxsim_embed.system.hardware import available_cpus, cpu_flags, cpu_name

# Titles of peers, and the packages they need. The first that runs is the reference of fidelity.
ST, ONNX = ("sentence-transformers",), ("sentence-transformers", "optimum-onnx")
OPENVINO = ("sentence-transformers", "optimum-intel", "openvino")
PEERS = {
    "torch": ("PyTorch, pooling by hand", ("torch", "transformers")),
    "st-torch": ("sentence-transformers, PyTorch", ST),
    "st-onnx": ("sentence-transformers, ONNX", ONNX),
    "st-onnx-O3": ("sentence-transformers, ONNX O3", ONNX),
    "st-onnx-qint8": ("sentence-transformers, ONNX qint8", ONNX),
    "st-openvino": ("sentence-transformers, OpenVINO", OPENVINO),
    "st-openvino-static": ("sentence-transformers, OpenVINO static qint8", (*OPENVINO, "nncf")),
    "fastembed": ("fastembed", ("fastembed",)),
}
REFERENCES = ("torch", "st-torch", "ours-fp32")
CASES: dict[str, dict[int, int]] = {  # texts of a call, and calls of a round
    "latency": {1: 60, 8: 20, 32: 10},
    "growth": {10: 5, 100: 2, 1000: 1},
    "start": {},  # each round starts a fresh process
}
BATCHES = (8, 32, 128)  # of peers; onnxsim-embed chooses its own
MAX_BUSY = 0.1  # a desktop's own needs, as a share of the processors

# These change what is measured without a trace in the results. OPENBLAS_CORETYPE makes numpy multiply
# with the kernels of another processor.
CLEARED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
           "OMP_WAIT_POLICY", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")  # fmt: skip

PACKAGES = "import importlib.metadata as m; print(*{d.name.lower() for d in m.distributions()})"

ScoredPairs = tuple[Sequence[str], Sequence[str], Sequence[float]]


def choose_peers(names: str, python: str) -> list[str]:
    """Return the peers of a comma-separated list, or of "installed", "all" or "none".

    :param python: the interpreter in which "installed" peers are looked for.
    :raises ValueError: for an unknown name.
    """
    if names == "installed":
        done = subprocess.run([python, "-c", PACKAGES], capture_output=True, text=True, check=True)
        packages = set(done.stdout.split())
        return [name for name, (_, needed) in PEERS.items() if packages.issuperset(needed)]
    chosen = list(PEERS) if names == "all" else [name.strip() for name in names.split(",")]
    chosen = [name for name in chosen if name not in ("", "none")]
    if unknown := [name for name in chosen if name not in PEERS]:
        raise ValueError(
            f"unknown peer {unknown[0]!r}; allowed are {', '.join(PEERS)}, or installed, all, none"
        )
    return chosen


def find_checkpoint(model: str, artifact: Artifact) -> Path | None:
    """Return the checkpoint that peers load in place of an artifact; None if it is not available."""
    for name in (model, artifact.manifest.source):
        try:
            directory, _ = locate_checkpoint(name)
        except CheckpointError:
            continue
        if list(directory.glob("*.safetensors")) or list(directory.glob("pytorch_model*.bin")):
            return directory
    return None


def int8_kernels(flags: frozenset[str]) -> str:
    """Return optimum's name for the int8 instructions of this machine."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    kernels = {"avx512_vnni": "avx512_vnni", "avx512f": "avx512"}
    return next((kernel for flag, kernel in kernels.items() if flag in flags), "avx2")


def system_settings(
    artifact: Artifact, checkpoint: Path | None, work: Path, threads: int
) -> dict[str, Any]:
    """Return the settings of worker.py, and write the calibration texts that one peer needs."""
    calibration = work.absolute() / "calibration"
    calibration.mkdir(parents=True, exist_ok=True)
    texts = files("onnxsim_embed").joinpath("data/calibration.jsonl").read_bytes()
    (calibration / "train.jsonl").write_bytes(texts)
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.directory),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "work": str(work.absolute()),
        "calibration": str(calibration),
        "threads": threads,
        "pooling": list(manifest.pooling) if not manifest.dense else ["with dense layers"],
        "dim": manifest.dim,
        "max_seq_length": manifest.max_seq_length,
        "int8_kernels": int8_kernels(cpu_flags()),
    }


def run_once(
    name: str, python: str, settings: dict[str, Any], request: dict[str, Any]
) -> dict[str, Any]:
    """Measure a system once in a fresh process; raise OSError with its last line if it fails."""
    threads = str(settings["threads"])
    environment = {key: value for key, value in os.environ.items() if key not in CLEARED}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    environment |= {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    command = [python, str(Path(__file__).with_name("worker.py")), name, json.dumps(settings)]
    started = time.time()
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, encoding="utf-8", env=environment
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        raise OSError(lines[0][:200])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"start": answer["ready"] - started}


def fidelity(vectors: Any, reference: Any) -> dict[str, float]:  # noqa: ANN401 - arrays
    """Return the mean and the minimum cosine of vectors with the reference's of the same texts."""
    left, right = np.asarray(vectors, np.float64), np.asarray(reference, np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = np.minimum(np.einsum("ij,ij->i", left, right) / norms, 1)
    return {"mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min())}


def wait_until_idle(patience: float, say: Callable[[str], None]) -> None:
    """Wait until the machine does nothing else, at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while (busy := _busy_share()) > MAX_BUSY and time.monotonic() < deadline:
        pass
    if busy > MAX_BUSY:
        say(f"the machine is {busy:.0%} busy with other work: figures are uncertain")


def _busy_share() -> float:
    """Return the share of the processors at work during a second; 0 without /proc."""
    ticks = []
    for pause in (0, 1):
        time.sleep(pause)
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
        except OSError:
            return 0.0
        ticks.append([sum(map(int, fields)), int(fields[3]) + int(fields[4])])
    total, idle = np.subtract(ticks[1], ticks[0])
    return float(1 - idle / max(1, total))


def run(
    model: str,
    texts: Sequence[str],
    peers: Sequence[str],
    *,
    python: str,
    threads: int,
    rounds: int,
    cases: Sequence[str],
    patience: float,
    checkpoint: Path | None,
    sts: ScoredPairs | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure our precisions and peers on texts; return the figures of each system, as JSON.

    :param python: the interpreter of the peers.
    :param patience: seconds to wait before each round until the machine is idle.
    :param checkpoint: what peers load; default: what the model was exported from.
    :param sts: left texts, right texts and human scores.
    """
    artifact = locate_artifact(model)
    checkpoint = checkpoint or find_checkpoint(model, artifact)
    work = cache_directory() / "bench" / artifact.directory.name
    settings = system_settings(artifact, checkpoint, work, threads)
    names = [f"ours-{name}" for name in ("int8", "fp32") if name in artifact.manifest.precisions]
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in [*names, *peers]}
    failed = {}
    if checkpoint is None:
        missing = f"the checkpoint of {artifact.manifest.source} is not available"
        failed = {name: missing for name in peers if name != "fastembed"}
    request: dict[str, Any] = {
        case: {size: calls for size, calls in CASES[case].items() if size <= len(texts)}
        for case in cases
    }
    request |= {"texts": list(texts), "pairs": [] if sts is None else [*sts[0], *sts[1]]}
    for number in range(rounds):
        wait_until_idle(patience, say)
        # Every other round runs in reverse order, so that no system always follows the same one.
        for name in [n for n in answers if n not in failed][:: 1 if number % 2 == 0 else -1]:
            say(f"round {number + 1} of {rounds}: {name}")
            ours, known = name.startswith("ours"), answers[name]
            request["batches"] = [0] if ours else [known[0]["batch"]] if known else BATCHES
            request["save"] = str(work / name)
            try:
                known.append(run_once(name, sys.executable if ours else python, settings, request))
            except OSError as error:
                failed[name] = str(error)
            request["pairs"] = request["pairs"] if number == 0 else []
    measured = {name: each for name, each in answers.items() if name not in failed}
    if not measured:
        raise OnnxsimEmbedError(f"no system runs: {failed}")
    reference = next(name for name in (*REFERENCES, *measured) if name in measured)
    lead = [answer["seconds"] for answer in next(iter(measured.values()))]
    exact = np.load(work / f"{reference}.npy")
    rows = {}
    for name, each in measured.items():
        rows[name] = _figures(name, each, lead)
        rows[name] |= fidelity(np.load(work / f"{name}.npy"), exact)
        if sts is not None:
            rows[name]["sts_spearman"] = _spearman(work / f"{name}-pairs.npy", sts[2])
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {"processor": cpu_name(), "processors": available_cpus(), "threads": threads},
        "model": artifact.manifest.name,
        "texts": len(texts),
        "rounds": rounds,
        "reference": reference,
        "systems": rows,
        "failed": failed,
    }


def _figures(name: str, answers: Sequence[dict[str, Any]], lead: Sequence[float]) -> dict[str, Any]:
    """Return the figures of a system: medians over rounds, and percentiles over calls."""
    seconds = [answer["seconds"] for answer in answers]
    ratios = np.divide(seconds, lead)
    figures = {
        "title": PEERS[name][0] if name in PEERS else f"onnxsim-embed {name.removeprefix('ours-')}",
        "versions": answers[0]["versions"],
        "batch": answers[0]["batch"],
        "seconds": float(np.median(seconds)),
        "lead_is": [float(pick(ratios)) for pick in (np.median, np.min, np.max)],
        "start_seconds": float(np.median([answer["start"] for answer in answers])),
        "peak_mb": answers[-1]["peak_mb"],
    }
    for case in ("latency", "growth"):
        calls = {size: np.array([a[case][size] for a in answers]) for size in answers[0][case]}
        figures[f"{case}_ms"] = {
            size: (1e3 * np.percentile(times, [50, 90, 99])).tolist()
            for size, times in calls.items()
        }
    return figures


def _spearman(file: Path, scores: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    left, right = np.split(np.load(file), 2)
    return 100 * float(spearmanr(np.einsum("ij,ij->i", left, right), scores).statistic)


def documentation() -> list[str]:
    """Return paragraphs of prose from the docstrings of numpy and scipy: texts without a download."""
    paragraphs = []
    for name in ("numpy", "numpy.linalg", "scipy.optimize", "scipy.signal", "scipy.stats"):
        module = import_module(name)
        for member in sorted(set(dir(module))):
            text = pydoc.getdoc(getattr(module, member))
            paragraphs += [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [
        p for p in paragraphs if p[:1].isupper() and p.endswith(".") and 8 <= p.count(" ") < 120
    ]
