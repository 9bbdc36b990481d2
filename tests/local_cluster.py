"""A Ray cluster of several nodes on this machine, whose processes tests may kill."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

# Titles that Ray gives the processes of its workers.
WORKER = "ray::"
ACTOR = "ShardEncoder"
LOADING = "ShardEncoder)).__init__"
MB = 1 << 20


class LocalCluster:
    """Nodes on loopback, each with processes and an object store of its own; the first is the driver's.

    :param cpus: of each node.
    :param store: bytes of each node's object store.
    """

    def __init__(self, *cpus: float, store: int = 150 * MB) -> None:
        self._store = store
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**self._arguments(cpus[0]), "include_dashboard": False},
        )
        self.others = [self.add(count) for count in cpus[1:]]

    def _arguments(self, cpus: float) -> dict[str, Any]:
        return {"num_cpus": cpus, "object_store_memory": self._store}

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self, cpus: float = 1) -> Any:
        return self._cluster.add_node(**self._arguments(cpus))

    def lose(self, node: Any) -> None:
        """End all processes of a node at once, as when its machine fails."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.others = [other for other in self.others if other is not node]

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def workers(title: str) -> list[psutil.Process]:
    """Return the worker processes started by this one whose title holds some words."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name = " ".join(process.cmdline())
            if name.startswith(WORKER) and title in name:
                found.append(process)
    return found


@contextmanager
def repeated(function: Callable[[], bool], seconds: float) -> Iterator[list[Exception]]:
    """Call a function again and again in a thread while the block runs, until it returns True.

    Yields the list of what it raised.
    """
    over, errors = threading.Event(), []

    def repeat() -> None:
        while not over.wait(seconds):
            try:
                if function():
                    return
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        over.set()
        thread.join()


@contextmanager
def meanwhile(ready: Callable[[], Any], act: Callable[[Any], object]) -> Iterator[None]:
    """While the block runs, wait until there is something, and do something with it, once.

    Fails if it was never there.
    """
    acted = False

    def watch() -> bool:
        nonlocal acted
        if found := ready():
            act(found)
            acted = True
        return acted

    with repeated(watch, 0.01) as errors:
        yield
    if errors:
        raise errors[0]
    assert acted, "the run ended before there was anything to kill"


def count(directory: Path, pattern: str) -> int:
    return len(list(directory.glob(pattern)))


@dataclass
class Use:
    """The most memory of a worker, and disk of an object store, that a node used while a block ran, in bytes.

    :param largest: of one worker, without what it shares, and so without the object store.
    """

    largest: int = 0
    spilled: int = 0
    samples: int = 0

    def sample(self) -> bool:
        for worker in workers(""):
            with suppress(psutil.Error):
                self.largest = max(self.largest, worker.memory_full_info().uss)
        if ray.is_initialized():
            session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
            files = session.glob("ray_spilled_objects*/**/*")
            with suppress(OSError):  # a file that is gone
                self.spilled = max(self.spilled, sum(path.stat().st_size for path in files))
            self.samples += 1
        return False


@contextmanager
def watched() -> Iterator[Use]:
    """Sample the use of memory while the block runs."""
    use = Use()
    with repeated(use.sample, 0.2) as errors:  # errors: the driver has just disconnected
        yield use
    assert use.samples > 5, errors[-1:]
