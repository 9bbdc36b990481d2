"""AsyncEmbedder: concurrent callers of one event loop, gathered into few calls of the model."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import EncodeArguments, EncodeOptions, OutputPrecision
from onnxsim_embed.runtime.postprocess import check_truncation, finish_vectors
from onnxsim_embed.runtime.tokenization import as_list, check_texts

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(eq=False)
class _Request:
    """A caller's texts on their way.

    :param prefix: put before each text.
    :param finish: maps vectors, float32 (n, dim), to what the caller gets.
    """

    texts: list[str]
    prefix: str
    finish: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
    result: asyncio.Future[npt.NDArray[Any]]


class AsyncEmbedder:
    """An Embedder for web services: never blocks the event loop, and batches concurrent callers.

    Texts of several callers run through the model together, whatever their prompts and number
    formats. Results and errors are those of `Embedder`, as if each caller were alone. A cancelled
    caller's texts are dropped if the model has not begun with them.

    It belongs to the event loop that first uses it, until that loop is closed. Loops at the same
    time need one AsyncEmbedder each; these may share one Embedder.

    :param embedder: the model. Others may use it meanwhile.
    :param max_wait: seconds that a request waits for company while the model is idle; 0 takes only
        those of the same pass of the loop. While the model runs, requests gather for its next call.
    :param max_texts: texts in one call of the model. So many do not wait; a request with more is not
        split, and those that come meanwhile are served after it.
    :raises ValueError: if `max_wait` is below 0 or not finite, or `max_texts` below 1.

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
        if max_texts < 1:
            raise ValueError(f"max_texts must be at least 1, got {max_texts!r}")
        self.embedder = embedder
        self._max_wait = max_wait
        self._max_texts = max_texts
        self._closed = False
        self._binding = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begin()

    def _begin(self) -> None:
        """Begin with nothing waiting: at first, and in a new loop after one was closed."""
        self._worker = ThreadPoolExecutor(1, "onnxsim-embed-serving")
        self._waiting: dict[_Request, int] = {}  # with their numbers of texts, oldest first
        self._waiting_texts = 0
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None

    async def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        precision: OutputPrecision = "float32",
        ranges: npt.ArrayLike | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
    ) -> npt.NDArray[Any]:
        """Turn texts into vectors, bit for bit those of `Embedder.encode`.

        :param inputs: one text, or any iterable of texts, read before this first waits.
        :param prompt_name: name of one of the model's prompts, put before each text.
        :param prompt: text put before each text; wins over `prompt_name`.
        :param precision: number format of the result: float32, float16, int8, uint8, binary, ubinary.
        :param ranges: float32 (2, dim), smallest and largest value of each component, for int8 and
            uint8; None takes them from this caller's vectors.
        :param normalize_embeddings: True scales vectors to L2 norm 1.
        :param truncate_dim: keep only the first so many components, before `normalize_embeddings`.
        :returns: array (n, dim), or (dim,) for one text; float32 unless `precision` says otherwise.
        :raises TypeError: naming the row that is not a string.
        :raises ValueError: for an unknown prompt, precision or dimension, or naming the row that is
            not valid Unicode.
        :raises RuntimeError: after `aclose`, or in a second event loop beside the first.
        """
        loop = self._bind()
        if self._closed:
            raise RuntimeError("this AsyncEmbedder is closed")
        options = EncodeOptions(
            precision=precision,
            ranges=ranges,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
        )
        prefix = self.embedder.prompt_text(prompt_name, prompt)
        dim = self.embedder.embedding_dimension
        check_truncation(truncate_dim, dim)
        texts = as_list(inputs)
        check_texts(texts)
        finish = partial(finish_vectors, options=options)
        # Invalid ranges show on zeros, before they meet other requests. One row alone has no range.
        result = finish(np.zeros((min(len(texts), 2), dim), np.float32))
        if texts:
            request = _Request(texts, prefix, finish, loop.create_future())
            result = await self._answer(request)
        return result[0] if isinstance(inputs, str) else result

    async def encode_query(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **arguments: Unpack[EncodeArguments],
    ) -> npt.NDArray[Any]:
        """Encode search queries: `encode` with the prompt of `Embedder.encode_query`."""
        if prompt_name is None and prompt is None:
            prompt = self.embedder.query_prompt()
        return await self.encode(inputs, prompt_name, prompt, **arguments)

    async def encode_document(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **arguments: Unpack[EncodeArguments],
    ) -> npt.NDArray[Any]:
        """Encode documents: `encode` with the prompt of `Embedder.encode_document`."""
        if prompt_name is None and prompt is None:
            prompt = self.embedder.document_prompt()
        return await self.encode(inputs, prompt_name, prompt, **arguments)

    async def aclose(self) -> None:
        """Refuse new calls, and return when all earlier ones are answered."""
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
        """Return the running event loop, which must be the one this belongs to."""
        loop = asyncio.get_running_loop()
        with self._binding:
            if self._loop is not loop:
                if self._loop is not None and not self._loop.is_closed():
                    raise RuntimeError(
                        "this AsyncEmbedder belongs to another event loop, which is still open; make "
                        "one for each loop (they may share one Embedder)"
                    )
                self._loop = loop
                self._begin()
        return loop

    async def _answer(self, request: _Request) -> npt.NDArray[Any]:
        """Let a request wait for its batch, and return its result."""
        self._waiting[request] = len(request.texts)
        self._waiting_texts += len(request.texts)
        if self._running is None:
            if self._waiting_texts >= self._max_texts:
                self._start()
            elif self._timer is None:
                self._timer = request.result.get_loop().call_later(self._max_wait, self._start)
        try:
            return await request.result
        finally:  # where the caller is cancelled before its batch starts
            self._waiting_texts -= self._waiting.pop(request, 0)

    def _start(self) -> None:
        """Start on the oldest requests, as many as `max_texts` allows."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch: list[_Request] = []
        texts = 0
        for request, count in list(self._waiting.items()):
            texts += count
            if batch and texts > self._max_texts:
                break
            batch.append(request)
            self._waiting_texts -= self._waiting.pop(request)
        if batch:
            self._running = asyncio.get_running_loop().create_task(self._run(batch))

    async def _run(self, batch: list[_Request]) -> None:
        """Run a batch in the worker, hand out its results, start the next."""
        loop = asyncio.get_running_loop()
        try:
            outcomes = await loop.run_in_executor(self._worker, self._encode, batch)
        except (asyncio.CancelledError, Exception):
            # The loop or the interpreter is about to end; nobody is to wait for what will not come.
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

    def _encode(self, batch: list[_Request]) -> list[npt.NDArray[Any] | Exception]:
        """Return each request's result or error. Runs in the worker."""
        try:
            texts = [request.prefix + text for request in batch for text in request.texts]
            # Of one text as such, which is a little faster.
            vectors = self.embedder.encode(texts if len(texts) > 1 else texts[0], prompt="")
            vectors = np.atleast_2d(vectors)
            if len(batch) == 1:
                return [batch[0].finish(vectors)]
            ends = np.cumsum([len(request.texts) for request in batch])
            parts = np.split(vectors, ends[:-1])
            # Copies: a row that one caller keeps shall not keep the vectors of all.
            return [request.finish(part.copy()) for request, part in zip(batch, parts, strict=True)]
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [outcome for request in batch for outcome in self._encode([request])]
