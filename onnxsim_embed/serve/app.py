"""The application: the endpoints of both APIs around an AsyncEmbedder."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from onnxsim_embed.runtime.async_embedder import AsyncEmbedder
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import LongTexts, OutputValue
from onnxsim_embed.runtime.pooling import normalize
from onnxsim_embed.runtime.report import EncodeReport
from onnxsim_embed.serve.endpoint import Guard, Limits, Metrics, error_response
from onnxsim_embed.serve.requests import (
    EmbedAllRequest,
    EmbeddingsRequest,
    EmbedRequest,
    Inputs,
    SimilarityRequest,
    TextOptions,
    openapi,
)

logger = logging.getLogger(__name__)

# Of the tokens of a model call: longer texts are rejected, as they would keep the model from others.
CHARACTERS_PER_TOKEN = 8


class Service:
    """The endpoints of one model; see `create_app`."""

    def __init__(
        self,
        embedder: Embedder,
        name: str | None,
        api_key: str | None,
        limits: Limits,
        long_texts: LongTexts,
        stride: int,
    ) -> None:
        self.embedder, self.limits = embedder, limits
        own = embedder.artifact.manifest.name
        self.names = [name] if name else [own, own.rpartition("/")[2]]
        self.long_texts: dict[str, Any] = {"long_texts": long_texts, "stride": stride}
        self.piece = max(1, limits.batch_tokens // embedder.max_seq_length)  # texts of a model call
        # Without a wait for others: while the model runs, requests gather for its next call.
        self.model = AsyncEmbedder(embedder, max_wait=0, max_texts=self.piece)
        self.waiting = 0  # texts
        self.measured = Metrics(lambda: self.waiting)
        self.guard = Guard(api_key, limits, self.measured)
        # Summary, request body (None: read by GET) and handler of each path.
        self.paths: dict[str, tuple[str, type[BaseModel] | None, Callable[[Any], Any]]] = {
            "/v1/embeddings": ("Embeddings, as OpenAI's API", EmbeddingsRequest, self.embeddings),
            "/embed": ("Embeddings, as text-embeddings-inference", EmbedRequest, self.embed),
            "/": ("The same as /embed", EmbedRequest, self.embed),
            "/embed_all": ("Embeddings of tokens", EmbedAllRequest, self.embed_all),
            "/similarity": ("Cosines of one text and others", SimilarityRequest, self.similarity),
            "/v1/models": ("The served model, as OpenAI's API", None, self.models),
            "/health": ("Whether the process answers", None, self.health),
            "/ready": ("Whether the queue has room", None, self.ready),
            "/metrics": ("Metrics for Prometheus", None, self.metrics),
            "/openapi.json": ("This document", None, self.document),
            "/docs": ("This document as a page", None, self.page),
        }
        self.openapi = openapi(self.names[0], {path: row[:2] for path, row in self.paths.items()})

    def routes(self) -> list[Route]:
        """Return the routes of all paths."""
        return [
            Route(path, handler)
            if body is None
            else Route(path, self.guard.endpoint(path, body, handler), methods=["POST"])
            for path, (_, body, handler) in self.paths.items()
        ]

    async def encode(
        self,
        inputs: Inputs,
        *,
        truncate: bool | None = None,
        output_value: OutputValue = "sentence_embedding",
        **options: Any,  # noqa: ANN401 - of AsyncEmbedder.encode
    ) -> tuple[list[Any], int]:
        """Return the embeddings of the inputs of a request, and the number of their tokens.

        :param truncate: False rejects texts beyond the model's length.
        """
        texts: list[Any] = [inputs] if isinstance(inputs, str) else inputs
        if texts and isinstance(texts[0], int):
            texts = [texts]
        most = self.limits.texts if output_value == "sentence_embedding" else self.piece
        if len(texts) > most:
            raise HTTPException(413, f"a request may have {most:,} texts, this has {len(texts):,}")
        longest = max(map(len, texts), default=0)
        if longest > (most := CHARACTERS_PER_TOKEN * self.limits.batch_tokens):
            raise HTTPException(413, f"a text may have {most:,} characters, one has {longest:,}")
        if self.waiting and self.waiting + len(texts) > self.limits.queue:
            raise HTTPException(
                429, f"{self.waiting:,} texts are waiting, and the queue holds {self.limits.queue:,}",
                {"Retry-After": "1"},
            )  # fmt: skip
        self.waiting += len(texts)
        results: list[Any] = []
        total = 0
        options |= {"output_value": output_value} | (self.long_texts if truncate is None else {})
        try:
            for start in range(0, len(texts), self.piece):
                piece, report = texts[start : start + self.piece], EncodeReport()
                if isinstance(piece[0], str):
                    results += list(await self.model.encode(piece, report=report, **options))
                else:
                    results += await asyncio.to_thread(self.embed_tokens, piece, report, **options)
                total += report.tokens
                self.measured.count(report)
                if report.truncated and truncate is False:
                    row = start + report.truncated_rows[0]
                    raise HTTPException(
                        413, f"input {row} has more than {self.embedder.max_seq_length} tokens; "
                        "shorten it, or pass truncate: true",
                    )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error).replace("truncate_dim", "dimensions")) from None
        finally:
            self.waiting -= len(texts)
        return results, total

    def embed_tokens(
        self,
        token_ids: list[list[int]],
        report: EncodeReport,
        prompt_name: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> list[Any]:
        """Return the embeddings of token ids."""
        if prompt_name is not None:
            raise ValueError("prompt_name applies to texts; prepend the prompt before tokenizing")
        report.texts, report.tokens = len(token_ids), sum(map(len, token_ids))
        return list(self.embedder.encode_tokens(token_ids, **options))

    def text_options(self, options: TextOptions) -> dict[str, Any]:
        """Return the arguments of `encode` for options of a request."""
        own, direction = self.embedder.truncation_direction, options.truncation_direction
        if direction is not None and direction.lower() != own:
            raise HTTPException(422, f"this model truncates on the {own}, got {direction!r}")
        return {"truncate": options.truncate, "prompt_name": options.prompt_name}

    # endpoints with a body

    async def embeddings(self, body: EmbeddingsRequest) -> object:
        """OpenAI's embeddings."""
        if body.model not in self.names:
            raise HTTPException(
                404, f"the model {body.model!r:.100} is not served here; pass {self.names[0]!r}"
            )
        rows, tokens = await self.encode(
            body.input, prompt_name=body.prompt_name, truncate_dim=body.dimensions,
            normalize_embeddings=(body.dimensions is not None) or None,
        )  # fmt: skip
        packed = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.astype("<f4")) if packed else row.tolist(),
            }
            for index, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body.model, "usage": usage}

    async def embed(self, body: EmbedRequest) -> object:
        """text-embeddings-inference's embeddings."""
        # Most models normalize by themselves; a second time would change the last bits.
        again = body.dimensions is not None or not self.embedder.artifact.manifest.normalize
        rows, _ = await self.encode(
            body.inputs, **self.text_options(body), truncate_dim=body.dimensions,
            normalize_embeddings=(body.normalize and again) or None,
        )  # fmt: skip
        return [row.tolist() for row in rows]

    async def embed_all(self, body: EmbedAllRequest) -> object:
        """text-embeddings-inference's embeddings of tokens."""
        options = self.text_options(body) | {"truncate": body.truncate is not False}
        rows, _ = await self.encode(body.inputs, **options, output_value="token_embeddings")
        return [row.tolist() for row in rows]

    async def similarity(self, body: SimilarityRequest) -> object:
        """text-embeddings-inference's similarities."""
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        rows, _ = await self.encode(texts, **self.text_options(body.parameters or TextOptions()))
        unit = normalize(np.stack(rows))  # not similarity.cos_sim, which needs scipy
        scores: list[float] = np.clip(unit[1:] @ unit[0], -1, 1).tolist()
        return scores

    # endpoints without

    async def models(self, request: Request) -> Response:
        """Return the served model, as OpenAI's API."""
        self.guard.authorize(request)
        model = {"id": self.names[0], "object": "model", "created": 0, "owned_by": "onnxsim-embed"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """Return status 200: the process answers."""
        return PlainTextResponse("ok\n")

    async def ready(self, request: Request) -> Response:
        """Return status 200 if the queue has room, 503 if it is full."""
        if self.waiting >= self.limits.queue:
            return PlainTextResponse("the queue is full\n", 503)
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in the format that Prometheus asks for."""
        encoder, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(self.measured.registry), headers={"Content-Type": media_type})

    async def document(self, request: Request) -> Response:
        """Return the OpenAPI document."""
        return JSONResponse(self.openapi)

    async def page(self, request: Request) -> Response:
        """Return the OpenAPI document as a page that loads nothing from elsewhere."""
        sections = [
            f"<h2>{method.upper()} {path}</h2><p>{html.escape(operation['summary'])}</p>"
            for path, methods in self.openapi["paths"].items()
            for method, operation in methods.items()
        ]
        schemas = html.escape(json.dumps(self.openapi["components"]["schemas"], indent=1))
        title = f"<title>onnxsim-embed</title><h1>{html.escape(self.names[0])}</h1>"
        return HTMLResponse(f"<!doctype html>{title}{''.join(sections)}<pre>{schemas}</pre>")


def create_app(
    embedder: Embedder,
    *,
    name: str | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
    long_texts: LongTexts = "truncate",
    stride: int = 0,
) -> Starlette:
    """Return an ASGI application that serves a model.

    Embeddings are those of `Embedder.encode`, bit for bit, whatever other requests there are. The
    application runs in one process and uses all processors. Its page /docs lists the paths.

    :param embedder: the model.
    :param name: its name in requests and in /v1/models; None for the model's own.
    :param api_key: key that requests must pass as `Authorization: Bearer KEY`, except those to /health,
        /ready, /metrics, /docs and /openapi.json; None for none.
    :param limits: see `Limits`.
    :param long_texts: as for `Embedder.encode`, as is `stride`, where a request does not say.
    :raises ValueError: for an invalid limit or option.

    Usage::

        import uvicorn
        from onnxsim_embed import Embedder
        from onnxsim_embed.serve import create_app

        uvicorn.run(create_app(Embedder("all-MiniLM-L6-v2")), port=8080)
    """
    embedder.encode([], long_texts=long_texts, stride=stride)  # raises for invalid options
    service = Service(embedder, name, api_key, limits or Limits(), long_texts, stride)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.model:
            yield
        guard = service.guard
        logger.info("answered %d of %d accepted requests", guard.answered, guard.accepted)

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(request.url.path, error)

    app = Starlette(
        routes=service.routes(), lifespan=lifespan, exception_handlers={HTTPException: on_error}
    )
    app.state.service = service
    return app
