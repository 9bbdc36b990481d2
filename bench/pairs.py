"""All pairs in fresh processes: this tree beside another one, in turns, on real rows and tiled ones.

    python bench/pairs.py VECTORS.npy [--other TREE] [--cases 0.8:27397 k10:200000] [--rounds 3] [--memory 4GB]

A case is a threshold, or k and a number, and the rows: the first of the file, or for more rows the file again
and again with noise in each component. Seconds are from the array to the csr matrix, or to the top-k of each row
among the others; CPU seconds are of all threads. Results of both trees must have the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from lab.turns import RESULTS, parser, save

HERE = Path(__file__).resolve().parent
CASES = ("0.3:27397", "0.5:27397", "0.8:27397", "k10:27397", "k10:2500")


def measure(file: str, case: str, memory: str) -> dict[str, Any]:
    """Run one case in this process."""
    from onnxsim_embed.similarity import compare
    from onnxsim_embed.system.units import parse_bytes

    task, rows = case.split(":")
    vectors = np.load(file, mmap_mode="r")[: int(rows)]
    compare.similarity_matrix(vectors[:64])  # loads what is loaded on first use
    cpu, started = time.process_time(), time.perf_counter()
    peak = Peak()
    options = {"max_memory": parse_bytes(memory)}
    if task[0] == "k":
        arrays: Any = compare.neighbours(vectors, int(task[1:]), **options)
    else:
        matrix = compare.similarity_matrix(vectors, float(task), **options)
        arrays = matrix.data, matrix.indices, matrix.indptr
    seconds = time.perf_counter() - started
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mb": round(peak.stop()),
        "entries": int(arrays[0].size),
        "digest": digest.hexdigest()[:16],
    }


class Peak(threading.Thread):
    """The largest anonymous memory of this process, read ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._mb, self._stopped = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        """Read until stopped."""
        while not self._stopped.wait(0.1):
            status = Path("/proc/self/status").read_text()
            self._mb = max(self._mb, int(status.split("RssAnon:")[1].split()[0]) * 1.024e-3)

    def stop(self) -> float:
        """Return the peak in 1e6 bytes."""
        self._stopped.set()
        self.join()
        return self._mb


def main() -> None:
    """Measure in turns, print, and add to bench/results/pairs.json."""
    arguments = parser(__doc__, "file")
    arguments.add_argument("--other", type=Path, help="another tree of this repository")
    arguments.add_argument("--cases", nargs="+", default=CASES)
    arguments.add_argument("--memory", default="8GB")
    arguments.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        print(json.dumps(measure(options.file, options.child, options.memory)))
        return
    from lab.similarity_bench import tiled

    from onnxsim_embed.similarity.compare import unit_vectors

    trees = {"this": HERE.parent} | ({"other": options.other} if options.other else {})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    path = RESULTS / "pairs.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    vectors = unit_vectors(np.load(options.file))
    for case in options.cases:
        file, rows = Path(options.file), int(case.split(":")[1])
        if rows > len(vectors):
            file = options.work / f"tiled-{rows}.npy"
            if not file.exists():
                np.save(file, tiled(vectors, rows))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                command = [sys.executable, __file__, str(file), "--child", case]
                done = subprocess.run(
                    [*command, "--memory", options.memory],
                    env=environment | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, check=True,
                )  # fmt: skip
                runs[name].append(json.loads(done.stdout))
                print(case, name, runs[name][-1], "load", os.getloadavg()[0], flush=True)
        if len({run["digest"] for each in runs.values() for run in each}) > 1:
            sys.exit(f"{case}: results differ")
        found = {"memory": options.memory, "load": round(os.getloadavg()[0], 1), "runs": runs}
        if options.other:
            for key in ("seconds", "cpu_seconds"):
                ratios = [b[key] / a[key] for a, b in zip(runs["this"], runs["other"], strict=True)]
                found[f"other_over_this_{key}"] = round(float(np.median(ratios)), 2)
        results[case] = found
        save("pairs", results)


if __name__ == "__main__":
    main()
