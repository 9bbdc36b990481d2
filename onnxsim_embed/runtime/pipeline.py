"""Texts -> results: tokenize one window ahead, run batches on several threads, keep the order."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.batching import PADDED_TOKEN_BUDGET, TOKEN_BUDGET, plan_batches
from onnxsim_embed.runtime.postprocess import Mask, Output
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.runtime.tokenization import Tokenizer, Tokens
from onnxsim_embed.system.progress import progress_bar

# Texts tokenized together, ahead of inference. Large enough to group equal lengths well, small enough
# that the ids of two windows stay within a few tens of megabytes.
WINDOW_TEXTS = 4096

# A lone batch (a single text, for example) that takes longer than this on one thread is run by a
# second session with several intra-op threads. Measured on two cores: below 3 ms starting and joining
# threads at every operator costs more than it saves, above it saves up to 45 %. That session holds
# the weights a second time, so it is created only after repeated lone batches.
LONE_SECONDS = 0.003
LONE_CALLS = 3
LONE_THREADS = 4


@dataclass
class EncodeReport:
    """Figures of one encode call.

    :param texts: number of encoded texts.
    :param distinct: texts run through the model: repeated ones within a few thousand run once.
    :param tokens: tokens of the distinct texts, special tokens included.
    :param truncated: texts that exceed the model's maximum length.
    :param seconds: wall time of the whole call.
    :param seconds_tokenize: wall time of tokenization.
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
        """Texts per second over the whole call."""
        return self.texts / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over the whole call; those of repeated texts count once."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Window:
    """Texts of a call that are in progress.

    :param results: array (n, ...), filled at first occurrences.
    :param first: row of each text's first occurrence, int64 (n,), or None without repeated texts.
    :param batches: functions that run one batch each and return its number of texts, or their futures
        if threads run them.
    """

    output: Output
    report: EncodeReport
    results: npt.NDArray[Any]
    first: npt.NDArray[np.int64] | None
    batches: Sequence[Callable[[], int]] = ()
    cancel: Callable[[], object] = lambda: None


