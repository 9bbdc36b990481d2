"""Texts -> vectors in windows: tokenize ahead, run batches on several threads, keep the order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.batching import TOKEN_BUDGET, plan_batches
from onnxsim_embed.pooling import Head
from onnxsim_embed.session import Session
from onnxsim_embed.tokenization import Tokenizer, Tokens

# Texts tokenized together, ahead of inference. Large enough to group equal lengths well, small enough
# that the ids of two windows stay within a few tens of megabytes.
WINDOW_TEXTS = 4096


@dataclass
class EncodeReport:
    """What one call of `encode` did.

    :param texts: texts encoded.
    :param distinct: texts run through the model: repeated ones within a few thousand run once.
    :param tokens: tokens of the distinct texts, special tokens included.
    :param truncated: texts that were longer than the model takes.
    :param seconds: wall time of the whole call.
    :param seconds_tokenize: wall time of tokenizing.
    :param seconds_run: time inside the ONNX session, summed over threads.
    :param seconds_pool: time in pooling, dense layers and normalization, summed over threads.
    """

    texts: int = 0
    distinct: int = 0
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0
    seconds_tokenize: float = 0.0
    seconds_run: float = 0.0
    seconds_pool: float = 0.0
    threads: int = 1
    provider: str = ""

    @property
    def texts_per_second(self) -> float:
        """Texts a second, over the whole call."""
        return self.texts / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, over the whole call; those of repeated texts count once."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Window:
    """Texts on their way.

    :param first: row of each text's first occurrence, int64 (n,).
    :param vectors: float32 (n, dim), filled at first occurrences.
    :param work: one function a batch, which returns its number of texts.
    :param jobs: the same where threads run them.
    """

    first: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    report: EncodeReport
    work: list[Callable[[], int]] = field(default_factory=list)
    jobs: list[Future[int]] = field(default_factory=list)


class Runner:
    """Runs texts through tokenizer, session and head; any number of threads may call it.

    :param dim: width of a vector.
    :param threads: batches run at the same time.
    """

    def __init__(
        self, tokenizer: Tokenizer, session: Session, head: Head, dim: int, threads: int
    ) -> None:
        self.tokenizer = tokenizer
        self.session = session
        self.head = head
        self.dim = dim
        self.threads = threads
        self.token_budget = TOKEN_BUDGET
        self.last_report = EncodeReport()
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None

    def stream(
        self, texts: Iterable[str], prefix: str, batch_size: int | None, progress: bool
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the vectors of texts, in order, float32 arrays (n, dim)."""
        started = time.perf_counter()
        report = EncodeReport(threads=self.threads, provider=self.session.provider)
        total = len(texts) if isinstance(texts, Sequence) else None
        bar = _progress_bar(total) if progress else None
        waiting: deque[_Window] = deque()
        try:
            for window in _windows(texts):
                waiting.append(self._start(window, prefix, batch_size, report))
                if len(waiting) > 1:  # tokenizing one window ahead of inference
                    yield self._finish(waiting[0], bar)
                    waiting.popleft()  # only now: what is interrupted has jobs to cancel
            while waiting:
                yield self._finish(waiting[0], bar)
                waiting.popleft()
        finally:
            for left in waiting:
                for job in left.jobs:
                    job.cancel()
            if bar is not None:
                bar.close()
            report.seconds = time.perf_counter() - started
            self.last_report = report

    @contextmanager
    def settings(self, *, threads: int, token_budget: int) -> Iterator[None]:
        """Run with other threads and batches for a while; not while other threads encode."""
        old = self.threads, self.token_budget, self._workers
        self.threads, self.token_budget, self._workers = threads, token_budget, None
        try:
            yield
        finally:
            if self._workers is not None:
                self._workers.shutdown()
            self.threads, self.token_budget, self._workers = old

    def _start(
        self, texts: list[str], prefix: str, batch_size: int | None, report: EncodeReport
    ) -> _Window:
        """Tokenize a window and hand its batches to the threads."""
        started = time.perf_counter()
        if prefix:
            texts = [prefix + text if isinstance(text, str) else text for text in texts]
        tokens = self.tokenizer(texts, report.texts)
        seen: dict[str, int] = {}
        first = np.array([seen.setdefault(text, row) for row, text in enumerate(texts)], np.int64)
        rows = np.flatnonzero(first == np.arange(len(texts)))
        counts = tokens.counts[rows]
        report.texts += len(texts)
        report.distinct += len(rows)
        report.tokens += int(counts.sum())
        report.truncated += int(tokens.truncated.sum())
        report.seconds_tokenize += time.perf_counter() - started
        window = _Window(first, np.zeros((len(texts), self.dim), np.float32), report)
        for batch in plan_batches(counts, self.token_budget, batch_size):
            window.work.append(partial(self._run_batch, tokens, rows[batch], window))
        if self.threads > 1 and len(window.work) > 1:
            submit = self._pool().submit
            window.jobs = [submit(job) for job in window.work]
        return window

    def _finish(self, window: _Window, bar: Any) -> npt.NDArray[np.float32]:  # noqa: ANN401 - tqdm
        """Wait for a window's batches, or run them here where no threads do."""
        done = 0
        for work in window.jobs or window.work:
            rows = work.result() if isinstance(work, Future) else work()
            done += rows
            if bar is not None:
                bar.update(rows)
        if bar is not None:
            bar.update(len(window.first) - done)  # repeated texts
        if (window.first[1:] > window.first[:-1]).all():
            return window.vectors  # nothing repeated: no copy
        return window.vectors[window.first]

    def _run_batch(self, tokens: Tokens, rows: npt.NDArray[np.int64], window: _Window) -> int:
        """Run one batch, write its vectors into the window, return its number of texts."""
        started = time.perf_counter()
        hidden = self.session.run(tokens.stack(rows))
        ran = time.perf_counter()
        window.vectors[rows] = self.head(hidden)
        pooled = time.perf_counter()
        with self._lock:
            window.report.seconds_run += ran - started
            window.report.seconds_pool += pooled - ran
        return len(rows)

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(self.threads, "onnxsim-embed")
            return self._workers


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    source = iter(texts)
    while window := list(islice(source, WINDOW_TEXTS)):
        yield window


def _progress_bar(total: int | None) -> Any:  # noqa: ANN401 - tqdm is untyped
    from tqdm import tqdm

    return tqdm(total=total, unit=" texts", desc="Encoding", smoothing=0.1)
