"""How much of a batch holds Python's global lock, and what that means for machines of many processors.

    python bench/gil.py ARTIFACT FILE [--column C]

The run path encodes a file twice: as it is, and with a model that computes nothing and returns one number a
token, so that what is left is what Python and the calls into libraries cost. That is an upper bound of the
time under the lock, which those calls release in part. From both, a closed queue (one lock, `n` threads)
gives the speed of n processors in processors of which each has its own lock.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from lab.turns import HERE, parser, save
from onnx import TensorProto, helper

from onnxsim_embed import Embedder
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.runtime.batching import plan_batches
from onnxsim_embed.runtime.options import EncodeOptions
from onnxsim_embed.system.onnx_session import start_session

PROCESSORS = (2, 8, 16, 32, 64, 128)


def nothing() -> bytes:
    """Return a model of the run path's inputs that returns one number a token."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["s", "b"])
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["s", "b", 1])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "axes"], ["hidden"]),
    ]
    graph = helper.make_graph(nodes, "nothing", [ids], [hidden], [axes])
    opset = [helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def speedup(processors: int, held: float, free: float) -> float:
    """Return how many single processors are as fast, by mean value analysis of the closed queue.

    :param held: time of a batch under the lock.
    :param free: its other time.
    """
    waiting, rate = 0.0, 0.0
    for threads in range(1, processors + 1):
        stay = held * (1 + waiting)
        rate = threads / (free + stay)
        waiting = rate * stay
    return rate * (held + free)


def main() -> None:
    """Measure, print, and write bench/results/gil.json."""
    options = parser(__doc__, "artifact", "file", "--column", rounds=5).parse_args()
    known = list(dict.fromkeys(iter_texts(options.file, options.column)))
    model = Embedder(options.artifact, precision="int8", threads=2)
    pipeline: Any = model._pipeline
    output = model._prefix_and_output(EncodeOptions())[1]
    result: dict[str, Any] = {**HERE, "file": Path(options.file).name}
    cases = {"descriptions": known[:: max(1, len(known) // 1000)][:1000]}
    cases["16 tokens"] = [" ".join(text.split()[:11]) for text in cases["descriptions"]]
    real, empty = pipeline.engine._session, start_session(nothing(), ["CPUExecutionProvider"])
    names = pipeline.engine._output
    for case, texts in cases.items():
        tokens = model._pipeline.tokenizer(texts)
        batches = len(list(plan_batches(tokens.counts, pipeline.token_budget)))
        seconds = {}
        for name, session, output_name in (("real", real, names), ("empty", empty, "hidden")):
            pipeline.engine._session, pipeline.engine._output = session, output_name
            pipeline.run_tokens(tokens, output)
            found = []
            for _ in range(options.rounds if name == "real" else 10 * options.rounds):
                started = time.process_time()
                pipeline.run_tokens(tokens, output)
                found.append((time.process_time() - started) / batches)
            seconds[name] = float(np.median(found))
        pipeline.engine._session, pipeline.engine._output = real, names
        started, cpu = time.thread_time(), time.process_time()
        for _ in range(options.rounds):
            model._pipeline.tokenizer(texts)
        tokenized = (time.thread_time() - started) / options.rounds / batches
        held, free = seconds["empty"] + tokenized, seconds["real"] - seconds["empty"]
        result[case] = {
            "texts_a_batch": round(len(texts) / batches, 2),
            "microseconds_a_batch": round(1e6 * seconds["real"], 1),
            "of_that_python": round(1e6 * seconds["empty"], 1),
            "tokenizer_in_its_caller": round(1e6 * tokenized, 1),
            "tokenizer_in_all_threads": round(
                1e6 * (time.process_time() - cpu) / options.rounds / batches, 1
            ),
            "share": round(held / (held + free), 4),
            "speed_of_processors": {n: round(speedup(n, held, free), 1) for n in PROCESSORS},
        }
        print(case, json.dumps(result[case], indent=1), flush=True)
    save("gil", result)


if __name__ == "__main__":
    main()
