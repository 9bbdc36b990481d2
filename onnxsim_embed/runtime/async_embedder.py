"""AsyncEmbedder: concurrent callers of one event loop, batched into few model calls."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import (
    EncodeArguments,
    EncodeOptions,
    OutputValue,
    check_positive,
)
from onnxsim_embed.runtime.postprocess import check_truncation, finish_vectors
from onnxsim_embed.runtime.prompts import Prompted
from onnxsim_embed.runtime.report import EncodeReport
from onnxsim_embed.runtime.texts import as_list, check_texts

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(eq=False)
class _Request:
    """A caller's texts, the options of their embeddings, and the result.

    :param prompt: string that the model is to prepend; empty where it is prepended already, so that
        texts of several prompts share a model call.
    """

    texts: list[str]
    prompt: str
    options: EncodeOptions
    report: EncodeReport
    result: asyncio.Future[npt.NDArray[Any]]

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments of `Embedder.encode` that must be equal to share a model call."""
        names = ("output_value", "long_texts", "stride")
        return {"prompt": self.prompt} | {name: getattr(self.options, name) for name in names}

    def finish(self, vectors: Any, whole: EncodeReport, first: int) -> Any:  # noqa: ANN401
        """Return the result, and fill the report, from those of a call that has its rows from `first` on."""
        rows = range(first, first + len(self.texts))
        report = self.report
        report.texts, report.row_tokens = len(rows), whole.row_tokens[rows.start : rows.stop]
        report.tokens = sum(report.row_tokens)
        report.truncated_rows = [row - first for row in whole.truncated_rows if row in rows]
        report.truncated = len(report.truncated_rows)
        if self.options.output_value == "token_embeddings":
            return list(vectors)
        return finish_vectors(vectors, self.options)


