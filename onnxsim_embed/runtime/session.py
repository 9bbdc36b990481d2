"""ONNX Runtime as an engine: providers, threads and the session."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.system.hardware import CPU_PROVIDER, GPU_PROVIDERS, available_cpus
from onnxsim_embed.system.onnx_session import Device, Provider, onnxruntime, start_session

CUDA_PROVIDER = "CUDAExecutionProvider"
OPENVINO = ("OpenVINOExecutionProvider", "onnxruntime-openvino")


def resolve_providers(device: Device, available: Sequence[str]) -> list[Provider]:
    """Return the execution providers of a device, first choice first.

    :param device: "auto" (CUDA if onnxruntime offers it, otherwise the CPU), "cpu", "cuda", "cuda:1",
        "openvino", or onnxruntime's own list of provider names or (name, options) pairs.
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
    match = re.fullmatch(r"(openvino)|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(
            f"unknown device {device!r}; allowed are auto, cpu, cuda, cuda:N, openvino or a list of "
            "providers"
        )
    provider, package = OPENVINO if match[1] else (CUDA_PROVIDER, "onnxruntime-gpu")
    if provider not in available:
        raise ValueError(
            f"device {device!r} needs {provider}; this onnxruntime offers {list(available)}: "
            f"pip uninstall onnxruntime && pip install {package}, or use device='cpu'"
        )
    options = {"device_type": "CPU"} if match[1] else {"device_id": match[2] or "0"}
    return [(provider, options), CPU_PROVIDER]


def first_provider(device: Device) -> str:
    """Return the name of the execution provider that a device requests; see `resolve_providers`."""
    return _name(resolve_providers(device, onnxruntime.get_available_providers())[0])


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def openvino_options(intra_op_threads: int) -> dict[str, str]:
    """Return OpenVINO's options for the CPU. It has its own threads, by default as many as the host.

    :param intra_op_threads: threads inside one call; with 1, one stream per processor, as several
        callers share the session (measured: 1.2 to 1.5 times as fast as its default on two cores).
    """
    threads = available_cpus() if intra_op_threads == 1 else intra_op_threads
    streams = threads if intra_op_threads == 1 else 1
    return {"device_type": "CPU", "num_of_threads": str(threads), "num_streams": str(streams)}


class Session:
    """An ONNX session; see `Engine`.

    :param path: the ONNX file.
    :param device: see `resolve_providers`.
    :param intra_op_threads: threads inside one call.
    :raises ArtifactError: if onnxruntime cannot load the file.
    :raises ValueError: if the device is not available.
    """

    def __init__(self, path: Path, device: Device = "auto", intra_op_threads: int = 1) -> None:
        self._path = path
        providers = resolve_providers(device, onnxruntime.get_available_providers())
        if device == "openvino":
            providers[0] = (_name(providers[0]), openvino_options(intra_op_threads))
        try:
            self._session = start_session(str(path), providers, intra_op_threads)
        except Exception as error:  # the library's exceptions share no base class
            raise ArtifactError(f"onnxruntime cannot load {path}: {error}") from error
        self.providers: list[str] = self._session.get_providers()
        if device != "auto" and self.providers[0] != _name(providers[0]):
            raise ValueError(
                f"device {device!r} was requested, but the session runs on {self.providers[0]}; see "
                "onnxruntime's messages above, or use device='cpu'"
            )
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        self._output = self._session.get_outputs()[0].name  # the hidden states, in every artifact
        # Our own layout: rows of equal length, no mask, the sequence as the first axis.
        self.sequence_major = self._inputs == {"input_ids"}

    @property
    def provider(self) -> str:
        """Name of the execution provider that runs the model."""
        return self.providers[0]

    @property
    def runs_on_cpu(self) -> bool:
        """Whether batches of equal length on several threads are faster than large padded ones."""
        return self.provider not in GPU_PROVIDERS

    def run(
        self,
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None = None,
        pooled: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Run the encoder; see `Engine.run`."""
        feed = {"input_ids": input_ids}
        if self.sequence_major:
            if attention_mask is not None and not attention_mask.all():
                raise ValueError("this model takes rows of equal length, without padding")
            feed = {"input_ids": np.ascontiguousarray(input_ids.T)}
        if "attention_mask" in self._inputs:
            real = np.ones_like(input_ids) if attention_mask is None else attention_mask
            feed["attention_mask"] = real
        if "token_type_ids" in self._inputs:
            feed["token_type_ids"] = np.zeros_like(input_ids)
        try:
            hidden: npt.NDArray[np.float32] = self._session.run([self._output], feed)[0]
        except Exception as error:
            largest = input_ids.max(initial=0)
            raise ArtifactError(
                f"onnxruntime cannot run {self._path} on token ids up to {largest}: {error}"
            ) from error
        return hidden.transpose(1, 0, 2) if self.sequence_major else np.asarray(hidden, np.float32)
