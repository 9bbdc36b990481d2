"""Tasks of a graph: a block compared with some others, and what the tasks of one block found put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from onnxsim_embed.files.checkpoint import write_errors
from onnxsim_embed.ray.blocks import BlockRows
from onnxsim_embed.ray.connection import ACTOR_SHARE, EXPECTED, nodes, pack, quiet, unpack
from onnxsim_embed.similarity.compare import TILE_BYTES
from onnxsim_embed.similarity.graph import shard_file
from onnxsim_embed.similarity.graph_writer import ADVICE, by_column, write_shard
from onnxsim_embed.similarity.memory import MEMORY_SHARE, PEAK_ENTRY_BYTES, PairCounter
from onnxsim_embed.similarity.out_of_core import AllPairs, concatenate_pairs
from onnxsim_embed.similarity.selection import RowPairs, top_k_of_rows
from onnxsim_embed.similarity.sparse import build_matrix, matrix_pairs
from onnxsim_embed.system.memory import available_memory


def piece_file(number: int, piece: int) -> str:
    """Return the name of the file of a task's pairs, where a block has several tasks."""
    return f"piece-{number:05d}-{piece:05d}.npz"


def run_each(
    tasks: list[dict[str, Any]], work: Callable[[Mapping[str, Any]], object]
) -> Iterator[Any]:
    """Run tasks on the cluster, one for each processor; yield what they return as they end."""
    import ray.data

    if not tasks:
        return
    ds = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    quiet(ds.context)
    for row in ds.map(_Told(work), num_cpus=ACTOR_SHARE).iter_rows():
        yield unpack(row["told"])


@dataclass(frozen=True)
class _Told:
    """A task whose errors are results."""

    work: Callable[[Mapping[str, Any]], object]

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Do the task."""
        try:
            return {"told": pack(self.work(task))}
        except EXPECTED as error:
            return {"told": pack(error)}


@dataclass(frozen=True)
class Compare:
    """Compares a block with a group of blocks, in tasks of Ray Data."""

    blocks: Sequence[Any]
    height: int
    columns: int
    rows: int
    width: int
    parts: Path
    k: int | None
    threshold: float
    most: int | None

    def __call__(self, task: Mapping[str, Any]) -> None:
        """Write the pairs of a task."""
        number, piece = int(task["part"]), int(task["piece"])
        rows = BlockRows(self.blocks, self.height, self.rows, self.width)
        pairs = AllPairs(rows, rows, TILE_BYTES)
        own = slice(number * self.height, min((number + 1) * self.height, self.rows))
        width = self.columns * self.height
        others = slice(piece * width, min((piece + 1) * width, self.rows))
        found: Iterator[RowPairs]
        if self.k is None:
            limit = PairCounter(_room(self.most), self.threshold, ADVICE)
            found = pairs.above(
                self.threshold, upper=True, rows=own, columns=others, on_pairs=limit
            )
        else:
            best = pairs.top_k(self.k, skip_self=True, rows=own, columns=others)
            found = map(by_column, best)
        name = shard_file(number) if task["alone"] else piece_file(number, piece)
        with write_errors(self.parts):
            write_shard(self.parts / name, build_matrix(found, self.rows))


def _room(most: int | None) -> int:
    """Return how many pairs fit into so many bytes, or into a task's share of this node's memory."""
    import ray

    if most is None:
        free = available_memory()
        if free is None:
            return int(np.iinfo(np.int64).max)
        here = ray.get_runtime_context().get_node_id()
        cpus = [node["Resources"].get("CPU", 1) for node in nodes() if node["NodeID"] == here]
        most = int(free * MEMORY_SHARE / max(1, *cpus, 1))
    return most // PEAK_ENTRY_BYTES


@dataclass(frozen=True)
class Merge:
    """Puts together what the tasks of one block wrote."""

    parts: Path
    rows: int
    k: int | None

    def __call__(self, task: Mapping[str, Any]) -> None:
        """Write a part, and drop its pieces."""
        number = int(task["part"])
        paths = [self.parts / piece_file(number, int(piece)) for piece in task["pieces"]]
        if not all(path.exists() for path in paths):
            return  # done before, by a worker that was lost then
        pieces = [sparse.csr_array(sparse.load_npz(path)) for path in paths]
        if self.k is None:
            found = concatenate_pairs([matrix_pairs(piece) for piece in pieces])
        else:
            height = pieces[0].shape[0]
            best = top_k_of_rows(
                np.hstack([piece.data.reshape(height, -1) for piece in pieces]),
                self.k,
                np.hstack([piece.indices.reshape(height, -1).astype(np.int64) for piece in pieces]),
            )
            found = by_column(best)
        with write_errors(self.parts):
            write_shard(self.parts / shard_file(number), build_matrix([found], self.rows))
        for path in paths:
            path.unlink(missing_ok=True)
