"""Texts -> results: tokenize one window ahead, run batches on several threads, keep the order."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.batching import PADDED_TOKEN_BUDGET, TOKEN_BUDGET, plan_batches
from onnxsim_embed.runtime.engine import Engine, LoneEngine
from onnxsim_embed.runtime.postprocess import Mask, Output
from onnxsim_embed.runtime.report import EncodeReport, TokenBar
from onnxsim_embed.runtime.tokenization import Tokenizer, Tokens
from onnxsim_embed.system.arrays import Int64

# Texts tokenized together, ahead of inference. Large enough to group equal lengths well, small enough
# that the ids of two windows stay within a few tens of megabytes.
WINDOW_TEXTS = 4096

# Row numbers that a report lists: 40 MB, whatever a stream holds.
LISTED_ROWS = 1_000_000

# Rows of the first array where each is kept on disk: one or two seconds of work that an interruption may lose.
FIRST_ROWS = 256


@dataclass
class _Window:
    """Texts of a call that are in progress.

    :param results: array (n, ...), filled at first occurrences; with `merge`, of windows of texts.
    :param first: row of each text's first occurrence, int64 (n,), or None without repeated texts.
    :param batches: functions that run one batch each and return its number of tokens, or their
        futures if threads run them.
    :param merge: maps the results of windows of texts to those of texts.
    """

    output: Output
    report: EncodeReport
    results: npt.NDArray[Any]
    first: Int64 | None
    batches: Sequence[Callable[[], int]] = ()
    merge: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None = None
    cancel: Callable[[], object] = lambda: None


class Pipeline:
    """Runs texts through tokenizer, engine and pooling; any number of threads may call it.

    :param make_engine: creates an engine with that number of threads inside a call.
    :param threads: number of batches run concurrently.
    """

    def __init__(
        self, tokenizer: Tokenizer, make_engine: Callable[[int], Engine], threads: int
    ) -> None:
        self.tokenizer = tokenizer
        self.engine = make_engine(1)
        self.threads = threads
        self.token_budget = TOKEN_BUDGET if self.engine.runs_on_cpu else PADDED_TOKEN_BUDGET
        self._make_engine = make_engine
        self._last_report = EncodeReport()
        self._own_reports = threading.local()
        self._reset_threads()
        _instances().add(self)

    def _reset_threads(self) -> None:
        """Start without workers: at first, and in a forked child, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self._lone = LoneEngine(self.engine, self._make_engine, self.threads)

    @property
    def last_report(self) -> EncodeReport:
        """The report of this thread's last call, or of any thread's if this one has made none."""
        report: EncodeReport = getattr(self._own_reports, "last", self._last_report)
        return report

    def _finish_report(self, report: EncodeReport, started: float) -> None:
        report.seconds = time.perf_counter() - started
        report.threads, report.provider = self.threads, self.engine.provider
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
        small_first: bool = False,
        report: EncodeReport | None = None,
    ) -> Generator[npt.NDArray[Any], None, None]:
        """Yield the results of texts, in order, in arrays of WINDOW_TEXTS rows (the last: the rest).

        If the source or one of its texts raises, the results of the texts before are yielded first.

        :param progress: whether to show a bar of tokens: the longest texts run first, so that one of
            texts would be wrong about the time left.
        :param progress_start: number of texts that were done before.
        :param small_first: yield FIRST_ROWS, then up to 2, 4, ... times as many rows in all.
        :param report: filled with the figures of the call.
        """
        started = time.perf_counter()
        report = EncodeReport() if report is None else report
        source = iter(texts)
        waiting: deque[_Window] = deque()
        with ExitStack() as stack:
            stack.callback(self._finish_report, report, started)
            stack.callback(lambda: [window.cancel() for window in waiting])
            bar = (
                stack.enter_context(closing(TokenBar(texts, progress_start))) if progress else None
            )
            failure: Exception | None = None
            while failure is None:
                rows = WINDOW_TEXTS
                if small_first:
                    row = progress_start + report.texts
                    rows = min(rows, max(FIRST_ROWS, 1 << row.bit_length()) - row)
                window, failure = _read_window(source, rows)
                if window:
                    try:
                        waiting.append(self._start(window, prefix, output, batch_size, report))
                        if bar is not None:
                            bar.expect(report)
                    except Exception as error:
                        failure = error
                if not window:
                    break
                if len(waiting) > 1:  # tokenization runs one window ahead of inference
                    yield self._finish(waiting[0], bar)
                    waiting.popleft()  # only now: an interruption cancels its batches
            while waiting:
                yield self._finish(waiting[0], bar)
                waiting.popleft()
            if failure is not None:
                raise failure

    def run_one(self, text: str, prefix: str, output: Output) -> npt.NDArray[Any]:
        """Return the result of one text without windows, plans and workers: a row as in `stream`."""
        started = time.perf_counter()
        tokens = self.tokenizer([prefix + text if prefix else text])
        ids, mask = self._inputs(tokens, np.zeros(1, np.int64))
        tokenized = time.perf_counter()
        hidden = self._lone.run(ids, mask, output.pooled)
        ran = time.perf_counter()
        result = output.finish(hidden, mask)[0]
        report = EncodeReport(1, 1, len(tokens.ids), int(tokens.truncated[0]), int(tokens.lost[0]))
        report.truncated_rows, report.row_tokens = [0] * report.truncated, [report.tokens]
        report.unknown_rows = self.tokenizer.unknown_only(tokens, prefix).tolist()
        report.seconds_tokenize = tokenized - started
        report.seconds_run = ran - tokenized
        report.seconds_pool = time.perf_counter() - ran
        self._finish_report(report, started)
        return result

    @contextmanager
    def settings(self, *, threads: int, token_budget: int) -> Iterator[None]:
        """Run with other threads and batches inside the block; not while other threads encode."""
        lone = LoneEngine(self.engine, self._make_engine, threads)
        inside = {"threads": threads, "token_budget": token_budget, "_workers": None, "_lone": lone}
        before = {name: getattr(self, name) for name in inside}
        vars(self).update(inside)
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
        report.distinct += len(rows)
        merge = owners = windows = None
        if output.long_texts is not None:
            split, of_windows, merge_windows = output.long_texts
            tokens, windows = split(texts, tokens)
        if windows is not None:
            output = of_windows
            merge = partial(merge_windows, windows)
            counts = np.diff(windows.starts)
            owners = np.repeat(np.arange(len(texts)), counts)
            rows = np.flatnonzero(np.isin(owners, rows))
            report.split += int(np.count_nonzero(counts > 1))
        results = np.zeros((len(tokens.lost), *output.shape), output.dtype)
        window = _Window(output, report, results, first, merge=merge)
        of_rows = np.bincount(owners, tokens.counts) if owners is not None else tokens.counts
        unknown = self.tokenizer.unknown_only(tokens, prefix, owners)
        for known, new in (
            (report.truncated_rows, np.flatnonzero(tokens.truncated) + report.texts),
            (report.unknown_rows, unknown + report.texts),
            (report.row_tokens, of_rows.astype(np.int64)),
        ):
            known += new[: LISTED_ROWS - len(known)].tolist()
        report.texts += len(texts)
        report.tokens += int(tokens.counts[rows].sum())
        report.truncated += int(tokens.truncated.sum())
        report.lost_tokens += int(tokens.lost.sum())
        report.seconds_tokenize += time.perf_counter() - started
        self._submit(window, tokens, rows, batch_size)
        return window

    def run_tokens(self, tokens: Tokens, output: Output) -> npt.NDArray[Any]:
        """Return the results of texts that are tokenized already: rows as in `stream`."""
        results = np.empty((len(tokens.lost), *output.shape), output.dtype)
        window = _Window(output, EncodeReport(), results, None)
        self._submit(window, tokens, np.arange(len(results)), None)
        return self._finish(window)

    def _submit(self, window: _Window, tokens: Tokens, rows: Int64, batch_size: int | None) -> None:
        """Plan the batches of some rows of a window and hand them to the threads."""
        padded = not self.engine.runs_on_cpu
        counts = tokens.counts[rows]
        plan = plan_batches(counts, self.token_budget, batch_size, padded=padded)
        batches = [rows[batch] for batch in plan]
        lone = len(batches) == 1
        window.batches = [partial(self._run_batch, tokens, b, window, lone) for b in batches]
        if self.threads > 1 and not lone:
            with self._lock:
                if self._workers is None:
                    self._workers = ThreadPoolExecutor(self.threads, "onnxsim-embed")
                submit = self._workers.submit
            futures: list[Future[int]] = [submit(run) for run in window.batches]
            window.batches = [future.result for future in futures]
            window.cancel = lambda: [future.cancel() for future in futures]

    def _finish(self, window: _Window, bar: TokenBar | None = None) -> npt.NDArray[Any]:
        """Return the results of a window after waiting for its batches, or running them here."""
        for run in window.batches:
            tokens = run()
            if bar is not None:
                bar.update(tokens)
        if window.merge is not None:
            window.results = window.merge(window.results)
        if window.first is not None:
            repeated = np.flatnonzero(window.first != np.arange(len(window.first)))
            window.results[repeated] = window.results[window.first[repeated]]
        if bar is not None:
            bar.finish(len(window.results))
        return window.results

    def _run_batch(self, tokens: Tokens, rows: Int64, window: _Window, lone: bool) -> int:
        """Run one batch, write its results into the window, return its number of tokens."""
        started = time.perf_counter()
        ids, mask = self._inputs(tokens, rows)
        run = self._lone.run if lone else self.engine.run
        hidden = run(ids, mask, window.output.pooled)
        ran = time.perf_counter()
        window.results[rows] = window.output.finish(hidden, mask)
        pooled = time.perf_counter()
        with self._lock:
            window.report.seconds_run += ran - started
            window.report.seconds_pool += pooled - ran
        return int(ids.size if mask is None else mask.sum())

    def _inputs(self, tokens: Tokens, rows: Int64) -> tuple[Int64, Mask]:
        if self.engine.runs_on_cpu:
            return tokens.stack(rows), None
        return tokens.pad(rows, self.tokenizer.pad_token_id)


def _first_occurrences(texts: list[str]) -> tuple[Int64 | None, Int64]:
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


def _read_window(source: Iterator[str], rows: int) -> tuple[list[str], Exception | None]:
    """Return the next texts, or those before the source raised, and its error."""
    window: list[str] = []
    try:
        for text in islice(source, rows):
            window.append(text)
    except Exception as error:
        return window, error
    return window, None
