"""OpenVINO as an engine: the same ONNX files, on processors with bfloat16 faster. Extra `openvino`."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.errors import ArtifactError, MissingExtraError, OnnxsimEmbedError
from onnxsim_embed.runtime.session import encoder_inputs
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import bf16_supported

logger = logging.getLogger(__name__)


class OpenVINOEngine:
    """An ONNX file compiled by OpenVINO for `threads` calls at once, or alone with `threads_inside`.

    :param cache: directory for what OpenVINO compiled, of this file alone: it knows files by path and
        time only.
    :param precision: weight precision. "bf16" multiplies in bfloat16, and so does "int8" outside its
        integer products where the processor can.
    :raises ArtifactError: if OpenVINO cannot load the file.
    """

    runs_on_cpu = True

    def __init__(
        self, path: Path, cache: Path, precision: str, threads: int, threads_inside: int = 1
    ) -> None:
        core, version = _core()
        self._path = path
        self.provider = f"OpenVINO {version}"
        short = precision == "bf16" or (precision == "int8" and bf16_supported()[0])
        streams, inside = (threads, threads) if threads_inside == 1 else (1, threads_inside)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if short else "f32",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": inside,
            # Several processes would all pin their threads to the same processors.
            "ENABLE_CPU_PINNING": False,
            # Kernels are kept for each shape of a batch. By default they grew to 3.4 GB in 2,000 texts of
            # int8; 200 stayed at 0.75 GB in 600.
            "CPU_RUNTIME_CACHE_CAPACITY": 200,
        }
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.info("OpenVINO compiles %s at each start: %s", path, error)
        if os.access(cache, os.W_OK):
            options["CACHE_DIR"] = str(cache)
        try:
            self._model = core.compile_model(str(path), "CPU", options)
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO cannot load {path}: {error}") from error
        rows = _table_rows(self._model)
        if rows is None:
            raise ArtifactError(
                f"OpenVINO would take any token id for one of {path}, whose table of embeddings was not "
                "found: use engine='onnxruntime'"
            )
        self._token_ids = rows
        self._inputs = {entry.any_name for entry in self._model.inputs}
        self._requests: deque[Any] = deque()  # as many as there were concurrent calls
        self._process = os.getpid()

    def run(
        self, input_ids: Int64, attention_mask: Int64 | None = None, pooled: bool = False
    ) -> Float32:
        """Run the encoder; see `Engine.run`.

        :raises OnnxsimEmbedError: in a forked child, where OpenVINO's threads are missing.
        """
        if os.getpid() != self._process:
            raise OnnxsimEmbedError(
                "OpenVINO does not work in a forked process: start processes with 'spawn' or "
                "'forkserver', or use engine='onnxruntime'"
            )
        largest = int(input_ids.max(initial=0))
        if largest >= self._token_ids:
            raise ArtifactError(
                f"{self._path} has embeddings of {self._token_ids} tokens, got token id {largest}"
            )
        feed, sequence_major = encoder_inputs(self._inputs, input_ids, attention_mask)
        try:
            request = self._requests.pop()
        except IndexError:
            request = self._model.create_infer_request()
        try:
            request.infer(feed, share_inputs=True)
            hidden: Float32 = request.get_output_tensor(0).data.copy()
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO cannot run {self._path}: {error}") from error
        finally:
            self._requests.append(request)
        return hidden.transpose(1, 0, 2) if sequence_major else hidden


def _table_rows(model: Any) -> int | None:  # noqa: ANN401
    """Return the number of token embeddings: OpenVINO reads zeros beyond the end of a table."""
    for node in model.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].astype(str) == "Gather":
            ids = node.input_value(1).get_node()
            while ids.get_input_size() == 1:
                ids = ids.input_value(0).get_node()
            if ids.get_friendly_name() == "input_ids":
                return int(node.input_value(0).get_shape()[0])
    return None


@lru_cache(maxsize=1)
def _core() -> tuple[Any, str]:
    """Return OpenVINO's core, which knows the operators of our files, and its version."""
    # openvino reports each import to its makers, unless the package that does it is missing.
    name = "openvino_telemetry"
    kept = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        import openvino
        from openvino.frontend.onnx import ConversionExtension
    except ModuleNotFoundError:
        raise MissingExtraError("engine 'openvino'", "openvino", "openvino") from None
    finally:
        del sys.modules[name]
        sys.modules.update(kept)
    core = openvino.Core()
    core.add_extension(ConversionExtension("FusedMatMul", "com.microsoft", _fused_matmul))
    return core, openvino.__version__.partition("-")[0]


def _fused_matmul(node: Any) -> list[Any]:  # noqa: ANN401
    """Convert onnxruntime's FusedMatMul, whose transBatchA and transBatchB OpenVINO ignores."""
    from openvino import opset13

    def flag(name: str) -> bool:
        return bool(node.get_attribute(name, 0))

    factors = [node.get_input(0), node.get_input(1)]
    for number, name in enumerate(("transBatchA", "transBatchB")):
        if flag(name):  # (rows, batch, heads, .) is (batch, heads, rows, .)
            order = np.array([1, 2, 0, 3], np.int64)
            factors[number] = opset13.transpose(factors[number], order)
    outputs: list[Any] = opset13.matmul(*factors, flag("transA"), flag("transB")).outputs()
    return outputs
