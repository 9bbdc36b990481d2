"""An HTTP server of embeddings: the APIs of OpenAI and of text-embeddings-inference."""

from __future__ import annotations

from onnxsim_embed.errors import needs_extra

with needs_extra("onnxsim_embed.serve", "serve"):
    import prometheus_client  # noqa: F401
    import pydantic  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401

from onnxsim_embed.serve.app import create_app
from onnxsim_embed.serve.endpoint import Limits
from onnxsim_embed.serve.server import run

__all__ = ["Limits", "create_app", "run"]
