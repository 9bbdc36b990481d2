"""What the engine costs: encode_files on a Ray cluster of this machine beside one process, on the same texts.

    python bench/cluster.py texts.csv --column text --rows 5000 20000 --engine-only 100000

Both take turns. The engine's clock runs from the first part's start to the last one's end, in the actors: starting the
cluster and loading models, which happen once, are told apart. Writes bench/results/cluster.json.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from lab.conditions import machine, today
from lab.turns import parser, save

from onnxsim_embed import Embedder
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.ray import cluster, encode_files, write_graph
from onnxsim_embed.similarity.compare import similarity_matrix


def main() -> None:
    """Measure, print and write."""
    arguments = parser(__doc__, "texts", "--column", rounds=1)
    arguments.add_argument("--model", default="all-MiniLM-L6-v2")
    arguments.add_argument("--rows", type=int, nargs="+", default=[5000, 20000])
    arguments.add_argument(
        "--engine-only", type=int, nargs="*", default=[], help="without one process"
    )
    options = arguments.parse_args()
    known = list(iter_texts(options.texts, options.column))
    model = Embedder.from_pretrained(options.model)
    rows: list[dict[str, float | int]] = []
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        with cluster():
            start = time.perf_counter() - started
            for count in options.rows + options.engine_only:
                rounds = options.rounds if count in options.rows else 0
                rows.append(measure(model, texts_of(known, count), rounds, Path(work)))
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
    save("cluster", table)


def texts_of(known: list[str], count: int) -> list[str]:
    """Return so many different texts: those known, then the same with a number behind."""
    return [
        known[i % len(known)] + (f" {i // len(known)}" if i >= len(known) else "")
        for i in range(count)
    ]


def measure(model: Embedder, texts: list[str], rounds: int, work: Path) -> dict[str, float | int]:
    """Encode and compare texts by one process and on the cluster, by turns.

    :param rounds: 0 encodes them on the cluster alone: whether a text costs the same among many.
    """
    source = write_texts(texts, work)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:  # noqa: ANN401 - what it returns
        started = time.perf_counter()
        result = run()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for _ in range(max(1, rounds)):
        vectors = timed("one_process", lambda: model.encode(texts)) if rounds else None
        done = timed(
            "engine_with_start",
            lambda: encode_files(source, work / "vectors", model, column="text"),
        )
        seconds.setdefault("engine", []).append(done.seconds)
        if vectors is not None:
            if not np.array_equal(done.vectors.read(), vectors):
                raise AssertionError("the engine's vectors are others")
            matrix = timed("similarity_one_process", partial(similarity_matrix, vectors, 0.5))
            graph = timed(
                "similarity_engine_with_start",
                lambda: write_graph(work / "vectors", work / "graph", threshold=0.5),
            )
            if graph.nnz != matrix.nnz:
                raise AssertionError("the engine's graph is another")
            shutil.rmtree(work / "graph")
        shutil.rmtree(work / "vectors")
    row: dict[str, float | int] = {"rows": len(texts), "parts": len(done.vectors.shards)}
    row |= {f"seconds_{name}": round(median(values), 2) for name, values in seconds.items()}
    row["milliseconds_per_text"] = round(1000 * median(seconds["engine"]) / len(texts), 3)
    if rounds:
        pairs = zip(seconds["engine"], seconds["one_process"], strict=True)
        row["overhead"] = round(median(engine / one for engine, one in pairs) - 1, 3)
    return row


def write_texts(texts: list[str], work: Path) -> Path:
    """Write texts as csv."""
    source = work / "texts.csv"
    with source.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in texts)])
    return source


if __name__ == "__main__":
    main()
