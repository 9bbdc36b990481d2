"""Runs systems in turns, each round of a system in a fresh process, and collects the figures."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.artifact.cache import cache_directory, locate_artifact
from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import CheckpointError, OnnxsimEmbedError
from onnxsim_embed.system.hardware import available_cpus, cpu_flags, cpu_name

# Titles of peers, and the modules they need. The first that runs is the reference of fidelity.
ST, ONNX, OPENVINO = ("sentence_transformers",), ("optimum.onnxruntime",), ("optimum.intel",)
PEERS = {
    "torch": ("PyTorch, pooling by hand", ("torch", "transformers")),
    "st-torch": ("sentence-transformers, PyTorch", ST),
    "st-onnx": ("sentence-transformers, ONNX", ST + ONNX),
    "st-onnx-O3": ("sentence-transformers, ONNX O3", ST + ONNX),
    "st-onnx-qint8": ("sentence-transformers, ONNX qint8", ST + ONNX),
    "st-openvino": ("sentence-transformers, OpenVINO", ST + OPENVINO),
    "st-openvino-static": (
        "sentence-transformers, OpenVINO static qint8", (*ST, *OPENVINO, "nncf", "datasets"),
    ),
    "fastembed": ("fastembed", ("fastembed",)),
}  # fmt: skip
REFERENCES = ("torch", "st-torch", "ours-fp32")
CASES = {  # numbers of texts of a call, and calls of a round; start is a by-product
    "latency": {1: 60, 8: 20, 32: 10},
    "growth": {10: 5, 100: 2, 1000: 1},
    "start": {},
}
BATCHES = (8, 32, 128)  # of peers; onnxsim-embed chooses its own
MAX_BUSY = 0.1  # other work up to this share of the processors is a desktop's own

ScoredPairs = tuple[Sequence[str], Sequence[str], Sequence[float]]

# These change what is measured without a trace in the results. OPENBLAS_CORETYPE makes numpy multiply
# with the kernels of another processor.
CLEARED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
           "OMP_WAIT_POLICY", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")  # fmt: skip

IMPORTABLE = """
import importlib.util, sys
for name in sys.argv[1:]:
    try: print(importlib.util.find_spec(name) is not None)
    except ImportError: print(False)
"""


def choose_peers(names: str, python: str) -> list[str]:
    """Return the peers of a comma-separated list, or of "installed", "all" or "none".

    :param python: the interpreter in which "installed" peers are looked for.
    :raises ValueError: for an unknown name.
    """
    if names == "installed":
        modules = sorted({module for _, needed in PEERS.values() for module in needed})
        done = subprocess.run(
            [python, "-c", IMPORTABLE, *modules], capture_output=True, text=True, check=True
        )
        found = {m for m, line in zip(modules, done.stdout.split(), strict=True) if line == "True"}
        return [name for name, (_, needed) in PEERS.items() if found.issuperset(needed)]
    chosen = list(PEERS) if names == "all" else [name.strip() for name in names.split(",")]
    chosen = [name for name in chosen if name not in ("", "none")]
    if unknown := [name for name in chosen if name not in PEERS]:
        raise ValueError(
            f"unknown peer {unknown[0]!r}; allowed are {', '.join(PEERS)}, or installed, all, none"
        )
    return chosen


def find_checkpoint(model: str, artifact: Artifact) -> Path | None:
    """Return the checkpoint that peers load in place of an artifact; None if it is not on this machine."""
    for name in (model, artifact.manifest.source):
        try:
            directory, _ = locate_checkpoint(name)
        except CheckpointError:
            continue
        if list(directory.glob("*.safetensors")) or list(directory.glob("pytorch_model*.bin")):
            return directory
    return None


def int8_kernels(flags: frozenset[str] | None = None) -> str:
    """Return optimum's name for the int8 instructions of this machine."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    flags = cpu_flags() if flags is None else flags
    kernels = {"avx512_vnni": "avx512_vnni", "avx512f": "avx512"}
    return next((kernel for flag, kernel in kernels.items() if flag in flags), "avx2")


def system_settings(
    artifact: Artifact, checkpoint: Path | None, work: Path, threads: int
) -> dict[str, Any]:
    """Return the settings of worker.py, and write the calibration texts that one peer needs."""
    calibration = work / "calibration" / "train.jsonl"
    calibration.parent.mkdir(parents=True, exist_ok=True)
    calibration.write_bytes(files("onnxsim_embed").joinpath("data/calibration.jsonl").read_bytes())
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.directory),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "work": str(work.absolute()),
        "calibration": str(calibration.parent.absolute()),
        "threads": threads,
        "pooling": list(manifest.pooling) if not manifest.dense else ["with dense layers"],
        "dim": manifest.dim,
        "max_seq_length": manifest.max_seq_length,
        "int8_kernels": int8_kernels(),
    }


