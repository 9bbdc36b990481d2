"""Similarity graphs on a cluster: each task compares a tile of rows with all tiles, and writes a shard.

Tiles are loaded into the object store once, and read in place by all tasks of a node. They change no score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.checkpoint import write_errors
from onnxsim_embed.files.locations import Directory, absolute
from onnxsim_embed.files.uris import is_uri
from onnxsim_embed.files.vector_directory import VectorDirectory, is_vector_directory, open_vectors
from onnxsim_embed.files.vectors import read_vectors
from onnxsim_embed.ray import connection
from onnxsim_embed.ray.tasks import plain_errors
from onnxsim_embed.similarity import graph_writer, memory
from onnxsim_embed.similarity.compare import TILE_BYTES
from onnxsim_embed.similarity.graph import GraphShard, SimilarityGraph, open_graph, shard_file
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import TiledRows, UnitRows, check_vectors, unit_vectors
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.memory import available_memory
from onnxsim_embed.system.progress import progress_bar
from onnxsim_embed.system.units import check_integer

# Rows of a tile: with fewer, products are slow; with more, tasks are hard to balance (25 to 100 MB at dim 384).
MIN_TILE_ROWS, MAX_TILE_ROWS = 2048, 65536

# Tasks for each processor, so that the last ones leave none idle for long.
TASKS_PER_CPU = 8

# An array, a directory of shards, or the path of a .npy file.
Source: TypeAlias = npt.NDArray[Any] | VectorDirectory | str


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
    source, shape, digest = _open_source(vectors)
    settings = graph_writer.graph_settings(shape[0], threshold, k, include_self)
    checkpoint.check_target(force, settings)
    settings["vectors"] = digest()
    if (finished := checkpoint.check_target(force, settings)) is not None:
        return finished
    with checkpoint, connection.cluster(address), plain_errors():
        journal = checkpoint.resume(settings, force)
        connection.check_shared(
            Directory(checkpoint.directory), source if isinstance(source, str) else None
        )
        if journal is None:
            tile_rows = block_rows or _tile_rows(shape[0], sum(connection.cluster_cpus()))
            checkpoint.record(part_rows=tile_rows, columns=1)  # columns: marks a run of this engine
        elif "columns" in journal:
            tile_rows = journal["part_rows"]
        else:
            raise ValueError(
                f"{checkpoint.target} has an unfinished run of onnxsim_embed.write_graph: finish it there, "
                "or start over with force=True"
            )
        tiles = _load_tiles(source, shape[0], tile_rows)
        comparison = Comparison(
            tiles, shape, tile_rows, checkpoint.shards, settings["threshold"], settings["k"], max_bytes
        )  # fmt: skip
        shards = comparison.write_missing(show_progress_bar)
        checkpoint.finish(shards, None if threshold is None else _diagonal(tiles, threshold))
    return open_graph(checkpoint.target)


def _tile_rows(rows: int, cpus: float) -> int:
    balanced = min(
        -(-rows // (max(1, int(cpus)) * TASKS_PER_CPU)), graph_writer.SHARD_PAIRS // max(1, rows)
    )
    return min(max(balanced, MIN_TILE_ROWS), MAX_TILE_ROWS)


def _open_source(
    vectors: npt.ArrayLike | str | Path,
) -> tuple[Source, tuple[int, int], Callable[[], str]]:
    """Return vectors as tasks load them, their shape, and what computes their digest.

    :raises FileNotFoundError: if there is no such file or directory.
    :raises ValueError: for an invalid array, or another kind of file.
    """
    source: Source
    if not isinstance(vectors, (str, Path)):
        source = array = np.asarray(vectors)
    elif is_uri(vectors) or is_vector_directory(vectors):
        stored = open_vectors(vectors)
        return stored, (stored.rows, stored.dim), lambda: stored.digest
    else:
        source = absolute(vectors)
        if Path(source).exists() and not source.endswith(".npy"):
            raise ValueError(
                f"{source}: expected a directory that onnxsim_embed.ray.encode_files wrote, or a .npy file"
            )
        array = read_vectors(source)
    check_vectors(array)
    return source, (len(array), array.shape[1]), lambda: graph_writer.digest(array)


def _load_tiles(source: Source, rows: int, tile_rows: int) -> list[Any]:
    """Return references to the unit rows of each tile."""
    import ray

    # With so small a share, a tile that was lost with a node is loaded again even while tasks that wait
    # for it occupy all processors.
    load = ray.remote(num_cpus=connection.LOADER_SHARE, max_retries=-1)(_load)
    reference = ray.put(source)
    parallel = max(1, int(sum(connection.cluster_cpus())))
    tiles: list[Any] = []
    loading: list[Any] = []
    for start in range(0, rows, tile_rows):
        if len(loading) == parallel:  # as each loads in a process of its own
            _, loading = ray.wait(loading, fetch_local=False)
        tiles.append(load.remote(reference, start, min(start + tile_rows, rows)))
        loading.append(tiles[-1])
    return tiles


def _load(source: Source, start: int, stop: int) -> Float32:
    """Return the unit rows of a tile; a task."""
    if isinstance(source, VectorDirectory):
        return unit_vectors(source.read(start, stop), first_row=start)
    array = read_vectors(source) if isinstance(source, str) else source
    return unit_vectors(array[start:stop], first_row=start)


class ObjectStoreRows(TiledRows):
    """Unit rows in the object store, by a reference to each tile."""

    def __init__(self, tiles: Sequence[Any], tile_rows: int, shape: tuple[int, int]) -> None:
        super().__init__(*shape, tile_rows)
        self._tiles = tiles

    def load(self, rows: slice) -> Float32:
        """Return a tile, float32 (rows, dim), without a copy if it is on this node."""
        import ray

        tile: Float32 = ray.get(self._tiles[rows.start // self.tile_rows])
        return tile


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
        write = ray.remote(num_cpus=connection.ACTOR_SHARE, max_retries=-1)(Comparison.write)
        comparison = ray.put(self)
        missing = [number for number, shard in shards.items() if shard is None]
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
        # Read here: a node may have written to a directory of its own.
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
        if self.threshold is not None:
            max_pairs = _max_entries(self.max_bytes)
            counter = memory.pair_counter(max_pairs, self.threshold, graph_writer.ADVICE)
            found = pairs.above(self.threshold, upper=True, rows=rows, on_pairs=counter)
        else:
            best = pairs.top_k(int(self.k or 0), skip_self=True, rows=rows)
            found = iter([graph_writer.by_column(best)])
        matrix = build_matrix(found, self.shape[0])
        path = self.shards / shard_file(number)
        with write_errors(self.shards):
            graph_writer.write_shard(path, matrix)


def _max_entries(max_bytes: int | None) -> int:
    """Return how many pairs fit in some bytes, or in a task's share of the free memory of this node."""
    import ray

    if max_bytes is None:
        here = ray.get_runtime_context().get_node_id()
        cpus = {node["NodeID"]: node["Resources"]["CPU"] for node in connection.nodes()}
        max_bytes = int(available_memory() * memory.MEMORY_SHARE / max(1, cpus.get(here, 1)))
    return max_bytes // memory.PEAK_ENTRY_BYTES
