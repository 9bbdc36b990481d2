"""Similarity graphs on a cluster: each task compares a tile of rows with all tiles, and writes a shard.

Tiles are loaded into the object store once, and read in place by all tasks of a node. They change no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.checkpoint import write_errors
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.ray import connection
from onnxsim_embed.ray.tasks import plain_errors
from onnxsim_embed.ray.tiles import ObjectStoreRows, open_source
from onnxsim_embed.similarity import graph_writer, memory
from onnxsim_embed.similarity.compare import TILE_BYTES
from onnxsim_embed.similarity.graph import GraphShard, SimilarityGraph, open_graph, shard_file
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import UnitRows
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.memory import available_memory
from onnxsim_embed.system.progress import progress_bar
from onnxsim_embed.system.units import check_integer

# Rows of a tile: with fewer, products are slow; with more, tasks are hard to balance (25 to 100 MB at dim 384).
MIN_TILE_ROWS, MAX_TILE_ROWS = 2048, 65536

# Tasks for each processor, so that the last ones leave none idle for long.
TASKS_PER_CPU = 8


def write_graph(
    vectors: npt.ArrayLike | str | Path,
    directory: str | Path,
    *,
    threshold: float | None = None,
    k: int | None = None,
    include_self: bool = True,
    max_memory: int | None = None,
    address: str | None = None,
    block_rows: int | None = None,
    show_progress_bar: bool = False,
    force: bool = False,
) -> SimilarityGraph:
    """Compare all rows of a set with each other on a Ray cluster, and write the similarity graph shard by shard.

    Entries and scores are bitwise those of `onnxsim_embed.write_graph`, whatever the cluster; as there, the same
    call continues after an interruption, and the directory appears when the graph is complete.

    :param vectors: a directory that `encode_files` wrote (path or URI), a .npy file that every node sees, or an
        array (n, dim).
    :param directory: path that every node sees.
    :param max_memory: maximum bytes for the pairs that one task finds; None for its share of the free memory
        of its node.
    :param address: of a cluster; None for the open connection, RAY_ADDRESS, or a new one on this machine.
    :param block_rows: rows compared at a time; None chooses by the number of rows and processors. A run that
        continues keeps its own. For threshold, k, include_self, show_progress_bar and force, and for the
        exceptions, see `onnxsim_embed.write_graph`.
    :raises OnnxsimEmbedError: if a node does not see a path, or the cluster cannot be reached.
    """
    checkpoint = graph_writer.GraphCheckpoint(Path(directory))
    if block_rows is not None:
        block_rows = check_integer("block_rows", block_rows)
    max_bytes = None if max_memory is None else memory.MemoryBudget(max_memory).max_bytes
    connection.require_ray()
    source = open_source(vectors)
    rows = source.shape[0]
    settings = graph_writer.graph_settings(rows, threshold, k, include_self)
    checkpoint.check_target(force, settings)
    settings["vectors"] = source.digest()
    if (finished := checkpoint.check_target(force, settings)) is not None:
        return finished
    with checkpoint, connection.cluster(address), plain_errors():
        journal = checkpoint.resume(settings, force)
        path = source.vectors if isinstance(source.vectors, str) else None
        connection.check_shared(Directory(checkpoint.directory), path)
        if journal is None:
            tile_rows = block_rows or _tile_rows(rows, sum(connection.cluster_cpus()))
            checkpoint.record(part_rows=tile_rows, columns=1)  # columns: marks a run of this engine
        elif "columns" in journal:
            tile_rows = journal["part_rows"]
        else:
            raise ValueError(
                f"{checkpoint.target} has an unfinished run of onnxsim_embed.write_graph: finish it there, "
                "or start over with force=True"
            )
        tiles = source.tiles(tile_rows)
        comparison = Comparison(
            tiles, source.shape, tile_rows, checkpoint.shards, settings["threshold"], settings["k"], max_bytes
        )  # fmt: skip
        shards = comparison.write_missing(show_progress_bar)
        checkpoint.finish(shards, None if threshold is None else _diagonal(tiles, threshold))
    return open_graph(checkpoint.target)


def _tile_rows(rows: int, cpus: float) -> int:
    balanced = min(
        -(-rows // (max(1, int(cpus)) * TASKS_PER_CPU)), graph_writer.SHARD_PAIRS // max(1, rows)
    )
    return min(max(balanced, MIN_TILE_ROWS), MAX_TILE_ROWS)


def _diagonal(tiles: Sequence[Any], threshold: float) -> Float32:
    """Return each row's score with itself, NaN if it does not exceed the threshold."""
    import ray

    task = ray.remote(max_retries=-1)(lambda tile: UnitRows(tile).diagonal(threshold))
    scores = [task.remote(tile) for tile in tiles]
    return np.concatenate([np.zeros(0, np.float32), *ray.get(scores)])


