"""Tasks and actors of Ray Data whose expected errors reach the caller as they were raised."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnxsim_embed.errors import OnnxsimEmbedError

# What a task may raise because of its input. It is returned as a result, because Ray Data wraps exceptions in
# pages of its own text.
EXPECTED = (OnnxsimEmbedError, ValueError, TypeError, OSError, MemoryError)


def pack(result: object) -> bytes:
    """Return a result, or an error in its place, as a row of a dataset holds it."""
    try:
        content = pickle.dumps(result)
        if isinstance(result, BaseException):
            pickle.loads(content)
    except Exception:  # an exception whose arguments are not its message
        if not isinstance(result, BaseException):
            raise
        content = pickle.dumps(OnnxsimEmbedError(str(result)))
    return content


def unpack(content: bytes) -> Any:  # noqa: ANN401 - whatever was packed
    """Return a packed result, or raise a packed error."""
    result = pickle.loads(content)
    if isinstance(result, BaseException):
        raise result
    return result


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what a task raised, or one line that says what is wrong with the cluster."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, EXPECTED):
            raise error.cause from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise OnnxsimEmbedError(f"Ray: {(lines or [type(error).__name__])[-1]}") from error


def actor_pool(context: Any, count: int) -> Any:  # noqa: ANN401 - Ray Data's DataContext and ActorPoolStrategy
    """Return a pool of actors that continues with fewer after the loss of a node.

    An actor that dies while it loads is replaced, a few times. An actor has one shard and the next: with Ray's
    default of more, a small object store spills to disk.
    """
    from ray.data import ActorPoolStrategy

    context.max_consecutive_actor_init_deaths = 3
    return ActorPoolStrategy(
        min_size=1, max_size=count, initial_size=count, max_tasks_in_flight_per_actor=2
    )
