"""Providers, threads and the ONNX session."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.system.hardware import CPU_PROVIDER, GPU_PROVIDERS, available_cpus
from onnxsim_embed.system.onnx_session import Device, Provider, onnxruntime, start_session

# A lone batch (a single text, for example) that takes longer than this on one thread is run by a
# second session with several intra-op threads. Measured on two cores: below 3 ms starting and joining
# threads at every operator costs more than it saves, above it saves up to 45 %. That session holds
# the weights a second time, so it is created only after repeated lone batches.
LONE_SECONDS = 0.003
LONE_CALLS = 3
LONE_THREADS = 4

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
    """An ONNX session; any number of threads may share it.

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
        self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Run the encoder.

        :param input_ids: int64 array (batch, tokens).
        :param attention_mask: int64 array (batch, tokens), or None if every token is real.
        :returns: hidden, float32 array (batch, tokens, hidden); a view, not always contiguous.
        :raises ArtifactError: if onnxruntime fails, as for token ids that the model does not have.
        :raises ValueError: for padding if the model has no mask as input.
        """
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


class LoneSession:
    """Runs the only batch of a call, on several threads if it is long enough.

    :param session: the session of one thread.
    :param make_session: creates a session with that number of intra-op threads.
    :param threads: number of threads that may run.
    """

    def __init__(
        self, session: Session, make_session: Callable[[int], Session], threads: int
    ) -> None:
        self._session, self._make_session, self._threads = session, make_session, threads
        self._lock = threading.Lock()
        self._calls = 0
        self._token_seconds = float("inf")  # the minimum that a token took
        self.second: Session | None = None

    def run(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """Run the encoder; see `Session.run`."""
        if self._threads == 1 or not self._session.runs_on_cpu:
            return self._session.run(ids, mask)
        # Only one at a time: several lone batches at once occupy the processors as they are.
        long = ids.size * self._token_seconds > LONE_SECONDS
        if long and self._lock.acquire(blocking=False):
            try:
                self._calls += 1
                if self.second is None and self._calls > LONE_CALLS:
                    self.second = self._make_session(min(self._threads, LONE_THREADS))
                if self.second is not None:
                    return self.second.run(ids, mask)
            finally:
                self._lock.release()
        started = time.perf_counter()
        hidden = self._session.run(ids, mask)
        seconds = (time.perf_counter() - started) / max(1, ids.size)
        self._token_seconds = min(self._token_seconds, seconds)
        return hidden
