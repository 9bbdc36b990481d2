"""What the engine costs: encode_files on a Ray cluster of this machine beside one process, on the same texts.

    python bench/cluster.py texts.csv --column text --rows 5000 20000 --engine-only 100000

Both take turns. The engine's clock runs from the first part's start to the last one's end, in the actors: starting the
cluster and loading models, which happen once, are told apart. Writes bench/results/cluster.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from lab.conditions import machine, today

from onnxsim_embed import Embedder
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.ray import EncodedFiles, cluster, encode_files, write_graph
from onnxsim_embed.similarity.compare import similarity_matrix

RESULTS = Path(__file__).parent / "results" / "cluster.json"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "texts", help="csv, tsv, jsonl, parquet or txt; repeated where there are too few"
    )
    parser.add_argument("--column")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 20000])
    parser.add_argument(
        "--engine-only", type=int, nargs="*", default=[], help="sizes encoded on the cluster alone"
    )
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    known = list(iter_texts(options.texts, options.column))
    model = Embedder.from_pretrained(options.model)
    rows: list[dict[str, float | int]] = []
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        with cluster():
            start = time.perf_counter() - started
            for count in options.rows:
                rows.append(measure(model, texts_of(known, count), options.rounds, Path(work)))
                print(rows[-1], flush=True)
            for count in options.engine_only:
                rows.append(measure_engine(model, texts_of(known, count), Path(work)))
                print(rows[-1], flush=True)
    table = {
        "date": today(),
        "machine": machine(model.threads),
        "texts": Path(options.texts).name,
        "model": model.artifact.manifest.name,
        "precision": model.precision,
        "seconds_start_of_cluster": round(start, 2),
        "encode": rows,
    }
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")


def texts_of(known: list[str], count: int) -> list[str]:
    """Return so many different texts: those known, then the same with a number behind."""
    return [
        known[i % len(known)] + (f" {i // len(known)}" if i >= len(known) else "")
        for i in range(count)
    ]


def measure(model: Embedder, texts: list[str], rounds: int, work: Path) -> dict[str, float | int]:
    """Encode and compare texts by one process and on the cluster, by turns."""
    source = write_texts(texts, work)
    one, engine, whole, compared, compared_there = [], [], [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        vectors = model.encode(texts)
        one.append(time.perf_counter() - started)
        done, seconds = on_cluster(model, source, work)
        whole.append(seconds)
        engine.append(done.seconds)
        if not np.array_equal(done.vectors.read(), vectors):
            raise AssertionError("the engine's vectors are others")
        started = time.perf_counter()
        matrix = similarity_matrix(vectors, threshold=0.5)
        compared.append(time.perf_counter() - started)
        started = time.perf_counter()
        graph = write_graph(work / "vectors", work / "graph", threshold=0.5)
        compared_there.append(time.perf_counter() - started)
        if graph.nnz != matrix.nnz:
            raise AssertionError("the engine's graph is another")
        shutil.rmtree(work / "vectors")
        shutil.rmtree(work / "graph")
    return {
        "rows": len(texts),
        "parts": len(done.vectors.shards),
        "seconds_one_process": round(median(one), 2),
        "seconds_engine": round(median(engine), 2),
        "seconds_engine_with_start": round(median(whole), 2),
        "overhead": round(median(e / o for e, o in zip(engine, one, strict=True)) - 1, 3),
        "milliseconds_per_text": round(1000 * median(engine) / len(texts), 3),
        "seconds_similarity_one_process": round(median(compared), 2),
        "seconds_similarity_engine_with_start": round(median(compared_there), 2),
    }


def measure_engine(model: Embedder, texts: list[str], work: Path) -> dict[str, float | int]:
    """Encode texts on the cluster alone: whether a text costs the same among many."""
    done, whole = on_cluster(model, write_texts(texts, work), work)
    shutil.rmtree(work / "vectors")
    return {
        "rows": len(texts),
        "parts": len(done.vectors.shards),
        "seconds_engine": round(done.seconds, 2),
        "seconds_engine_with_start": round(whole, 2),
        "milliseconds_per_text": round(1000 * done.seconds / len(texts), 3),
    }


def on_cluster(model: Embedder, source: Path, work: Path) -> tuple[EncodedFiles, float]:
    """Encode texts on the cluster; return what it did, and the seconds of the whole call."""
    started = time.perf_counter()
    done = encode_files(source, work / "vectors", model, column="text")
    return done, time.perf_counter() - started


def write_texts(texts: list[str], work: Path) -> Path:
    """Write texts as csv."""
    source = work / "texts.csv"
    with source.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in texts)])
    return source


if __name__ == "__main__":
    main()
