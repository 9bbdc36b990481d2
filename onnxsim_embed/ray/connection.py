"""The cluster: connecting to one or starting one, and how its processors are shared out.

An engine's readers and writers need processors too, and Ray Data waits for ever where actors have reserved them
all. So an actor reserves nine tenths of each processor that its threads use, and our own readers very little. Beside
Ray's readers and writers, which reserve a whole processor each, actors leave one whole processor of each node.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxsim_embed.errors import MissingExtraError, OnnxsimEmbedError
from onnxsim_embed.files.uris import is_uri
from onnxsim_embed.system.hardware import available_cpus

if TYPE_CHECKING:
    from onnxsim_embed.files.locations import Directory

# What an actor reserves of each processor that it uses, and a task that reads or writes.
ACTOR_SHARE = 0.9
READER_SHARE = 0.05
LOADER_SHARE = 0.1

CONNECT_SECONDS = 10

# One actor's threads share one copy of the model; more than these only make actors hard to place.
MOST_THREADS = 4


def require_ray() -> None:
    """Raise MissingExtraError where Ray Data is not installed.

    Ray sends no usage statistics unless RAY_USAGE_STATS_ENABLED is set.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for package in ("ray", "pandas", "pyarrow"):  # those that ray[data] consists of
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("--engine ray", "ray", "ray[data]")


@contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Connect to a cluster for a while, or start one on this machine; use the one that is connected already.

    :param address: of a cluster, "auto" for the one that runs here, or None for RAY_ADDRESS, else a new one.
    :raises OnnxsimEmbedError: if there is none at the address.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    _check_reachable(address)
    # A new one takes the processors that this process may use, which containers limit.
    here: dict[str, Any] = {} if address else {"num_cpus": max(1, available_cpus())}
    try:
        with _calm_start():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **here,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f"connect to a Ray cluster at {address}" if address else "start Ray on this machine"
        raise OnnxsimEmbedError(f"cannot {where}: {told}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Refuse an address at which nothing listens: Ray would try for ten minutes.

    :raises OnnxsimEmbedError: naming it.
    """
    host, found, port = (address or "").rpartition("://")[2].rpartition(":")
    if not found:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise OnnxsimEmbedError(
            f"cannot connect to a Ray cluster at {address}: {error}; is it running (ray start --head)?"
        ) from None


@contextmanager
def _calm_start() -> Iterator[None]:
    """Keep off the terminal a line that Ray's core prints for every pool of actors, and for being told not to.

    Where the level of its log is set already, it is left as it is.
    """
    if "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


@dataclass(frozen=True)
class Actors:
    """The actors of a run.

    :param threads: batches that one encodes at the same time.
    :param count: how many there are at most.
    :param cpus: processors that one reserves.
    """

    threads: int
    count: int
    cpus: float


def plan_actors(
    nodes: list[float], threads: int | None = None, count: int | None = None, *, spare: int = 0
) -> Actors:
    """Return actors that use every processor of every node, and reserve fewer.

    :param nodes: processors of each node.
    :param threads: of each actor; None for the most, up to 4, that leave the fewest processors idle.
    :param count: actors; None for as many as there is room for.
    :param spare: processors of each node that stay unreserved, for tasks that reserve whole ones.
    :raises ValueError: if no node has so many processors.
    """

    def room(size: int) -> int:
        return sum(int(cpus) // size for cpus in nodes)

    if threads is None:
        threads = max(range(1, MOST_THREADS + 1), key=lambda size: (room(size) * size, size))
    if room(threads) < 1:
        largest = max(nodes, default=0)
        raise ValueError(f"no node has {threads} CPUs for an actor; the largest has {largest:g}")
    free = [(cpus - spare) / (int(cpus) // threads) for cpus in nodes if cpus >= threads]
    reserved = max(0.0, min(ACTOR_SHARE * threads, *free, math.inf))
    return Actors(threads, count or room(threads), math.floor(reserved * 1000) / 1000)


def nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def cpus_of(found: list[dict[str, Any]]) -> list[float]:
    """Return the processors of each node that has any."""
    counts = [float(node["Resources"].get("CPU", 0)) for node in found]
    return [count for count in counts if count]


def check_shared(storage: Directory, readable: str | None = None) -> None:
    """Refuse a directory, or an input, that some node does not see.

    :param readable: path of an input.
    :raises OnnxsimEmbedError: naming the node and the path.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if storage.local is None and (readable is None or is_uri(readable)):
        return
    probe = f".probe-{os.getpid()}"
    made = storage.local if storage.local is not None and not storage.local.exists() else None
    storage.write(probe, b"")
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_sees)
        asked = [  # nodes may share an address
            (
                node["NodeManagerAddress"],
                look.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
                ).remote(storage, probe, readable),
            )
            for node in nodes()
        ]
        for address, answer in asked:
            if (missing := ray.get(answer)) is not None:
                raise OnnxsimEmbedError(
                    f"node {address} does not see {missing}: give a path that all nodes share, or a URI "
                    "such as s3://bucket/directory"
                )
    finally:
        storage.delete(probe)
        if made is not None:
            made.rmdir()


def _sees(storage: Directory, probe: str, readable: str | None) -> str | None:
    if probe not in storage.names():
        return str(storage)
    if readable is not None and not is_uri(readable) and not os.path.exists(readable):
        return readable
    return None


# What a task of ours may raise because of its input: told to the driver as a result, which the engine
# hands on as it is, while of an exception it leaves a page of its own words.
EXPECTED = (OnnxsimEmbedError, ValueError, TypeError, OSError, MemoryError)


def pack(result: object) -> bytes:
    """Return a result, or an error in its place, as a row of a dataset holds it."""
    from ray.exceptions import RayTaskError

    if not isinstance(result, BaseException):
        return pickle.dumps(result)
    if isinstance(result, RayTaskError) and isinstance(result.cause, Exception):
        result = result.cause  # of a task that this one waited for
    try:
        data = pickle.dumps(result)
        pickle.loads(data)
    except Exception:  # an exception that takes other arguments than its message
        data = pickle.dumps(OnnxsimEmbedError(str(result)))
    return data


def unpack(data: bytes) -> Any:  # noqa: ANN401 - whatever was packed
    """Return what was packed.

    :raises BaseException: what a task raised.
    """
    result = pickle.loads(data)
    if isinstance(result, BaseException):
        raise result
    return result


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what a task raised, or what is wrong with the cluster in a line."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, EXPECTED):
            raise error.cause from error
        raise OnnxsimEmbedError(f"Ray: {_last_line(error)}") from error
    except RayError as error:
        raise OnnxsimEmbedError(f"Ray: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def replace_actors(context: Any) -> None:  # noqa: ANN401 - Ray Data's DataContext
    """Replace an actor that dies while it loads, a few times."""
    context.max_consecutive_actor_init_deaths = 3


def quiet(context: Any) -> None:  # noqa: ANN401 - Ray Data's DataContext
    """Set what every dataset of ours needs: no bars and lines of Ray's, one part a block, and patience."""
    replace_actors(context)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
