"""ONNX Runtime on a GPU: hidden states stay there and are pooled there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.pooling import Head, pooling_weights
from onnxsim_embed.runtime.session import Session, cuda_provider
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import CUDA_PROVIDER
from onnxsim_embed.system.onnx_session import Device, start_session

MEMORY = "cuda"  # onnxruntime's name of a GPU's memory


class CudaSession(Session):
    """A session whose batches come back pooled: (batch, hidden) floats in place of (batch, tokens, hidden).

    :param head: the modules after the encoder. Pooling runs on the GPU, the rest here; "max" all here.
    """

    def __init__(
        self, path: Path, device: Device, intra_op_threads: int = 1, *, head: Head
    ) -> None:
        super().__init__(path, device, intra_op_threads)
        self._head = head
        if self.provider != CUDA_PROVIDER:  # device "auto" without a working GPU
            return
        options = self._session.get_provider_options().get(CUDA_PROVIDER, {})
        self._gpu = int(options.get("device_id", 0))
        graph = files("onnxsim_embed").joinpath("data/pooling.onnx").read_bytes()
        self._pooling = start_session(graph, [cuda_provider(self._gpu)])

    def _execute(
        self, feed: Mapping[str, npt.NDArray[Any]], attention_mask: Int64 | None, pooled: bool
    ) -> Float32:
        ids = feed["input_ids"]
        mask = np.ones_like(ids) if attention_mask is None else attention_mask
        weights = pooling_weights(mask, self._head.modes) if pooled else None
        if weights is None or self.provider != CUDA_PROVIDER:
            return super()._execute(feed, attention_mask, pooled)
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(self._output, MEMORY, self._gpu)
        self._session.run_with_iobinding(binding)
        pooling = self._pooling.io_binding()
        pooling.bind_ortvalue_input("hidden", binding.get_outputs()[0])
        pooling.bind_cpu_input("weights", weights)
        pooling.bind_output("pooled")
        self._pooling.run_with_iobinding(pooling)
        vectors = pooling.copy_outputs_to_cpu()[0]
        return self._head.finish(vectors.reshape(len(ids), -1))
