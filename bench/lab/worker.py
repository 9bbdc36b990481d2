"""A system in a process of its own: loads it, then answers requests on standard input.

    PYTHON worker.py SYSTEMS.py NAME SETTINGS

Runs in the system's own environment: only the standard library is imported here. SYSTEMS.py has
`load(name, settings)`, which returns a function from a request to an answer. Requests and answers are
lines of JSON. An answer's "finish" is called once memory is read, and gives the rest of the answer. The first line out says that the system has loaded and done its first piece of work.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]

PACKAGES = (
    "onnxsim-embed", "numpy", "scipy", "onnxruntime", "torch", "transformers", "sentence-transformers",
    "optimum", "optimum-onnx", "optimum-intel", "openvino", "nncf", "fastembed", "faiss-cpu", "ctranslate2", "chromadb",
    "scikit-learn", "sparse-dot-topn",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of what is installed here and matters."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result


def memory_mb() -> tuple[float, float]:
    """Return resident memory now and at its peak, in 1e6 bytes; (0, 0) where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0, 0.0
    fields = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(fields.get("VmRSS", 0)) * 1.024e-3, int(fields.get("VmHWM", 0)) * 1.024e-3


def forget_peak() -> None:
    """Let the peak restart from what is resident now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def main() -> None:
    """Load, say so, then answer until standard input ends."""
    del sys.path[0]  # the directory of this file, whose modules must hide no others
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    file, name, settings = sys.argv[1:]
    answer: Answer = runpy.run_path(file)["load"](name, json.loads(settings))
    answers.write("{}\n")
    answers.flush()
    highest = 0.0  # of the whole life of the process, loading included
    for line in sys.stdin:
        request = json.loads(line)
        before, peak = memory_mb()
        highest = max(highest, peak)
        forget_peak()
        result: dict[str, Any] = {"versions": versions()}
        if request != {"about": True}:
            result = answer(request)
        peak = memory_mb()[1]
        highest = max(highest, peak)
        result |= result.pop("finish", dict)()
        result |= {"before_mb": before, "peak_mb": peak, "highest_mb": highest}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
