"""ONNX Runtime as an engine: providers, threads and the session."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    GPU_PROVIDERS,
    onnxruntime_wheels,
)
from onnxsim_embed.system.onnx_session import Device, Provider, onnxruntime, start_session


def resolve_providers(device: Device, available: Sequence[str]) -> list[Provider]:
    """Return the execution providers of a device, first choice first.

    :param device: "auto" (CUDA if onnxruntime offers it, otherwise the CPU), "cpu", "cuda", "cuda:1",
        or onnxruntime's own list of provider names or (name, options) pairs.
    :param available: the providers of this onnxruntime build.
    :raises ValueError: for an unknown or unavailable device.
    """
    if not isinstance(device, str):
        names = [_name(entry) for entry in device]
        missing = [name for name in names if name not in available]
        if missing or not names:
            raise ValueError(
                f"providers {missing or names} are not available: this onnxruntime offers "
                f"{list(available)}"
            )
        return list(device)
    if device == "auto":
        cuda: list[Provider] = [CUDA_PROVIDER] if CUDA_PROVIDER in available else []
        return [*cuda, CPU_PROVIDER]
    if device == "cpu":
        return [CPU_PROVIDER]
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(
            f"unknown device {device!r}; allowed are auto, cpu, cuda, cuda:N or a list of providers "
            "(OpenVINO is an engine: engine='openvino')"
        )
    if CUDA_PROVIDER not in available:
        raise ValueError(
            f"device {device!r} needs {CUDA_PROVIDER}; this onnxruntime offers {list(available)}: "
            f"pip uninstall -y {' '.join(onnxruntime_wheels())} && pip install "
            "'onnxruntime-gpu[cuda,cudnn]', or use device='cpu'"
        )
    return [cuda_provider(int(match[1] or 0)), CPU_PROVIDER]


def cuda_provider(number: int) -> Provider:
    """Return the execution provider of a GPU; onnxruntime warns where options name the first one."""
    return (CUDA_PROVIDER, {"device_id": str(number)}) if number else CUDA_PROVIDER


def first_provider(device: Device) -> str:
    """Return the name of the execution provider that a device requests; see `resolve_providers`."""
    return _name(resolve_providers(device, onnxruntime.get_available_providers())[0])


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


class Session:
    """An ONNX file with `intra_op_threads` inside one call; see `Engine`.

    :param device: see `resolve_providers`.
    :raises ArtifactError: if onnxruntime cannot load the file.
    :raises ValueError: if the device is not available.
    """

    def __init__(self, path: Path, device: Device = "auto", intra_op_threads: int = 1) -> None:
        self._path = path
        providers = resolve_providers(device, onnxruntime.get_available_providers())
        try:
            self._session = start_session(str(path), providers, intra_op_threads)
        except Exception as error:  # the library's exceptions share no base class
            raise ArtifactError(f"onnxruntime cannot load {path}: {error}") from error
        self.provider: str = self._session.get_providers()[0]
        self.runs_on_cpu = self.provider not in GPU_PROVIDERS
        if device != "auto" and self.provider != _name(providers[0]):
            raise ValueError(
                f"device {device!r} was requested, but the session runs on {self.provider}; see "
                "onnxruntime's messages above, or use device='cpu'"
            )
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        self._output = self._session.get_outputs()[0].name  # the hidden states, in every artifact

    def run(
        self, input_ids: Int64, attention_mask: Int64 | None = None, pooled: bool = False
    ) -> Float32:
        """Run the encoder; see `Engine.run`."""
        feed, sequence_major = encoder_inputs(self._inputs, input_ids, attention_mask)
        try:
            hidden = self._execute(feed, attention_mask, pooled)
        except Exception as error:
            largest = input_ids.max(initial=0)
            raise ArtifactError(
                f"onnxruntime cannot run {self._path} on token ids up to {largest}: {error}"
            ) from error
        return hidden.transpose(1, 0, 2) if sequence_major else np.asarray(hidden, np.float32)

    def _execute(
        self, feed: Mapping[str, npt.NDArray[Any]], attention_mask: Int64 | None, pooled: bool
    ) -> Float32:
        """Return the model's output for a feed."""
        output: Float32 = self._session.run([self._output], feed)[0]
        return output


def encoder_inputs(
    names: Set[str], input_ids: Int64, attention_mask: Int64 | None
) -> tuple[dict[str, npt.NDArray[Any]], bool]:
    """Return the inputs of an encoder, and whether the sequence is the first axis of its arrays.

    :param names: of the model's inputs; without a mask it has our own layout, of rows of equal length.
    :raises ValueError: for padding if the model has no mask as input.
    """
    if names == {"input_ids"}:
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("this model takes rows of equal length, without padding")
        return {"input_ids": np.ascontiguousarray(input_ids.T)}, True
    feed: dict[str, npt.NDArray[Any]] = {"input_ids": input_ids}
    real = np.ones_like(input_ids) if attention_mask is None else attention_mask
    if "attention_mask" in names:
        feed["attention_mask"] = real
    if "key_lengths" in names:  # of each row, then twice each row's first position and the end
        starts = np.arange(len(real) + 1) * real.shape[1]
        feed["key_lengths"] = np.concatenate([real.sum(axis=1), starts, starts]).astype(np.int32)
    if "token_type_ids" in names:
        feed["token_type_ids"] = np.zeros_like(input_ids)
    return feed, False