def run_once(name: str, python: str, settings: dict[str, Any], request: Any) -> dict[str, Any]:  # noqa: ANN401
    """Measure a system once in a fresh process.

    :raises OSError: if it fails; the message is the last line of its output.
    """
    threads = str(settings["threads"])
    environment = {key: value for key, value in os.environ.items() if key not in CLEARED}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    environment |= {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    started = time.time()
    done = subprocess.run(
        [python, str(Path(__file__).with_name("worker.py")), name, json.dumps(settings)],
        input=json.dumps(request), capture_output=True, encoding="utf-8", env=environment,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        raise OSError(lines[0][:200])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"start": answer["ready"] - started}


def fidelity(vectors: Any, reference: Any) -> dict[str, float]:  # noqa: ANN401 - arrays
    """Return the mean and the minimum cosine of vectors with the reference's of the same texts."""
    left, right = np.asarray(vectors, np.float64), np.asarray(reference, np.float64)
    cosines = np.einsum("ij,ij->i", left, right)
    cosines /= np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = np.minimum(cosines, 1)
    return {"mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min())}


def busy_share(seconds: float = 1.0) -> float:
    """Return the share of the processors at work while this process sleeps; 0 without /proc."""
    try:
        ticks = []
        for pause in (0.0, seconds):
            time.sleep(pause)
            fields = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
            ticks.append((sum(map(int, fields)), int(fields[3]) + int(fields[4])))
    except (OSError, ValueError, IndexError):
        return 0.0
    (total, idle), (total_after, idle_after) = ticks
    return 1 - (idle_after - idle) / max(1, total_after - total)


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
    :param patience: seconds to wait before each round until the machine does nothing else.
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
        missing = f"the checkpoint of {artifact.manifest.source} is not on this machine"
        failed = {name: missing for name in peers if name != "fastembed"}
    request = {"texts": list(texts)}
    request |= {
        case: {size: calls for size, calls in CASES[case].items() if size <= len(texts)}
        for case in cases
    }
    for number in range(rounds):
        deadline, busy = time.monotonic() + patience, busy_share()
        while busy > MAX_BUSY and time.monotonic() < deadline:
            busy = busy_share()
        if busy > MAX_BUSY:
            say(f"the machine is {busy:.0%} busy with other work: figures are uncertain")
        # Every other round runs in reverse order, so that no system always follows the same one.
        for name in list(answers)[:: 1 if number % 2 == 0 else -1]:
            if name in failed:
                continue
            say(f"round {number + 1} of {rounds}: {name}")
            ours, known = name.startswith("ours"), answers[name]
            request["batches"] = [0] if ours else [known[0]["batch"]] if known else list(BATCHES)
            request["vectors"] = str(work / f"{name}.npy")
            if sts is not None and not known:
                request["sts"] = {
                    "texts": [*sts[0], *sts[1]],
                    "vectors": str(work / f"{name}-sts.npy"),
                }
            try:
                known.append(run_once(name, sys.executable if ours else python, settings, request))
            except OSError as error:
                failed[name] = str(error)
            request.pop("sts", None)
    measured = {name: each for name, each in answers.items() if name not in failed}
    if not measured:
        raise OnnxsimEmbedError(f"no system runs: {failed}")
    reference = next(name for name in (*REFERENCES, *measured) if name in measured)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {"processor": cpu_name(), "processors": available_cpus(), "threads": threads},
        "model": artifact.manifest.name,
        "texts": len(texts),
        "rounds": rounds,
        "reference": reference,
        "systems": {
            name: _figures(name, each, measured, work, reference, sts)
            for name, each in measured.items()
        },
        "failed": failed,
    }


def _figures(
    name: str,
    answers: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Sequence[Mapping[str, Any]]],
    work: Path,
    reference: str,
    sts: ScoredPairs | None,
) -> dict[str, Any]:
    """Return the figures of a system: medians over rounds, and percentiles over calls."""
    lead = next(iter(measured.values()))
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(answers, lead, strict=True)]
    seconds = float(np.median([answer["seconds"] for answer in answers]))
    figures: dict[str, Any] = {
        "title": PEERS[name][0] if name in PEERS else f"onnxsim-embed {name.removeprefix('ours-')}",
        "versions": answers[0]["versions"],
        "batch": answers[0]["batch"],
        "seconds": seconds,
        "lead_is": [float(np.median(ratios)), min(ratios), max(ratios)],
        "start_seconds": float(np.median([answer["start"] for answer in answers])),
        "peak_mb": answers[-1]["peak_mb"],
        **fidelity(np.load(work / f"{name}.npy"), np.load(work / f"{reference}.npy")),
    }
    for case in ("latency", "growth"):
        calls = {size: [a[case][size] for a in answers] for size in answers[0][case]}
        percentiles = {
            size: np.percentile(np.concatenate(c), [50, 90, 99]) for size, c in calls.items()
        }
        figures[f"{case}_ms"] = {size: (1e3 * p).tolist() for size, p in percentiles.items()}
    if sts is not None:
        from scipy.stats import spearmanr

        left, right = np.split(np.load(work / f"{name}-sts.npy"), 2)
        cosines = np.einsum("ij,ij->i", left, right)
        figures["sts_spearman"] = 100 * float(spearmanr(cosines, sts[2]).statistic)
    return figures


def documentation() -> list[str]:
    """Return paragraphs of prose from the docstrings of numpy and scipy: texts without a download."""
    import pydoc

    paragraphs = []
    for name in (
        "numpy",
        "numpy.linalg",
        "numpy.fft",
        "scipy.linalg",
        "scipy.optimize",
        "scipy.signal",
        "scipy.stats",
        "scipy.sparse",
    ):
        module = import_module(name)
        for member in sorted(set(dir(module))):
            text = pydoc.getdoc(getattr(module, member))
            paragraphs += [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [
        p for p in paragraphs if p[:1].isupper() and p.endswith(".") and 8 <= p.count(" ") < 120
    ]