class Pipeline:
    """Runs texts through tokenizer, session and pooling; any number of threads may call it.

    :param make_session: creates a session with that number of intra-op threads.
    :param threads: number of batches run concurrently.
    """

    def __init__(
        self, tokenizer: Tokenizer, make_session: Callable[[int], Session], threads: int
    ) -> None:
        self.tokenizer = tokenizer
        self.session = make_session(1)
        self.threads = threads
        self.token_budget = TOKEN_BUDGET if self.session.runs_on_cpu else PADDED_TOKEN_BUDGET
        self._make_session = make_session
        self._last_report = EncodeReport()
        self._own_reports = threading.local()
        self._reset_threads()
        _instances().add(self)

    def _reset_threads(self) -> None:
        """Start without workers: at first, and in a forked child, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self._lone_lock = threading.Lock()
        self._lone_session: Session | None = None
        self._lone_calls = 0
        self._token_seconds = float("inf")  # the minimum that a token of a lone batch took

    @property
    def last_report(self) -> EncodeReport:
        """The report of this thread's last call, or of any thread's if this one has made none."""
        report: EncodeReport = getattr(self._own_reports, "last", self._last_report)
        return report

    def _finish_report(self, report: EncodeReport, started: float) -> None:
        report.seconds = time.perf_counter() - started
        report.threads, report.provider = self.threads, self.session.provider
        self._last_report = self._own_reports.last = report

    def stream(
        self,
        texts: Iterable[str],
        prefix: str,
        output: Output,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        progress_start: int = 0,
        report: EncodeReport | None = None,
    ) -> Iterator[npt.NDArray[Any]]:
        """Yield the results of texts, in order, in arrays of WINDOW_TEXTS rows (the last: the rest).

        If the source or one of its texts raises, the results of the texts before are yielded first.

        :param progress_start: number of texts that the progress bar counts as done before.
        :param report: filled with the figures of the call.
        """
        started = time.perf_counter()
        report = EncodeReport() if report is None else report
        source = iter(texts)
        waiting: deque[_Window] = deque()
        with ExitStack() as stack:
            stack.callback(self._finish_report, report, started)
            stack.callback(lambda: [window.cancel() for window in waiting])
            update: Callable[[int], object] = lambda rows: None  # noqa: E731
            if progress:
                total = len(texts) if isinstance(texts, Sequence) else None
                bar = progress_bar(
                    desc="Encoding",
                    unit=" texts",
                    total=total,
                    initial=progress_start,
                    smoothing=0.1,
                )
                update = stack.enter_context(bar).update
            failure: Exception | None = None
            while failure is None:
                window, failure = _read_window(source)
                if window:
                    try:
                        waiting.append(self._start(window, prefix, output, batch_size, report))
                    except Exception as error:
                        failure = error
                if not window:
                    break
                if len(waiting) > 1:  # tokenization runs one window ahead of inference
                    yield self._finish(waiting[0], update)
                    waiting.popleft()  # only now: an interruption cancels its batches
            while waiting:
                yield self._finish(waiting[0], update)
                waiting.popleft()
            if failure is not None:
                raise failure

    def run_one(self, text: str, prefix: str, output: Output) -> npt.NDArray[Any]:
        """Return the result of one text without windows, plans and workers: a row as in `stream`."""
        started = time.perf_counter()
        tokens = self.tokenizer([prefix + text if prefix else text])
        ids, mask = self._inputs(tokens, np.zeros(1, np.int64))
        tokenized = time.perf_counter()
        hidden = self._run_lone(ids, mask)
        ran = time.perf_counter()
        result = output.finish(hidden, mask)[0]
        report = EncodeReport(1, 1, len(tokens.ids), int(tokens.truncated[0]))
        report.seconds_tokenize = tokenized - started
        report.seconds_run = ran - tokenized
        report.seconds_pool = time.perf_counter() - ran
        self._finish_report(report, started)
        return result

    @contextmanager
    def settings(self, *, threads: int, token_budget: int) -> Iterator[None]:
        """Run with other threads and batches inside the block; not while other threads encode."""
        names = ("threads", "token_budget", "_workers", "_lone_session")
        before = {name: getattr(self, name) for name in names}
        vars(self).update(dict(zip(names, (threads, token_budget, None, None), strict=True)))
        try:
            yield
        finally:
            if self._workers is not None:
                self._workers.shutdown()
            vars(self).update(before)

    def _start(
        self,
        texts: list[str],
        prefix: str,
        output: Output,
        batch_size: int | None,
        report: EncodeReport,
    ) -> _Window:
        """Tokenize a window and hand its batches to the threads."""
        started = time.perf_counter()
        if prefix:
            texts = [prefix + text if isinstance(text, str) else text for text in texts]
        tokens = self.tokenizer(texts, report.texts)
        first, rows = _first_occurrences(texts)
        counts = tokens.counts if first is None else tokens.counts[rows]
        results = np.empty((len(texts), *output.shape), output.dtype)
        window = _Window(output, report, results, first)
        report.texts += len(texts)
        report.distinct += len(rows)
        report.tokens += int(counts.sum())
        report.truncated += int(tokens.truncated.sum())
        report.seconds_tokenize += time.perf_counter() - started
        padded = not self.session.runs_on_cpu
        plan = plan_batches(counts, self.token_budget, batch_size, padded=padded)
        batches = [rows[batch] for batch in plan]
        lone = len(batches) == 1
        window.batches = [partial(self._run_batch, tokens, b, window, lone) for b in batches]
        if self.threads > 1 and not lone:
            submit = self._pool().submit
            futures: list[Future[int]] = [submit(run) for run in window.batches]
            window.batches = [future.result for future in futures]
            window.cancel = lambda: [future.cancel() for future in futures]
        return window

    def _finish(self, window: _Window, update: Callable[[int], object]) -> npt.NDArray[Any]:
        """Return the results of a window after waiting for its batches, or running them here."""
        done = 0
        for run in window.batches:
            rows = run()
            done += rows
            update(rows)
        if window.first is not None:
            repeated = np.flatnonzero(window.first != np.arange(len(window.first)))
            window.results[repeated] = window.results[window.first[repeated]]
            update(len(window.first) - done)
        return window.results

    def _run_batch(
        self, tokens: Tokens, rows: npt.NDArray[np.int64], window: _Window, lone: bool
    ) -> int:
        """Run one batch, write its results into the window, return its number of texts."""
        started = time.perf_counter()
        ids, mask = self._inputs(tokens, rows)
        hidden = self._run_lone(ids, mask) if lone else self.session.run(ids, mask)
        ran = time.perf_counter()
        window.results[rows] = window.output.finish(hidden, mask)
        pooled = time.perf_counter()
        with self._lock:
            window.report.seconds_run += ran - started
            window.report.seconds_pool += pooled - ran
        return len(rows)

    def _inputs(
        self, tokens: Tokens, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], Mask]:
        if self.session.runs_on_cpu:
            return tokens.stack(rows), None
        return tokens.pad(rows, self.tokenizer.pad_token_id)

    def _run_lone(self, ids: npt.NDArray[np.int64], mask: Mask) -> npt.NDArray[np.float32]:
        """Run the only batch of a call, on several threads if it is long enough."""
        if self.threads == 1 or not self.session.runs_on_cpu:
            return self.session.run(ids, mask)
        # Only one at a time: several lone batches at once occupy the processors as they are.
        long = ids.size * self._token_seconds > LONE_SECONDS
        if long and self._lone_lock.acquire(blocking=False):
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
    """Return each text's first row (None without repeated texts) and the rows that are first."""
    seen: dict[str, int] = {}
    first = np.array([seen.setdefault(text, row) for row, text in enumerate(texts)], np.int64)
    if len(seen) == len(texts):
        return None, first
    return first, np.fromiter(seen.values(), np.int64, len(seen))


@lru_cache(maxsize=1)
def _instances() -> weakref.WeakSet[Pipeline]:
    """Return the set of pipelines whose threads are reset after a fork."""
    pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()

    def reset() -> None:
        for pipeline in list(pipelines):
            pipeline._reset_threads()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset)
    return pipelines


def _read_window(source: Iterator[str]) -> tuple[list[str], Exception | None]:
    """Return the next WINDOW_TEXTS texts, or those before the source raised, and its error."""
    window: list[str] = []
    try:
        for text in islice(source, WINDOW_TEXTS):
            window.append(text)
    except Exception as error:
        return window, error
    return window, None
