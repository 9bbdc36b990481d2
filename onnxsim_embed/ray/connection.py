"""Connect to a Ray cluster or start one, and plan how actors share its processors.

Ray Data waits forever if actors reserve all processors, because its readers and writers need some. So an actor
reserves nine tenths of each processor that its threads use, and our own readers very little. Beside Ray's own
readers and writers, which reserve a whole processor each, actors leave one processor of each node free.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxsim_embed.errors import OnnxsimEmbedError, check_packages
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.uris import is_uri
from onnxsim_embed.ray import encoder
from onnxsim_embed.system.hardware import available_cpus

if TYPE_CHECKING:
    from onnxsim_embed.ray.encoder import RowOptions

# Processors that an actor reserves for each of its threads, and a task that reads texts or loads vectors.
ACTOR_SHARE = 0.9
READER_SHARE = 0.05
LOADER_SHARE = 0.1

CONNECT_SECONDS = 10

# The threads of an actor share one copy of the model; with more of them, actors fit on fewer nodes.
MAX_THREADS = 4


def require_ray() -> None:
    """Raise MissingExtraError if Ray Data is not installed; usage statistics stay off unless the user set them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    parts = ("ray", "pandas", "pyarrow")  # what ray[data] consists of
    check_packages("onnxsim_embed.ray", "ray", dict.fromkeys(parts, "ray[data]"))


@contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Connect to a Ray cluster for the block, or start one on this machine; an open connection is used as it is.

    :param address: of a cluster, "auto" for the one that runs on this machine; None for RAY_ADDRESS, else a
        new cluster.
    :raises OnnxsimEmbedError: if there is no cluster at the address.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    _check_reachable(address)
    options: dict[str, Any] = {"address": address}
    if not address:  # with the processors that this process may use, which containers limit
        cpus = max(1, available_cpus())
        options = {"address": "local", "include_dashboard": False, "num_cpus": cpus}
    # Else Ray's core prints a warning for each pool of actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        action = f"connect to a Ray cluster at {address}" if address else "start Ray"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OnnxsimEmbedError(f"cannot {action}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise OnnxsimEmbedError if nothing listens at an address: Ray itself would try for ten minutes."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise OnnxsimEmbedError(
            f"cannot connect to a Ray cluster at {address}: {error}; is it running (ray start --head)?"
        ) from None


@dataclass(frozen=True)
class Actors:
    """Size of an actor pool: threads of an actor, maximum number of actors, processors that each reserves."""

    threads: int
    count: int
    cpus: float


def plan_actors(
    nodes: list[float], threads: int | None = None, count: int | None = None, *, spare: int = 0
) -> Actors:
    """Return actors that use every processor of every node, and reserve fewer.

    :param nodes: processors of each node.
    :param threads: of each actor; None for the number up to 4 that leaves the fewest processors idle.
    :param count: number of actors; None for all that fit.
    :param spare: processors of each node to leave unreserved, for tasks that reserve whole ones.
    :raises ValueError: if no node has that many processors.
    """

    def fitting(size: int) -> int:
        return sum(int(cpus) // size for cpus in nodes)

    if threads is None:
        threads = max(range(1, MAX_THREADS + 1), key=lambda size: (fitting(size) * size, size))
    if fitting(threads) < 1:
        largest = max(nodes, default=0)
        raise ValueError(f"no node has {threads} CPUs for an actor; the largest has {largest:g}")
    free = [(cpus - spare) / (int(cpus) // threads) for cpus in nodes if cpus >= threads]
    reserved = max(0.0, min(ACTOR_SHARE * threads, *free, math.inf))
    return Actors(threads, count or fitting(threads), math.floor(reserved * 1000) / 1000)


def nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive and have processors."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def cluster_cpus() -> list[float]:
    """Return the processors of each node that has any."""
    return [float(node["Resources"]["CPU"]) for node in nodes()]


def ask_nodes(function: Callable[..., Any], *arguments: object) -> list[tuple[str, Any]]:
    """Return the address of each node, several of which may be equal, and what the function returns there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    answers = []
    for node in nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        answer = task.options(scheduling_strategy=there).remote(*arguments)
        answers.append((node["NodeManagerAddress"], answer))
    return [(address, ray.get(answer)) for address, answer in answers]


def check_nodes(options: RowOptions) -> None:
    """Raise OnnxsimEmbedError, naming the node, if one would compute other vectors than the driver."""
    for address, facts in ask_nodes(encoder.node_facts):
        options.check_node(address, facts)


def check_shared(directory: Directory, readable: str | None = None) -> None:
    """Raise OnnxsimEmbedError, naming node and path, if a node does not see a directory or an input."""
    local = directory.local
    if local is None and (readable is None or is_uri(readable)):
        return
    probe = f".probe-{os.getpid()}"
    created = local if local is not None and not local.exists() else None
    directory.write(probe, b"")
    try:
        for address, missing in ask_nodes(_sees, directory, probe, readable):
            if missing is not None:
                raise OnnxsimEmbedError(
                    f"node {address} does not see {missing}: use a path that all nodes share, or a URI "
                    "such as s3://bucket/directory"
                )
    finally:
        directory.delete(probe)
        if created is not None:
            created.rmdir()


def _sees(directory: Directory, probe: str, readable: str | None) -> str | None:
    """Return what this node does not see."""
    if probe not in directory.names():
        return str(directory)
    seen = readable is None or is_uri(readable) or os.path.exists(readable)
    return None if seen else readable
