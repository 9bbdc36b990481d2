"""serve: an HTTP server of embeddings."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path

from typer import Option

from onnxsim_embed.cli.inputs import ModelInputs

logger = logging.getLogger(__name__)


def serve(
    inputs: ModelInputs,
    host: str = Option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all of this machine."),
    port: int = Option(8080, min=0, max=65535, help="Port; 0 for a free one."),
    api_key_file: Path | None = Option(None, help="File with the key that requests must pass."),
    served_model_name: str | None = Option(None, help="Name of the model in requests."),
    max_batch_tokens: int = Option(16_384, min=1, help="Tokens of a model call."),
    max_queue: int = Option(4096, min=1, help="Texts that may wait; beyond: status 429."),
    max_texts: int = Option(2048, min=1, help="Texts of a request."),
    max_body: str = Option("8MiB", metavar="SIZE", help="Bytes of a request."),
    timeout: int = Option(60, min=1, help="Seconds for a body to arrive, and for an answer."),
) -> None:
    """Serve embeddings over HTTP, as OpenAI's API and text-embeddings-inference do.

    /docs lists the paths. SIGTERM and Ctrl-C end the server after it has answered the requests that it
    accepted.
    """
    from onnxsim_embed.serve import Limits, create_app, run
    from onnxsim_embed.system.units import parse_bytes

    limits = Limits(
        batch_tokens=max_batch_tokens, queue=max_queue, texts=max_texts,
        body_bytes=parse_bytes(max_body), seconds=timeout,
    )  # fmt: skip
    key = None if api_key_file is None else read_key(api_key_file)
    embedder = inputs.load()
    app = create_app(
        embedder, name=served_model_name, api_key=key, limits=limits,
        **inputs.encoding,
    )  # fmt: skip
    if key is None and not _is_loopback(host):
        logger.warning(
            "anyone who reaches %s may use this server: --api-key-file requires a key", host
        )

    def announce(url: str) -> None:
        name = app.state.service.names[0]
        inputs.say(
            f"Serving {name} ({embedder.precision}, {embedder.embedding_dimension} dimensions, "
            f"{embedder.threads} threads) at {url}; see {url}/docs. Ctrl-C ends it."
        )

    run(app, host, port, announce)


def read_key(path: Path) -> str:
    """Return the API key in a file."""
    lines = path.read_text(encoding="utf-8").split()
    if len(lines) != 1 or not lines[0].isascii():
        raise ValueError(
            f"--api-key-file {path} must hold one key: ASCII characters without spaces"
        )
    return lines[0]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
