"""Texts -> vectors in windows: tokenize ahead, run batches on several threads, keep the order."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.batching import (
    PADDED_TOKEN_BUDGET,
    TOKEN_BUDGET,
    plan_batches,
    plan_padded_batches,
)
from onnxsim_embed.runtime.postprocess import Mask, Output
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.runtime.tokenization import Tokenizer, Tokens
from onnxsim_embed.system.progress import progress_bar

# Texts tokenized together, ahead of inference. Large enough to group equal lengths well, small enough
# that the ids of two windows stay within a few tens of megabytes.
WINDOW_TEXTS = 4096

# A lone batch (one text, say) that takes longer than this on one thread is run by a second session
# whose operators use several. Measured on two cores: below 3 ms starting and joining threads at every
# operator costs more than it saves, above it saves up to 45 %. That session holds the weights again,
# so it is made only when such batches come repeatedly.
LONE_SECONDS = 0.003
LONE_CALLS = 3
LONE_THREADS = 4


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


@dataclass(frozen=True)
class _Call:
    """What one call of `stream` asks for, and the report of it."""

    prefix: str
    output: Output
    batch_size: int | None
    into: npt.NDArray[Any] | None
    report: EncodeReport


@dataclass
class _Window:
    """Texts on their way.

    :param results: array (n, ...), filled at first occurrences.
    :param first: row of each text's first occurrence, int64 (n,), or None where nothing repeats.
    :param work: one function a batch, which returns its number of texts.
    :param jobs: the same where threads run them.
    """

    call: _Call
    results: npt.NDArray[Any]
    first: npt.NDArray[np.int64] | None
    work: list[Callable[[], int]] = field(default_factory=list)
    jobs: list[Future[int]] = field(default_factory=list)


class Pipeline:
    """Runs texts through tokenizer and session; any number of threads may call it.

    :param make_session: makes a session whose operators use so many threads.
    :param threads: batches run at the same time.
    """

    def __init__(
        self, tokenizer: Tokenizer, make_session: Callable[[int], Session], threads: int
    ) -> None:
        self.tokenizer = tokenizer
        self.session = make_session(1)
        self.threads = threads
        self.token_budget = TOKEN_BUDGET if self.session.runs_on_cpu else PADDED_TOKEN_BUDGET
        self._last_report = EncodeReport()
        self._own_reports = threading.local()
        self._make_session = make_session
        self._forget_threads()
        _living().add(self)

    def _forget_threads(self) -> None:
        """Start without workers: at first, and in a forked child, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self._lone_lock = threading.Lock()
        self._lone_session: Session | None = None
        self._lone_calls = 0
        self._token_seconds = float("inf")  # the least that a token of a lone batch took

    def stream(
        self,
        texts: Iterable[str],
        prefix: str,
        output: Output,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        progress_start: int = 0,
        into: npt.NDArray[Any] | None = None,
        report: EncodeReport | None = None,
    ) -> Iterator[npt.NDArray[Any]]:
        """Yield the results of texts, in order, in arrays of WINDOW_TEXTS rows (the last: the rest).

        :param progress_start: texts that the progress bar counts as done before.
        :param into: array (n, ...) for the results of all texts; what is yielded are parts of it.
        """
        started = time.perf_counter()
        report = self._new_report(report)
        total = len(texts) if isinstance(texts, Sequence) else None
        bar = None
        if progress:
            bar = progress_bar(
                desc="Encoding",
                unit=" texts",
                total=total,
                initial=progress_start,
                smoothing=0.1,
            )
        waiting: deque[_Window] = deque()
        try:
            failed: Exception | None = None
            call = _Call(prefix, output, batch_size, into, report)
            for window in self._start_all(texts, call):
                if isinstance(window, Exception):
                    failed = window
                    break
                waiting.append(window)
                if len(waiting) > 1:  # tokenizing one window ahead of inference
                    yield self._finish(waiting[0], bar)
                    waiting.popleft()  # only now: what is interrupted has jobs to cancel
            while waiting:
                yield self._finish(waiting[0], bar)
                waiting.popleft()
            if failed is not None:  # only now: texts before it are not lost
                raise failed
        finally:
            for left in waiting:
                for job in left.jobs:
                    job.cancel()
            if bar is not None:
                bar.close()
            report.seconds = time.perf_counter() - started
            self._finished(report)

    def run_one(
        self, text: str, prefix: str, output: Output, report: EncodeReport | None = None
    ) -> npt.NDArray[Any]:
        """Return the result of one text, without windows, plans and workers: a row as in `stream`."""
        started = time.perf_counter()
        tokens = self.tokenizer([prefix + text if prefix else text])
        ids, mask = self._inputs(tokens, np.zeros(1, np.int64))
        tokenized = time.perf_counter()
        hidden = self._run_lone(ids, mask)
        ran = time.perf_counter()
        result = output.finish(hidden, mask)[0]
        ended = time.perf_counter()
        report = self._new_report(report)
        report.texts = report.distinct = 1
        report.tokens = len(tokens.ids)
        report.truncated = int(tokens.truncated[0])
        report.seconds_tokenize = tokenized - started
        report.seconds_run = ran - tokenized
        report.seconds_pool = ended - ran
        report.seconds = ended - started
        self._finished(report)
        return result

    @property
    def last_report(self) -> EncodeReport:
        """The report of this thread's last call; of any thread's where this one has made none."""
        report: EncodeReport = getattr(self._own_reports, "last", self._last_report)
        return report

    def _new_report(self, report: EncodeReport | None) -> EncodeReport:
        report = EncodeReport() if report is None else report
        report.threads, report.provider = self.threads, self.session.provider
        return report

    def _finished(self, report: EncodeReport) -> None:
        self._last_report = self._own_reports.last = report

    @contextmanager
    def settings(self, *, threads: int, token_budget: int) -> Iterator[None]:
        """Run with other threads and batches for a while; not while other threads encode."""
        old = self.threads, self.token_budget, self._workers, self._lone_session
        self.threads, self.token_budget, self._workers, self._lone_session = (
            threads,
            token_budget,
            None,
            None,
        )
        try:
            yield
        finally:
            if self._workers is not None:
                self._workers.shutdown()
            self.threads, self.token_budget, self._workers, self._lone_session = old

    def _start_all(self, texts: Iterable[str], call: _Call) -> Iterator[_Window | Exception]:
        """Yield windows, started; at last the error that the source or one of its texts raised."""
        try:
            for window in _windows(texts):
                yield self._start(window, call)
        except Exception as error:
            if call.into is not None:  # nobody sees what came before
                raise
            yield error

    def _start(self, texts: list[str], call: _Call) -> _Window:
        """Tokenize a window and hand its batches to the threads."""
        started = time.perf_counter()
        report, output = call.report, call.output
        if call.prefix:
            texts = [call.prefix + text if isinstance(text, str) else text for text in texts]
        tokens = self.tokenizer(texts, report.texts)
        first, rows = _first_occurrences(texts)
        counts = tokens.counts if first is None else tokens.counts[rows]
        results = (
            np.zeros((len(texts), *output.shape), output.dtype)
            if call.into is None
            else call.into[report.texts : report.texts + len(texts)]
        )
        report.texts += len(texts)
        report.distinct += len(rows)
        report.tokens += int(counts.sum())
        report.truncated += int(tokens.truncated.sum())
        report.seconds_tokenize += time.perf_counter() - started
        window = _Window(call, results, first)
        plan = plan_batches if self.session.runs_on_cpu else plan_padded_batches
        batches = [rows[batch] for batch in plan(counts, self.token_budget, call.batch_size)]
        lone = len(batches) == 1
        for batch in batches:
            window.work.append(partial(self._run_batch, tokens, batch, window, lone))
        if self.threads > 1 and len(batches) > 1:
            submit = self._pool().submit
            window.jobs = [submit(job) for job in window.work]
        return window

    def _finish(self, window: _Window, bar: Any) -> npt.NDArray[Any]:  # noqa: ANN401 - tqdm
        """Wait for a window's batches, or run them here where no threads do."""
        done = 0
        for work in window.jobs or window.work:
            rows = work.result() if isinstance(work, Future) else work()
            done += rows
            if bar is not None:
                bar.update(rows)
        if window.first is not None:
            repeated = np.flatnonzero(window.first != np.arange(len(window.first)))
            window.results[repeated] = window.results[window.first[repeated]]
            if bar is not None:
                bar.update(len(window.first) - done)
        return window.results

    def _run_batch(
        self,
        tokens: Tokens,
        rows: npt.NDArray[np.int64],
        window: _Window,
        lone: bool,
    ) -> int:
        """Run one batch, write its results into the window, return its number of texts."""
        started = time.perf_counter()
        ids, mask = self._inputs(tokens, rows)
        hidden = self._run_lone(ids, mask) if lone else self.session.run(ids, mask)
        ran = time.perf_counter()
        window.results[rows] = window.call.output.finish(hidden, mask)
        pooled = time.perf_counter()
        with self._lock:
            window.call.report.seconds_run += ran - started
            window.call.report.seconds_pool += pooled - ran
        return len(rows)

    def _inputs(
        self, tokens: Tokens, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], Mask]:
        if self.session.runs_on_cpu:
            return tokens.stack(rows), None
        return tokens.pad(rows, self.tokenizer.pad_token_id)

    def _run_lone(self, ids: npt.NDArray[np.int64], mask: Mask) -> npt.NDArray[np.float32]:
        """Run a batch that has no company, on several threads where it is long enough."""
        if self.threads == 1 or not self.session.runs_on_cpu:
            return self.session.run(ids, mask)
        # Only one at a time: several lone batches at once fill the processors as they are.
        if ids.size * self._token_seconds > LONE_SECONDS and self._lone_lock.acquire(
            blocking=False
        ):
            try:
                self._lone_calls += 1
                if self._lone_session is None and self._lone_calls > LONE_CALLS:
                    self._lone_session = self._make_session(min(self.threads, LONE_THREADS))
                if self._lone_session is not None:
                    return self._lone_session.run(ids, mask)
            finally:
                self._lone_lock.release()
        started = time.perf_counter()
        hidden = self.session.run(ids, mask)
        seconds = (time.perf_counter() - started) / max(1, ids.size)
        self._token_seconds = min(self._token_seconds, seconds)
        return hidden

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(self.threads, "onnxsim-embed")
            return self._workers


def _first_occurrences(
    texts: list[str],
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64]]:
    """Return each text's first row (None where nothing repeats) and the rows that are first."""
    seen: dict[str, int] = {}
    first = np.array([seen.setdefault(text, row) for row, text in enumerate(texts)], np.int64)
    if len(seen) == len(texts):
        return None, first
    return first, np.fromiter(seen.values(), np.int64, len(seen))


@lru_cache(maxsize=1)
def _living() -> weakref.WeakSet[Pipeline]:
    """Return the set of runners that are told after a fork."""
    runners: weakref.WeakSet[Pipeline] = weakref.WeakSet()

    def forget() -> None:
        for runner in list(runners):
            runner._forget_threads()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)
    return runners


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of WINDOW_TEXTS texts; where the source raises, what came before it first."""
    window: list[str] = []
    try:
        for text in texts:
            window.append(text)
            if len(window) == WINDOW_TEXTS:
                full, window = window, []
                yield full
    except Exception:
        if window:
            yield window
        raise
    if window:
        yield window
