"""The bodies of requests: parsed, checked and documented by pydantic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Inputs = str | list[str] | list[int] | list[list[int]]

INPUTS = (
    "a text, a list of texts, or token ids of this model with its special tokens: a list of integers, "
    "or a list of such lists"
)
PROMPT_NAME = "the name of one of the model's prompts, which is prepended to each text"
TRUNCATE = "true (truncate texts beyond the model's length), false (reject them), or null (as the server does)"
DIRECTION = "the model's own direction of truncation, Right or Left"
DIMENSIONS = "an integer from 1 to the model's dimension, to which embeddings are truncated"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EmbeddingsRequest(_Body):
    """OpenAI's request."""

    input: Inputs = Field(description=INPUTS)
    model: str = Field(description="the name of the served model, a string")
    encoding_format: Literal["float", "base64"] = Field("float", description="float or base64")
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)
    user: str | None = Field(None, description="a string, which is ignored")
    prompt_name: str | None = Field(None, description=PROMPT_NAME)


class TextOptions(_Body):
    """Options of text-embeddings-inference's requests."""

    truncate: bool | None = Field(None, description=TRUNCATE)
    truncation_direction: Literal["Right", "Left", "right", "left"] | None = Field(
        None, description=DIRECTION
    )
    prompt_name: str | None = Field(None, description=PROMPT_NAME)


class EmbedAllRequest(TextOptions):
    """text-embeddings-inference's request of token embeddings."""

    inputs: Inputs = Field(description=INPUTS)


class EmbedRequest(EmbedAllRequest):
    """text-embeddings-inference's request."""

    normalize: bool = Field(True, description="whether embeddings are scaled to L2 norm 1")
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)


class Sentences(_Body):
    """A text, and those that it is compared with."""

    source_sentence: str = Field(description="a text")
    sentences: list[str] = Field(description="a list of texts")


class SimilarityRequest(_Body):
    """text-embeddings-inference's request of similarities."""

    inputs: Sentences = Field(description="an object of source_sentence and sentences")
    parameters: TextOptions | None = Field(None, description="options of the texts")


def describe(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return what is wrong with a body, in one line, without repeating what it holds."""
    # Each type of a union has its own problems: the deepest one is that of the type that was meant.
    worst = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    if worst["type"] == "json_invalid":
        return f"the body is not valid JSON: {worst['ctx']['error']}"
    if worst["type"] == "extra_forbidden":
        unknown = str(worst["loc"][-1])
        return f"unknown field {unknown!r:.80}; known are {', '.join(kind.model_fields)}"
    fields: dict[str, Any] = Sentences.model_fields | TextOptions.model_fields | kind.model_fields
    path = [part for part in worst["loc"] if isinstance(part, int) or part in fields]
    names = [part for part in path if isinstance(part, str)]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    description = fields[names[-1]].description if names else "a JSON object"
    if isinstance(worst["loc"][-1:] and worst["loc"][-1], int):
        return f"{where} is invalid: {where.rpartition('[')[0]} must be {description}"
    return f"{where or 'the body'} must be {description}"


def openapi(name: str, paths: dict[str, tuple[str, type[BaseModel] | None]]) -> dict[str, Any]:
    """Return the OpenAPI document of the service.

    :param paths: summary and request body of each path; those without a body are read by GET.
    """
    from pydantic.json_schema import models_json_schema

    bodies = [(body, "validation") for _, body in paths.values() if body is not None]
    template = "#/components/schemas/{model}"
    references, schemas = models_json_schema(bodies, ref_template=template)
    described: dict[str, Any] = {}
    for path, (summary, body) in paths.items():
        meanings = {200: "OK"} | (ERRORS if body is not None else {})
        responses = {str(status): {"description": text} for status, text in meanings.items()}
        operation: dict[str, Any] = {"summary": summary, "responses": responses}
        if body is not None:
            content = {"application/json": {"schema": references[body, "validation"]}}
            operation["requestBody"] = {"required": True, "content": content}
        described[path] = {"get" if body is None else "post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"onnxsim-embed: {name}", "version": "1"},
        "paths": described,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


ERRORS = {
    400: "The request is invalid (/v1)",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "Too many bytes, texts or tokens",
    422: "The request is invalid",
    429: "The queue is full; see Retry-After",
    503: "The request took too long",
}
