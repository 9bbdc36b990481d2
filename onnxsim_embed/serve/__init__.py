"""An HTTP server of embeddings: the APIs of OpenAI and of text-embeddings-inference."""

from __future__ import annotations

import socket
from collections.abc import Callable

from onnxsim_embed.errors import needs_extra

with needs_extra("onnxsim_embed.serve", "serve"):
    import prometheus_client  # noqa: F401
    import pydantic  # noqa: F401
    import uvicorn
    from starlette.applications import Starlette

from onnxsim_embed.serve.app import create_app
from onnxsim_embed.serve.endpoint import Limits

__all__ = ["Limits", "create_app", "run"]

# Connections beyond get status 503, so that the process does not run out of file descriptors (1,024
# on many systems).
CONNECTIONS = 900


def run(app: Starlette, host: str, port: int, on_start: Callable[[str], object]) -> None:
    """Serve an application until SIGTERM or SIGINT; accepted requests are answered before it returns.

    :param app: what `create_app` returned.
    :param host: address to listen on.
    :param port: port; 0 for a free one.
    :param on_start: called with the URL once connections are accepted.
    :raises OSError: if the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as listener:
        shown = f"[{host}]" if ":" in host else host
        on_start(f"http://{shown}:{listener.getsockname()[1]}")
        make_server(app).run(sockets=[listener])


def make_server(app: Starlette) -> uvicorn.Server:
    """Return the HTTP server of an application."""
    config = uvicorn.Config(
        app, lifespan="on", log_config=None, log_level="warning", access_log=False, ws="none",
        server_header=False, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2 * app.state.service.limits.seconds,
    )  # fmt: skip
    return uvicorn.Server(config)
