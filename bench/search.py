"""A few queries against many vectors: what storage and kernel reads them fastest, and what a search takes.

    python bench/search.py [--vectors FILE.npy] [--rounds 40]

Systems take turns in one process, with as many threads as there are processors. The clock is the wall's, and
includes everything from a float32 query to the ten best (`search`), or one product alone (`kernels`). A rate is
the bytes of the stored vectors, read once, over the median time. The copy that it is compared with reads and
writes float32 on as many threads, and both count. The kernels need the package onnx. Vectors are a
file's, or random directions, for which bounds of int8 leave more rows to score than for real ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from lab.turns import HERE, in_turns, parser, save

from onnxsim_embed.similarity.candidates import int8_matmul
from onnxsim_embed.similarity.compare import top_k, unit_vectors
from onnxsim_embed.similarity.index import VectorIndex
from onnxsim_embed.system.hardware import available_cpus

K = 10
PAUSE = 0.05  # seconds before each job: threads of BLAS spin so long after their last product
Float32 = npt.NDArray[np.float32]
# What to time, and the bytes that it reads (a copy: and writes).
Job = tuple[Callable[[], object], int]


def turns(jobs: dict[str, Job], rounds: int) -> dict[str, dict[str, float]]:
    """Time jobs in turns; return milliseconds and bytes a second of each.

    Beside the wall's median and least stands the processors' median, which other work disturbs least.
    """
    calls = {name: job for name, (job, _) in jobs.items()}
    in_turns(calls, 1)  # warms up
    seconds, cpu = in_turns(calls, rounds, PAUSE)
    return {
        name: {
            "ms": float(np.median(seconds[name])) * 1e3,
            "cpu_ms": float(np.median(cpu[name])) * 1e3,
            "ms_least": min(seconds[name]) * 1e3,
            "gb_per_second": size / float(np.median(seconds[name])) / 1e9,
            "gb_per_second_most": size / min(seconds[name]) / 1e9,
        }
        for name, (_, size) in jobs.items()
    }


def copy_job(unit: Float32) -> Job:
    """Return a copy of all vectors on all threads."""
    target = np.empty_like(unit)
    parts = np.array_split(np.arange(len(unit)), available_cpus())
    spans = [slice(part[0], part[-1] + 1) for part in parts]
    pool = ThreadPoolExecutor(len(spans))
    return lambda: list(
        pool.map(lambda span: np.copyto(target[span], unit[span]), spans)
    ), 2 * unit.nbytes


def graph(op: str, weights: dict[str, npt.NDArray[Any]], domain: str, **attributes: int) -> Any:  # noqa: ANN401
    """Return a session of one operator with constant weights."""
    from onnx import TensorProto, helper, numpy_helper

    whole = op == "MatMulInteger"
    node = helper.make_node(op, ["query", *weights], ["scores"], domain=domain, **attributes)
    kinds = (TensorProto.UINT8, TensorProto.INT32) if whole else (TensorProto.FLOAT,) * 2
    model = helper.make_model(
        helper.make_graph(
            [node],
            "search",
            [helper.make_tensor_value_info("query", kinds[0], ["q", "k"])],
            [helper.make_tensor_value_info("scores", kinds[1], ["q", "n"])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def kernel_jobs(unit: Float32, queries: Float32) -> dict[str, Job]:
    """Return products of one kernel each: all scores of the queries, in whatever units."""
    n, width = unit.shape
    whole = np.rint(unit / np.abs(unit).max(axis=1, keepdims=True) * 127).astype(np.int8)
    left = (whole.astype(np.int16) + 128).astype(np.uint8)
    packed = graph("MatMulInteger", {"vectors": np.ascontiguousarray(whole.T)}, "")
    eight = graph("MatMulNBits", {"vectors": left.reshape(n, -1, 64), "steps": np.full(n * width // 64, 0.01, np.float32)},
                  "com.microsoft", K=width, N=n, bits=8, block_size=64, accuracy_level=4)  # fmt: skip
    four = graph("MatMulNBits", {"vectors": left[:, ::2].copy().reshape(n, -1, 32), "steps": np.full(n * width // 64, 0.01, np.float32)},
                 "com.microsoft", K=width, N=n, bits=4, block_size=64, accuracy_level=4)  # fmt: skip
    threads = available_cpus()
    jobs: dict[str, Job] = {"copy float32": copy_job(unit)}
    for count in (1, 8):
        some = queries[:count]
        right = np.ascontiguousarray(np.rint(some.T * 100).astype(np.int8))
        small = np.ascontiguousarray(right.T.view(np.uint8))
        jobs |= {
            f"float32 numpy, {count}": (lambda some=some: unit @ some.T, unit.nbytes),
            f"int8 MatMulInteger, rows as left, {count}": (
                lambda right=right: int8_matmul(left, right, threads, os.getpid()),
                left.nbytes,
            ),
            f"int8 MatMulInteger, packed constant, {count}": (
                lambda small=small: packed.run(None, {"query": small}),
                left.nbytes,
            ),
            f"int8 MatMulNBits, {count}": (
                lambda some=some: eight.run(None, {"query": some}),
                left.nbytes,
            ),
            f"int4 MatMulNBits, {count}": (
                lambda some=some: four.run(None, {"query": some}),
                left.nbytes // 2,
            ),
        }
    return jobs


def search_jobs(unit: Float32, queries: Float32, slow: bool) -> dict[str, Job]:
    """Return searches for the ten best, all with the same result."""
    index = VectorIndex(unit)
    jobs: dict[str, Job] = {"copy float32": copy_job(unit)}
    for count in (1, 8, 64) if slow else (1, 2, 4, 8, 16):
        some = queries[:count]
        jobs[f"VectorIndex, {count}"] = (lambda some=some: index.search(some, K), index.nbytes)
        if slow:
            jobs[f"top_k, {count}"] = (lambda some=some: top_k(some, unit, K), unit.nbytes)
        else:
            jobs[f"float32 numpy and partition, {count}"] = (
                lambda some=some: np.argpartition(some @ unit.T, -K, axis=1)[:, -K:],
                unit.nbytes,
            )
    return jobs


def main() -> None:
    """Measure, print, and write bench/results/search.json."""
    arguments = parser(__doc__, rounds=40)
    arguments.add_argument("--vectors", type=Path, help=".npy; default: random directions")
    arguments.add_argument("--sizes", type=int, nargs="*", default=[27_397, 200_000])
    options = arguments.parse_args()
    rng = np.random.default_rng(0)
    sets = {}
    if options.vectors is not None:
        sets[options.vectors.name] = unit_vectors(np.load(options.vectors))
    for size in options.sizes:
        sets[f"random {size}"] = unit_vectors(rng.standard_normal((size, 384), np.float32))
    results: dict[str, Any] = {}
    for name, unit in sets.items():
        near = unit[rng.integers(0, len(unit), 64)]
        queries = unit_vectors(near + 0.03 * rng.standard_normal(near.shape, np.float32))
        started = time.perf_counter()
        index = VectorIndex(unit)
        results[name] = {
            "shape": list(unit.shape),
            "seconds_to_build": time.perf_counter() - started,
            "megabytes": {"float32": unit.nbytes / 1e6, "index": index.nbytes / 1e6},
            "kernels": turns(kernel_jobs(unit, queries), options.rounds),
            "search": turns(search_jobs(unit, queries, False), options.rounds),
            "search_against_top_k": turns(
                search_jobs(unit, queries, True), max(3, options.rounds // 8)
            ),
        }
        for part in ("kernels", "search", "search_against_top_k"):
            print(f"\n{name} x {unit.shape[1]}: {part}")
            for job, found in results[name][part].items():
                print(f"  {job:44s}" + "  ".join(f"{key} {value:8.2f}" for key, value in found.items()), flush=True)  # fmt: skip
    summary = {
        **HERE,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "k": K,
        "rounds": options.rounds,
        "sets": results,
    }
    save("search", summary)


if __name__ == "__main__":
    main()
