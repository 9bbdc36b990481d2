"""How fast this machine multiplies matrices: the roof over everything else; see `worker`.

Settings: `threads`. A request has `seconds`, the time for each product. The answer has `rates`, in 1e9
operations (a multiplication and an addition are two) a second over all threads:

- int8, fp32: onnxruntime, rows of one of our batches by the larger linear layers of MiniLM (the better
  of two), each thread a product of its own, as the run path does it. Needs the onnx package.
- numpy: float32 blocks of scores, the better of one product on all threads and one product a thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# The tokens of one of our batches, and the two layers where MiniLM spends two thirds of its products.
# The faster of the two is the roof.
ROWS, LAYERS = 320, ((384, 1536), (1536, 384))
DIM = 384

# A block of scores of 256 rows, as wide as the default block of the similarity functions.
CHUNK_ROWS, COLUMNS = 256, 8192


def load(name: str, settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Make the products."""
    threads = settings["threads"]
    runs: dict[str, list[Callable[[], Any]]] = {}
    if find_spec("onnx") is not None:
        for name, operator in (("int8", "MatMulInteger"), ("fp32", "MatMul")):
            runs[name] = [onnx_product(operator, *layer) for layer in LAYERS]
    operations = 2 * ROWS * math.prod(LAYERS[0])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        seconds, rates = request["seconds"], {}
        for name, layers in runs.items():
            often = max(per_second(run, threads, seconds / len(layers)) for run in layers)
            rates[name] = often * operations / 1e9
        return {"rates": rates | {"numpy": numpy_rate(threads, seconds)}}

    return answer


def per_second(run: Callable[[], Any], threads: int, seconds: float) -> float:
    """Return how often so many threads run a function in a second, together."""
    run()
    done = [0] * threads
    started = time.perf_counter()

    def work(number: int) -> None:
        while time.perf_counter() < started + seconds:
            run()
            done[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - started)


def onnx_product(operator: str, inner: int, columns: int) -> Callable[[], Any]:
    """Return one product by onnxruntime, its weight known beforehand, on one thread."""
    numpy, onnxruntime = import_module("numpy"), import_module("onnxruntime")
    onnx = import_module("onnx")
    whole, kind = operator == "MatMulInteger", onnx.TensorProto
    random = numpy.random.default_rng(0)
    weight = random.integers(-127, 127, (inner, columns)).astype("int8" if whole else "float32")
    rows = random.integers(0, 255, (ROWS, inner)).astype("uint8" if whole else "float32")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["a", "w"], ["y"])],
        "product",
        [value("a", kind.UINT8 if whole else kind.FLOAT, rows.shape)],
        [value("y", kind.INT32 if whole else kind.FLOAT, [ROWS, columns])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"a": rows})


def numpy_rate(threads: int, seconds: float) -> float:
    """Return 1e9 float32 operations a second of numpy's products, the better of two ways."""
    numpy = import_module("numpy")
    limits = import_module("threadpoolctl").threadpool_limits
    random = numpy.random.default_rng(0)
    rows = random.standard_normal((CHUNK_ROWS * 4, DIM)).astype("float32")
    columns = random.standard_normal((COLUMNS, DIM)).astype("float32").T
    chunk = rows[:CHUNK_ROWS]
    operations = 2 * DIM * COLUMNS / 1e9
    with limits(threads, "blas"):
        together = per_second(lambda: rows @ columns, 1, seconds / 2) * len(rows) * operations
    with limits(1, "blas"):
        separate = (
            per_second(lambda: chunk @ columns, threads, seconds / 2) * CHUNK_ROWS * operations
        )
    return float(max(together, separate))
