"""What the run path needs of an inference engine. `session.py` implements it with ONNX Runtime."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from onnxsim_embed.system.arrays import Float32, Int64

# A lone batch (a single text, for example) that takes longer than this on one thread is run by a
# second engine with several threads. Measured on two cores: below 3 ms starting and joining threads at
# every operator costs more than it saves, above it saves up to 45 %. That engine holds the weights a
# second time, so it is created only after repeated lone batches.
LONE_SECONDS = 0.003
LONE_CALLS = 3
LONE_THREADS = 4


class Engine(Protocol):
    """A loaded model file; any number of threads may run it."""

    @property
    def provider(self) -> str:
        """Name of what runs the model: an execution provider of ONNX Runtime, or another engine."""

    @property
    def runs_on_cpu(self) -> bool:
        """Whether batches of equal length on several threads are faster than large padded ones."""

    def run(
        self, input_ids: Int64, attention_mask: Int64 | None = None, pooled: bool = False
    ) -> Float32:
        """Run the encoder.

        :param input_ids: int64 array (batch, tokens).
        :param attention_mask: int64 array (batch, tokens), or None if every token is real.
        :param pooled: whether the engine may run the modules after the encoder too.
        :returns: hidden states, float32 array (batch, tokens, hidden), a view, not always contiguous;
            or, if `pooled`, embeddings (batch, dim).
        :raises ArtifactError: if the engine fails, as for token ids that the model does not have.
        :raises ValueError: for padding if the model has no mask as input.
        """


class LoneEngine:
    """Runs the only batch of a call, on up to `threads` threads if it is long enough."""

    def __init__(self, engine: Engine, make_engine: Callable[[int], Engine], threads: int) -> None:
        self._engine, self._make_engine, self._threads = engine, make_engine, threads
        self._lock = threading.Lock()
        self._calls = 0
        self._token_seconds = float("inf")  # the minimum that a token took
        self.second: Engine | None = None

    def run(self, ids: Int64, mask: Int64 | None, pooled: bool) -> Float32:
        """Run the encoder; see `Engine.run`."""
        if self._threads == 1 or not self._engine.runs_on_cpu:
            return self._engine.run(ids, mask, pooled)
        # Only one at a time: several lone batches at once occupy the processors as they are.
        long = ids.size * self._token_seconds > LONE_SECONDS
        if long and self._lock.acquire(blocking=False):
            try:
                self._calls += 1
                if self.second is None and self._calls > LONE_CALLS:
                    self.second = self._make_engine(min(self._threads, LONE_THREADS))
                if self.second is not None:
                    return self.second.run(ids, mask, pooled)
            finally:
                self._lock.release()
        started = time.perf_counter()
        hidden = self._engine.run(ids, mask, pooled)
        seconds = (time.perf_counter() - started) / max(1, ids.size)
        self._token_seconds = min(self._token_seconds, seconds)
        return hidden