@dataclass(frozen=True)
class Comparison:
    """The comparison of all tiles, of which a task does one row of tiles.

    :param shards: directory of the shards.
    :param max_bytes: for the pairs of a task; None for its share of the free memory of its node.
    """

    tiles: Sequence[Any]
    shape: tuple[int, int]
    tile_rows: int
    shards: Path
    threshold: float | None
    k: int | None
    max_bytes: int | None

    def write_missing(self, show_progress_bar: bool) -> list[GraphShard]:
        """Return all shards, after writing those that do not exist."""
        import ray

        shards = {number: self.read(number) for number in range(len(self.tiles))}
        missing = [number for number, shard in shards.items() if shard is None]
        write = ray.remote(num_cpus=connection.ACTOR_SHARE, max_retries=-1)(Comparison.write)
        comparison = ray.put(self)
        tasks = [write.remote(comparison, number) for number in missing]
        with progress_bar(
            desc="Comparing", unit=" tiles", total=len(shards), initial=len(shards) - len(tasks),
            disable=not show_progress_bar,
        ) as bar:  # fmt: skip
            try:
                while tasks:
                    done, tasks = ray.wait(tasks)
                    ray.get(done)
                    bar.update(1)
            finally:
                for task in tasks:
                    ray.cancel(task)
        for path in self.shards.glob("piece-*.npz"):  # of a run of version 0.1.0
            path.unlink()
        shards |= {number: self.read(number) for number in missing}
        complete = [shard for shard in shards.values() if shard is not None]
        if len(complete) < len(shards):
            raise TableError(f"{self.shards}: shards were not written; repeat the call")
        return complete

    def read(self, number: int) -> GraphShard | None:
        """Return a shard; None if it is missing or damaged."""
        first = number * self.tile_rows
        rows = min(self.tile_rows, self.shape[0] - first)
        path = self.shards / shard_file(number)
        pointers = graph_writer.row_pointers(path, rows)
        if pointers is None or len(pointers) - 1 != rows:
            return None
        return GraphShard(path.name, first, rows, int(pointers[-1]))

    def write(self, number: int) -> None:
        """Write a shard; a task."""
        units = ObjectStoreRows(self.tiles, self.tile_rows, self.shape)
        pairs = AllPairs(units, units, TILE_BYTES)
        first = number * self.tile_rows
        rows = slice(first, min(first + self.tile_rows, self.shape[0]))
        columns = slice(0, self.shape[0])
        if self.threshold is not None:
            max_pairs = _max_entries(self.max_bytes)
            counter = memory.pair_counter(max_pairs, self.threshold, graph_writer.ADVICE)
            found = pairs.above(
                self.threshold, upper=True, rows=rows, columns=columns, on_pairs=counter
            )
        else:
            best = pairs.top_k(int(self.k or 0), skip_self=True, rows=rows, columns=columns)
            found = iter([graph_writer.by_column(best)])
        with write_errors(self.shards):
            graph_writer.write_shard(
                self.shards / shard_file(number), build_matrix(found, self.shape[0])
            )


def _max_entries(max_bytes: int | None) -> int:
    """Return how many pairs fit in some bytes, or in a task's share of the free memory of this node."""
    import ray

    if max_bytes is None:
        here = ray.get_runtime_context().get_node_id()
        cpus = [
            node["Resources"].get("CPU", 1) for node in connection.nodes() if node["NodeID"] == here
        ]
        max_bytes = int(available_memory() * memory.MEMORY_SHARE / max(1, *cpus, 1))
    return max_bytes // memory.PEAK_ENTRY_BYTES
