"""Chroma's default embedding function and this package's, on 1, 32 and 1,000 short texts.

    python bench/chroma.py FILE [--column C] [--rounds 3] [--model all-MiniLM-L6-v2]

Texts are the first words of the file's, at most 16 each. Both run in turn in one process, with chromadb
installed; Chroma's function reads its model from ~/.cache/chroma, and downloads it there once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from chromadb.utils.embedding_functions import DefaultEmbeddingFunction

from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.integrations.chroma import OnnxsimEmbeddingFunction
from onnxsim_embed.system.hardware import available_cpus, cpu_name

SIZES = (1, 32, 1_000)
WORDS = 16


def main() -> None:
    """Measure, print, and write bench/results/chroma.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--column")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    options = parser.parse_args()
    words = (text.split()[:WORDS] for text in iter_texts(options.file, options.column))
    texts = list(dict.fromkeys(map(" ".join, words)))[: max(SIZES)]
    functions = {
        "chroma": DefaultEmbeddingFunction(),
        "fp32": OnnxsimEmbeddingFunction(options.model, precision="fp32"),
        "int8": OnnxsimEmbeddingFunction(options.model, precision="int8"),
    }
    vectors = {name: np.array(function(texts[:32])) for name, function in functions.items()}
    rows = []
    for size in SIZES:
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(options.rounds):
            for name, function in functions.items():
                started = time.perf_counter()
                function(texts[:size])
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {"texts": size, "seconds": medians}
            | {f"{name}_times": medians["chroma"] / medians[name] for name in ("fp32", "int8")}
        )
        print(rows[-1], flush=True)
    summary = {
        "machine": cpu_name(),
        "threads": available_cpus(),
        "versions": {name: version(name) for name in ("chromadb", "onnxruntime")},
        "rounds": options.rounds,
        "mean_words": statistics.mean(len(text.split()) for text in texts),
        "max_difference_fp32": float(np.abs(vectors["chroma"] - vectors["fp32"]).max()),
        "min_cosine_int8": float((vectors["chroma"] * vectors["int8"]).sum(axis=1).min()),
        "rows": rows,
    }
    target = Path(__file__).parent / "results" / "chroma.json"
    target.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
