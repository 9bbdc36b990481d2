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
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from psutil import cpu_percent

from onnxsim_embed.artifact.cache import locate_artifact
from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.artifact.recipes import cache_directory
from onnxsim_embed.errors import CheckpointError, OnnxsimEmbedError
from onnxsim_embed.files.texts import read_scored_pairs
from onnxsim_embed.system.hardware import bf16_supported, cpu_flags, cpu_name

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
    "ctranslate2": ("CTranslate2 int8", ("ctranslate2", "torch", "transformers")),
    "chroma": ("Chroma's default", ("chromadb",)),
}
REFERENCES = ("torch", "st-torch", "ours-fp32")
# Texts of a call; start needs no calls, since each round starts a fresh process.
CASES: dict[str, tuple[int, ...]] = {"latency": (1, 8, 32), "growth": (10, 100, 1000), "start": ()}
BATCHES = (8, 32, 128)  # of peers; onnxsim-embed chooses its own
MAX_BUSY = 0.1  # a desktop's own needs, as a share of the processors

# These change what is measured without a trace in the results. OPENBLAS_CORETYPE makes numpy multiply
# with the kernels of another processor.
CLEARED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
           "OMP_WAIT_POLICY", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")  # fmt: skip

PACKAGES = "import importlib.metadata as m; print(*{d.name.lower() for d in m.distributions()})"


def choose_peers(names: str, python: str) -> list[str]:
    """Return the peers of a comma-separated list, or of "installed" (in `python`), "all" or "none"."""
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


def own_systems(artifact: Artifact) -> list[str]:
    """Return our precisions, each on the engines that are installed and that this machine has them on."""
    held = [name for name in ("int8", "fp32") if name in artifact.manifest.precisions]
    openvino = find_spec("openvino") is not None
    systems = [f"ours-{name}" for name in held]
    systems += [f"ours-{name}-openvino" for name in held if openvino]
    return systems + ["ours-bf16"] * (openvino and bf16_supported()[0])


def recommendation(result: Mapping[str, Any]) -> str:
    """Return which of our own systems is the fastest, at which fidelity, and how to choose it."""
    name, row = min(
        ((name, row) for name, row in result["systems"].items() if name.startswith("ours")),
        key=lambda item: item[1]["seconds"],
    )
    chosen = dict(zip(("precision", "engine"), name.split("-")[1:], strict=False))
    arguments = ", ".join(f'{key}="{value}"' for key, value in chosen.items())
    options = " ".join(f"--{key} {value}" for key, value in chosen.items())
    return (
        f"The fastest of ours is {row['title'].removeprefix('onnxsim-embed ')}, at a mean cosine of "
        f"{row['mean_cosine']:.5f}: choose it with Embedder(..., {arguments}), or {options}."
    )


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


def system_settings(
    artifact: Artifact, checkpoint: Path | None, work: Path, threads: int
) -> dict[str, Any]:
    """Return the settings of worker.py, and write the calibration texts that one peer needs."""
    calibration = work.absolute() / "calibration"
    calibration.mkdir(parents=True, exist_ok=True)
    texts = files("onnxsim_embed").joinpath("data/calibration.jsonl").read_bytes()
    (calibration / "train.jsonl").write_bytes(texts)
    kernels = {"avx512_vnni": "avx512_vnni", "avx512f": "avx512"}  # optimum's names
    kernel = next((name for flag, name in kernels.items() if flag in cpu_flags()), "avx2")
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
        "int8_kernels": "arm64" if platform.machine().lower() in ("arm64", "aarch64") else kernel,
    }


