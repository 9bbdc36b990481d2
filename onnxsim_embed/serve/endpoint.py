"""What surrounds every endpoint: key, limits, time-outs, errors and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import prometheus_client as prometheus
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from onnxsim_embed.runtime.options import check_positive
from onnxsim_embed.runtime.report import EncodeReport
from onnxsim_embed.serve.requests import describe

CLIENT_CLOSED = 499  # nginx's status for a client that went away; nobody receives it
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # buckets


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    :param batch_tokens: tokens of a model call; the texts of larger requests take turns with others.
    :param queue: texts that may wait for the model or be in it; further requests get status 429.
    :param texts: texts of a request.
    :param body_bytes: bytes of a request's body.
    :param seconds: for the body of a request to arrive, and then for its answer.
    :raises ValueError: unless all are positive.
    """

    batch_tokens: int = 16_384
    queue: int = 4096
    texts: int = 2048
    body_bytes: int = 8 << 20
    seconds: int = 60

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_positive(name, value)


class Metrics:
    """Metrics of a server, in a registry of their own."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)

        def counter(name: str, what: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(f"onnxsim_embed_{name}", what, labels, registry=registry)

        self.requests = counter("requests", "Requests answered", "path", "status")
        self.texts = counter("texts", "Texts embedded")
        self.tokens = counter("tokens", "Tokens embedded, special tokens included")
        self.truncated = counter("truncated_texts", "Texts that were truncated")
        self.seconds = prometheus.Histogram(
            "onnxsim_embed_request_seconds", "From the head of a request to its answer", ["path"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        what = "Texts that wait for the model or are in it"
        queue = prometheus.Gauge("onnxsim_embed_queue_texts", what, registry=registry)
        queue.set_function(waiting)

    def count(self, report: EncodeReport) -> None:
        """Add a model call."""
        self.texts.inc(report.texts)
        self.tokens.inc(report.tokens)
        self.truncated.inc(report.truncated)


class Guard:
    """Makes endpoints of handlers.

    :param api_key: key that requests must pass; None for none.
    """

    def __init__(self, api_key: str | None, limits: Limits, metrics: Metrics) -> None:
        self._key = None if api_key is None else _digest(f"Bearer {api_key}")
        self._limits, self._metrics = limits, metrics
        self.accepted = self.answered = 0  # requests

    def endpoint(
        self, path: str, kind: type[BaseModel], handler: Callable[[Any], Awaitable[object]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a path: key, body, limits, time-outs and metrics around a handler."""

        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            self.accepted += 1
            try:
                self.authorize(request)
                body = kind.model_validate_json(await self._read(request))
                answer = await self._work(request, handler(body))
                response = Response(to_json(answer), media_type="application/json")
            except ValidationError as problem:
                response = error_response(path, HTTPException(422, describe(problem, kind)))
            except HTTPException as error:
                response = error_response(path, error)
            self.answered += 1
            self._metrics.requests.labels(path, response.status_code).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)
            return response

        return endpoint

    def authorize(self, request: Request) -> None:
        """Raise status 401 without the API key."""
        given = _digest(request.headers.get("authorization", ""))
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise HTTPException(
                401, "this server requires the header 'Authorization: Bearer KEY' with its API key",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _read(self, request: Request) -> bytes:
        """Return the body of a request, which may neither be too large nor too slow."""
        limit = self._limits.body_bytes

        async def collect() -> bytes:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise HTTPException(
                        413, f"the body exceeds {limit:,} bytes; send fewer texts in a request",
                        {"Connection": "close"},
                    )  # fmt: skip
            return bytes(body)

        try:
            return await asyncio.wait_for(collect(), self._limits.seconds)
        except ClientDisconnect:
            raise HTTPException(CLIENT_CLOSED, "the client closed the connection") from None
        except asyncio.TimeoutError:
            late = f"the body did not arrive within {self._limits.seconds} s"
            raise HTTPException(408, late, {"Connection": "close"}) from None

    async def _work(self, request: Request, answer: Awaitable[object]) -> object:
        """Return an answer; drop it if the client goes away or it takes too long."""
        work = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(request.receive())
        try:
            done, _ = await asyncio.wait(
                {work, gone}, timeout=self._limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if work in done:
                return work.result()
            if gone in done:
                raise HTTPException(CLIENT_CLOSED, "the client closed the connection")
            raise HTTPException(
                503, f"no answer within {self._limits.seconds} s; send fewer texts in a request",
                {"Retry-After": "1"},
            )  # fmt: skip
        finally:
            work.cancel()
            gone.cancel()


def _digest(text: str) -> bytes:
    """Return a digest, whose comparison takes the same time for texts of any length."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def error_response(path: str, error: HTTPException) -> Response:
    """Return an error in the format of the API that a path belongs to."""
    status, message = error.status_code, error.detail
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error")
    body: dict[str, object] = {"error": message, "error_type": kind}
    if path.startswith("/v1"):
        status = 400 if status == 422 else status
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, error.headers)
