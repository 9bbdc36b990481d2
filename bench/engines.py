"""Engines and precisions side by side on one machine: speed, fidelity, batch invariance, start, memory.

    python bench/engines.py ARTIFACT FILE [--column C] [--rounds 5] [--only speed,invariance,start]

All models are in one process and take turns, every other round backwards. Ratios are of wall time and of
processor time (what a busy machine changes less), round by round; the table has their medians. `--only`
measures a part again, on the same machine, and leaves the others in the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lab.turns import HERE, RESULTS, in_turns, parser, save
from lab.workers import rounded

from onnxsim_embed import Embedder
from onnxsim_embed.benchmark.measure import fidelity
from onnxsim_embed.export.fidelity import count_variant
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.system.hardware import bf16_supported, cpu_flags
from onnxsim_embed.system.onnx_session import RUNTIME_VERSION

SYSTEMS = [
    ("fp32", "onnxruntime"),
    ("int8", "onnxruntime"),
    ("fp32", "openvino"),
    ("int8", "openvino"),
]
BASES = ("fp32 onnxruntime", "int8 onnxruntime")
LENGTHS = (16, 90, 256, 512)
TOKENS = 24_000  # of one measurement of one length

START = """
import resource, sys, time
started = time.perf_counter()
from onnxsim_embed import Embedder
model = Embedder(sys.argv[1], precision=sys.argv[2], engine=sys.argv[3])
model.encode("a text")
seconds = time.perf_counter() - started
texts = sys.stdin.read().split("\\0")
for _ in range(3):
    model.encode(texts)
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3)
"""


def main() -> None:
    """Measure, print, and write bench/results/engines.json."""
    arguments = parser(__doc__, "artifact", "file", "--column", rounds=5)
    arguments.add_argument("--only", default="speed,invariance,start")
    arguments.add_argument("--invariance", type=int, default=2000, help="number of texts")
    options = arguments.parse_args()
    parts = options.only.split(",")
    known = list(dict.fromkeys(iter_texts(options.file, options.column)))
    systems = SYSTEMS + ([("bf16", "openvino")] if bf16_supported()[0] else [])
    result: dict[str, Any] = {}
    if len(parts) < 3:
        result = json.loads((RESULTS / "engines.json").read_text("utf-8"))
    result |= {
        **HERE,
        "features": sorted(f for f in cpu_flags() if "vnni" in f or "bf16" in f or "amx" in f),
        "versions": {"onnxruntime": RUNTIME_VERSION, "openvino": version("openvino")},
        "file": Path(options.file).name,
    }

    def keep(part: str, name: str, found: Any) -> None:  # noqa: ANN401
        result.setdefault(part, {})[name] = found
        print(part, name, json.dumps(found), flush=True)
        save("engines", result)

    spread = known[:: max(1, len(known) // 600)][:600]
    if "speed" in parts:
        models = {f"{p} {e}": Embedder(options.artifact, precision=p, engine=e) for p, e in systems}
        long = [" ".join(known[n : n + 60]) for n in range(0, len(known) - 60, 60)]
        cases = {"descriptions": (spread, 256)}
        cases |= {f"{tokens} tokens": (long[: TOKENS // tokens], tokens) for tokens in LENGTHS}
        for case, (texts, tokens) in cases.items():
            for model in models.values():
                model._pipeline.tokenizer.max_seq_length = tokens  # 512 exceeds MiniLM's own
            keep("speed", case, alternate(models, texts, options.rounds))
    for precision, engine in systems:
        name = f"{precision} {engine}"
        if "start" in parts:
            keep("start", name, start(options.artifact, precision, engine, spread[::3]))
        if "invariance" in parts:
            texts = known[:: max(1, len(known) // options.invariance)][: options.invariance]
            model = Embedder(options.artifact, precision=precision, engine=engine)
            changed = count_variant(model, texts, model.encode(texts, prompt=""))
            keep("batch_variant", name, {"texts": len(texts), "changed": changed})


def alternate(models: dict[str, Embedder], texts: list[str], rounds: int) -> dict[str, Any]:
    """Return texts a second, ratios to the bases, and fidelity to fp32 on ONNX Runtime."""
    vectors = {name: model.encode(texts) for name, model in models.items()}  # warms up
    jobs = {name: partial(model.encode, texts) for name, model in models.items()}
    seconds, cpu = in_turns(jobs, rounds)
    rows = {}
    for name, found in vectors.items():
        rows[name] = {
            "texts_per_second": round(len(texts) / float(np.median(seconds[name])), 1),
            **rounded(fidelity(found, vectors[BASES[0]])),
        }
        for base in BASES:
            ratios = np.divide(seconds[base], seconds[name])
            rows[name][f"times {base}"] = [
                round(float(f(ratios)), 3) for f in (np.median, np.min, np.max)
            ]
            rows[name][f"times {base}, processor time"] = round(
                float(np.median(np.divide(cpu[base], cpu[name]))), 3
            )
    return rows


def start(artifact: str, precision: str, engine: str, texts: list[str]) -> dict[str, Any]:
    """Return seconds to the first vector, the first time and with the cache, and peak memory."""
    found = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(4):
            done = subprocess.run(
                [sys.executable, "-c", START, artifact, precision, engine],
                input="\0".join(texts),
                env={**os.environ, "ONNXSIM_EMBED_CACHE": cache},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found.append([float(number) for number in done.stdout.split()])
    return {
        "first_seconds": round(found[0][0], 2),
        "later_seconds": round(float(np.median([row[0] for row in found[1:]])), 2),
        "peak_mb": round(found[-1][1]),
    }


if __name__ == "__main__":
    main()
