"""OpenVINO as an engine: the same ONNX files, on processors with bfloat16 faster. Extra `openvino`."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from onnxsim_embed.errors import ArtifactError, MissingExtraError, OnnxsimEmbedError
from onnxsim_embed.runtime.session import encoder_inputs
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import bf16_supported

logger = logging.getLogger(__name__)

# Rows are padded to a multiple of this number of tokens. OpenVINO prepares kernels for each new shape of a
# batch, which takes longer than to run it: exact lengths made int8 half as fast on texts of many lengths.
TOKEN_STEP = 16

_starting = threading.Lock()


class OpenVINOEngine:
    """An ONNX file compiled by OpenVINO for `threads` calls at once, or alone with `threads_inside`.

    :param max_tokens: most tokens that the model takes, beyond which rows are not padded.
    :param cache: directory for what OpenVINO compiled, of this file alone: it knows files by path and
        time only.
    :param precision: weight precision. "bf16" multiplies in bfloat16, and so does "int8" outside its
        integer products where the processor can.
    :raises ArtifactError: if OpenVINO cannot load the file.
    """

    runs_on_cpu = True

    def __init__(
        self,
        path: Path,
        max_tokens: int,
        cache: Path,
        precision: str,
        threads: int,
        threads_inside: int = 1,
    ) -> None:
        with _starting:
            core, version = _core()
        self._path, self._max_tokens = path, max_tokens
        self.provider = f"OpenVINO {version}"
        short = precision == "bf16" or (precision == "int8" and bf16_supported()[0])
        streams, inside = (threads, threads) if threads_inside == 1 else (1, threads_inside)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if short else "f32",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": inside,
            # Several processes would all pin their threads to the same processors.
            "ENABLE_CPU_PINNING": False,
            # Kernels are kept for each shape of a batch: by default 5,000, 3.4 GB where no rows are padded.
            "CPU_RUNTIME_CACHE_CAPACITY": 1000,
        }
        lock: AbstractContextManager[Any] = nullcontext()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            if not os.access(cache, os.W_OK):
                raise PermissionError(f"{cache} cannot be written")
            options["CACHE_DIR"] = str(cache)
            lock = FileLock(cache / "lock")  # other processes would map files that are half written
        except OSError as error:
            logger.info("OpenVINO compiles %s at each start: %s", path, error)
        try:
            with lock:
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
        tokens = input_ids.shape[1]
        if "attention_mask" in self._inputs:
            input_ids, attention_mask = self._pad(input_ids, attention_mask)
        feed, sequence_major = encoder_inputs(self._inputs, input_ids, attention_mask)
        try:
            request = self._requests.pop()
        except IndexError:
            request = self._model.create_infer_request()
        try:
            request.infer(feed, share_inputs=True)
            hidden: Float32 = request.get_output_tensor(0).data
            hidden = (hidden.transpose(1, 0, 2) if sequence_major else hidden)[:, :tokens].copy()
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO cannot run {self._path}: {error}") from error
        finally:
            self._requests.append(request)
        return hidden

    def _pad(self, ids: Int64, mask: Int64 | None) -> tuple[Int64, Int64]:
        """Return ids and mask with as many columns as the shapes that kernels are kept for."""
        rows, tokens = ids.shape
        columns = max(tokens, min(-(-tokens // TOKEN_STEP) * TOKEN_STEP, self._max_tokens))
        padded, real = np.zeros((2, rows, columns), np.int64)
        padded[:, :tokens] = ids
        real[:, :tokens] = 1 if mask is None else mask
        return padded, real


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
    """Return OpenVINO's core and its version."""
    # openvino reports each import to its makers, unless the package that does it is missing.
    name = "openvino_telemetry"
    kept = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        import openvino
    except ModuleNotFoundError:
        raise MissingExtraError("engine 'openvino'", "openvino", "openvino") from None
    finally:
        del sys.modules[name]
        sys.modules.update(kept)
    # The first array that reaches its bindings must be alone: two threads block each other for ever.
    openvino.Tensor(np.zeros(1), shared_memory=True)
    return openvino.Core(), openvino.__version__.partition("-")[0]