def run_once(
    name: str, python: str, settings: dict[str, Any], request: dict[str, Any]
) -> dict[str, Any]:
    """Measure a system once in a fresh process; raise OSError with its last line if it fails."""
    threads = str(settings["threads"])
    environment = {key: value for key, value in os.environ.items() if key not in CLEARED}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
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
    from onnxsim_embed.export.fidelity import row_cosines  # which loads onnxruntime

    cosines = np.minimum(row_cosines(vectors, reference), 1)
    return {"mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min())}


def wait_for_quiet(patience: float, say: Callable[[str], None]) -> float:
    """Wait up to `patience` seconds for a second without other work; return the share that is busy."""
    deadline = time.monotonic() + patience
    while (busy := cpu_percent(1) / 100) > MAX_BUSY and time.monotonic() < deadline:
        pass
    if busy > MAX_BUSY:
        say(f"the machine is {busy:.0%} busy with other work: figures are uncertain")
    return busy


def run(
    model: str,
    texts: Sequence[str],
    peers: Sequence[str],
    python: str,
    cases: Sequence[str],
    checkpoint: Path | None,
    sts: Path | None,
    threads: int,
    rounds: int,
    patience: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure our precisions and peers on texts; return the figures of each system, as JSON.

    The arguments are those of the command; `python` is the interpreter of the peers.
    """
    artifact = locate_artifact(model)
    checkpoint = checkpoint or find_checkpoint(model, artifact)
    work = cache_directory() / "bench" / artifact.directory.name
    settings = system_settings(artifact, checkpoint, work, threads)
    ours = own_systems(artifact)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in [*ours, *peers]}
    failed = {}
    if checkpoint is None:
        missing = f"the checkpoint of {artifact.manifest.source} is not available"
        failed = {name: missing for name in peers if name not in ("fastembed", "chroma")}
    left, right, scores = ([], [], []) if sts is None else read_scored_pairs(sts)
    sizes = [size for case in cases for size in CASES[case] if size <= len(texts)]
    request = {"texts": list(texts), "pairs": [*left, *right], "sizes": sizes}
    for number in range(rounds):
        wait_for_quiet(patience, say)
        # Every other round runs in reverse order, so that no system always follows the same one.
        for name in [n for n in answers if n not in failed][:: 1 if number % 2 == 0 else -1]:
            say(f"round {number + 1} of {rounds}: {name}")
            known, interpreter = answers[name], sys.executable if name in ours else python
            batches = [0] if name in ours else [known[0]["batch"]] if known else BATCHES
            request |= {"batches": batches, "save": str(work / name)}
            try:
                known.append(run_once(name, interpreter, settings, request))
            except OSError as error:
                failed[name] = str(error)
        request["pairs"] = []  # the first round is enough
    measured = {name: each for name, each in answers.items() if name not in failed}
    if not measured:
        raise OnnxsimEmbedError(f"no system runs: {failed}")
    reference = next(name for name in (*REFERENCES, *measured) if name in measured)
    lead = [answer["seconds"] for answer in next(iter(measured.values()))]
    rows = {name: _figures(name, each, lead) for name, each in measured.items()}
    for name, row in rows.items():
        row |= fidelity(np.load(work / f"{name}.npy"), np.load(work / f"{reference}.npy"))
        if sts is not None:
            row["sts_spearman"] = _spearman(work / f"{name}-pairs.npy", scores)
    return {
        "date": time.strftime("%F", time.gmtime()),
        "processor": cpu_name(),
        "threads": threads,
        "model": artifact.manifest.name,
        "texts": len(texts),
        "rounds": rounds,
        "reference": reference,
        "systems": rows,
        "failed": failed,
    }


def _figures(name: str, answers: list[dict[str, Any]], lead: list[float]) -> dict[str, Any]:
    """Return the figures of a system: medians over rounds, and percentiles over calls."""
    seconds = [answer["seconds"] for answer in answers]
    ratios = np.divide(seconds, lead)
    sizes = answers[0]["calls"]
    calls = {size: np.array([answer["calls"][size] for answer in answers]) for size in sizes}
    return {
        "title": PEERS[name][0] if name in PEERS else own_title(name),
        "versions": answers[0]["versions"],
        "batch": answers[0]["batch"],
        "seconds": float(np.median(seconds)),
        "lead_is": [float(pick(ratios)) for pick in (np.median, np.min, np.max)],
        "start_seconds": float(np.median([answer["start"] for answer in answers])),
        "peak_mb": answers[-1]["peak_mb"],
        "calls_ms": {n: (1e3 * np.percentile(t, [50, 90, 99])).tolist() for n, t in calls.items()},
    }


def own_title(name: str) -> str:
    """Return the title of one of our own systems, such as ours-int8-openvino."""
    _, precision, *engine = name.split("-")
    openvino = ", OpenVINO" if engine or precision == "bf16" else ""
    return f"onnxsim-embed {precision}{openvino}"


def _spearman(file: Path, scores: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    left, right = np.split(np.load(file), 2)
    return 100 * float(spearmanr(np.einsum("ij,ij->i", left, right), scores).statistic)


def documentation() -> list[str]:
    """Return paragraphs of prose from the docstrings of numpy and scipy: texts without a download."""
    modules = map(import_module, ("numpy", "numpy.linalg", "scipy.optimize", "scipy.stats"))
    docs = [pydoc.getdoc(getattr(m, name)) for m in modules for name in sorted(set(dir(m)))]
    texts = [" ".join(part.split()) for doc in docs for part in re.split(r"\n\s*\n", doc)]
    return [text for text in texts if re.fullmatch(r"[A-Z](\S* ){8,120}\S*\.", text)]