class AsyncEmbedder(Prompted):
    """An Embedder for web services: never blocks the event loop, and batches concurrent callers.

    Texts of several callers run through the model together, whatever their prompts and output dtypes.
    Results and errors are those of `Embedder`, as if each caller were alone. A cancelled caller's
    texts are dropped if the model has not begun with them.

    An instance belongs to the event loop that first uses it, until that loop is closed. Concurrent
    loops need one AsyncEmbedder each; these may share one Embedder.

    :param embedder: the model. Others may use it meanwhile.
    :param max_wait: seconds that a request waits for others while the model is idle; 0 batches only
        those of the same loop iteration. While the model runs, requests gather for its next call.
    :param max_texts: maximum number of texts per model call. Requests that reach it do not wait; a
        larger one is not split.
    :raises ValueError: if `max_wait` is negative or not finite, or `max_texts` not positive.

    Usage, with FastAPI (Starlette's lifespan and state are the same)::

        from contextlib import asynccontextmanager
        from fastapi import FastAPI, Request
        from onnxsim_embed import AsyncEmbedder, Embedder

        @asynccontextmanager
        async def lifespan(app):
            model = Embedder.from_pretrained("all-MiniLM-L6-v2")
            async with AsyncEmbedder(model) as app.state.model:
                yield

        app = FastAPI(lifespan=lifespan)

        @app.post("/embed")
        async def embed(request: Request, texts: list[str]) -> list[list[float]]:
            vectors = await request.app.state.model.encode(texts)
            return vectors.tolist()
    """

    def __init__(self, embedder: Embedder, *, max_wait: float = 0.002, max_texts: int = 64) -> None:
        if not (math.isfinite(max_wait) and max_wait >= 0):
            raise ValueError(f"max_wait must be a number of seconds, 0 or more, got {max_wait!r}")
        check_positive("max_texts", max_texts)
        self.embedder = embedder
        self._max_wait = max_wait
        self._max_texts = max_texts
        self._closed = False
        self._binding = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reset()

    prompts = property(attrgetter("embedder.prompts"))  # may change
    default_prompt_name = property(attrgetter("embedder.default_prompt_name"))

    def __repr__(self) -> str:
        limits = f"max_wait={self._max_wait}, max_texts={self._max_texts}"
        return f"AsyncEmbedder({self.embedder!r}, {limits})"

    def _reset(self) -> None:
        """Start without requests: at first, and in a new loop after one was closed."""
        self._worker = ThreadPoolExecutor(1, "onnxsim-embed-async")
        self._waiting: dict[_Request, int] = {}  # with their numbers of texts, oldest first
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "an AsyncEmbedder belongs to an event loop and cannot be pickled or copied: pickle its "
            "`embedder` and create an AsyncEmbedder from it"
        )

    async def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        output_value: OutputValue = "sentence_embedding",
        report: EncodeReport | None = None,
        **arguments: Unpack[EncodeArguments],
    ) -> Any:  # noqa: ANN401 - an array or a list of arrays
        """Return the embeddings of texts, bit for bit those of `Embedder.encode`.

        :param inputs: one text, or any iterable of texts, read before this first waits.
        :param arguments: `precision`, `ranges` (None computes them from this caller's embeddings),
            `normalize_embeddings`, `truncate_dim`, `long_texts` and `stride`; see `Embedder.encode`,
            also for the prompts and `output_value`.
        :param report: filled with this call's texts, tokens (those of repeated texts each time) and
            truncated texts.
        :returns: array (n, dim), or (dim,) for one text; float32 unless `precision` differs. With
            "token_embeddings" a list of n float32 arrays (tokens, hidden), or one such array.
        :raises TypeError: if the input is not a text or an iterable of texts, naming the row.
        :raises ValueError: for an unknown prompt, an invalid precision, range or dimension, or naming
            the row that is not valid Unicode.
        :raises RuntimeError: after `aclose`, or in a second event loop beside the first.
        """
        loop = self._bind()
        if self._closed:
            raise RuntimeError("this AsyncEmbedder is closed")
        options = EncodeOptions(
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=None,
            output_value=output_value,
            **arguments,
        )
        prefix = self.prompt_text(prompt_name, prompt)
        dim = self.embedder.embedding_dimension
        check_truncation(options.truncate_dim, dim)
        texts = as_list(inputs)
        check_texts(texts)
        # Invalid ranges show on zeros, before they meet other requests. One row alone has no range.
        result: Any = finish_vectors(np.zeros((min(len(texts), 2), dim), np.float32), options)
        if not texts and output_value == "token_embeddings":
            result = []
        if texts:
            if self.embedder.artifact.manifest.include_prompt:
                texts, prefix = [prefix + text for text in texts], ""
            result = await self._answer(
                _Request(texts, prefix, options, report or EncodeReport(), loop.create_future())
            )
        return result[0] if isinstance(inputs, str) else result

    async def aclose(self) -> None:
        """Reject new calls, and return when all earlier ones are answered."""
        self._bind()
        self._closed = True
        if self._running is None:
            self._start()
        while self._running is not None:
            await asyncio.wait([self._running])
        self._worker.shutdown(wait=False)

    async def __aenter__(self) -> AsyncEmbedder:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Return the running event loop, which must be the one this instance belongs to."""
        loop = asyncio.get_running_loop()
        with self._binding:
            if self._loop is not loop:
                if self._loop is not None and not self._loop.is_closed():
                    raise RuntimeError(
                        "this AsyncEmbedder belongs to another event loop, which is still open; "
                        "create one per loop (they may share one Embedder)"
                    )
                self._loop = loop
                self._reset()
        return loop

    async def _answer(self, request: _Request) -> Any:  # noqa: ANN401
        """Return the result of a request after its batch has run."""
        self._waiting[request] = len(request.texts)
        if self._running is None:
            if sum(self._waiting.values()) >= self._max_texts:
                self._start()
            elif self._timer is None:
                self._timer = request.result.get_loop().call_later(self._max_wait, self._start)
        try:
            return await request.result
        finally:  # if the caller is cancelled before its batch starts
            self._waiting.pop(request, None)

    def _start(self) -> None:
        """Start a batch of the oldest requests, up to `max_texts`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch: list[_Request] = []
        texts = 0
        for request, count in list(self._waiting.items()):
            texts += count
            if batch and (texts > self._max_texts or request.shared != batch[0].shared):
                break
            batch.append(request)
            del self._waiting[request]
        if batch:
            self._running = asyncio.get_running_loop().create_task(self._run(batch))

    async def _run(self, batch: list[_Request]) -> None:
        """Run a batch in the worker, distribute its results, start the next."""
        loop = asyncio.get_running_loop()
        try:
            outcomes = await loop.run_in_executor(self._worker, self._encode, batch)
        except (asyncio.CancelledError, Exception):
            # The loop or the interpreter is about to end: no caller may wait for a result.
            for request in (*batch, *self._waiting):
                request.result.cancel()
            self._running = None
            raise
        for request, outcome in zip(batch, outcomes, strict=True):
            if request.result.done():
                continue  # its caller was cancelled
            if isinstance(outcome, Exception):
                request.result.set_exception(outcome)
            else:
                request.result.set_result(outcome)
        self._running = None
        self._start()

    def _encode(self, batch: list[_Request]) -> list[Any]:
        """Return each request's result or error. Runs in the worker."""
        try:
            texts = [text for request in batch for text in request.texts]
            # A single text without a list is a little faster.
            single = texts[0] if len(texts) == 1 else texts
            vectors: Any = self.embedder.encode(single, **batch[0].shared)
            vectors = vectors[None] if len(texts) == 1 else vectors
            whole = self.embedder.last_report
            if len(batch) == 1:
                return [batch[0].finish(vectors, whole, 0)]
            results, first = [], 0
            for request in batch:
                part = vectors[first : first + len(request.texts)]
                # Copies: a row that one caller keeps must not keep the embeddings of all.
                results.append(request.finish(part.copy(), whole, first))
                first += len(request.texts)
            return results
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [outcome for request in batch for outcome in self._encode([request])]
