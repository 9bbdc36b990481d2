"""Similarity graphs on a cluster: tiles of pairs as tasks, over unit rows in the object store.

Each tile of rows is loaded into the object store once, and read in place by all tasks of a node. A task compares
one tile of rows with a group of tiles of columns, on or beyond the diagonal for a threshold, and writes the
pairs. If a tile of rows has several tasks, they write partial shards, which are merged at the end. The tiles
change nothing about scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.checkpoint import write_errors
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.ray.connection import check_shared, cluster, cluster_cpus, nodes, require_ray
from onnxsim_embed.ray.tasks import plain_errors, run_each
from onnxsim_embed.ray.tiles import ObjectStoreRows, diagonal_of, open_source
from onnxsim_embed.similarity.compare import TILE_BYTES
from onnxsim_embed.similarity.graph import GraphShard, SimilarityGraph, open_graph, shard_file
from onnxsim_embed.similarity.graph_writer import (
    ADVICE,
    SHARD_PAIRS,
    GraphCheckpoint,
    by_column,
    graph_settings,
    row_pointers,
    write_shard,
)
from onnxsim_embed.similarity.memory import (
    MEMORY_SHARE,
    PEAK_ENTRY_BYTES,
    MemoryBudget,
    pair_counter,
)
from onnxsim_embed.similarity.out_of_core import AllPairs, concatenate_pairs
from onnxsim_embed.similarity.selection import RowPairs, top_k_of_rows
from onnxsim_embed.similarity.sparse import build_matrix, matrix_pairs
from onnxsim_embed.system.memory import available_memory
from onnxsim_embed.system.progress import progress_bar

Float32 = npt.NDArray[np.float32]

# Rows of a tile: with fewer, products are slow; with more, tasks are hard to balance (25 to 100 MB at dim 384).
MIN_TILE_ROWS, MAX_TILE_ROWS = 2048, 65536

# Tasks for each processor, so that the last ones leave none idle for long; a task of fewer pairs than these is
# not worth its start.
TASKS_PER_CPU = 8
MIN_TASK_PAIRS = 1 << 24


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
    :param threshold: keep scores strictly above it, from -1 to 1.
    :param k: keep the top k other rows of each row, instead of a threshold.
    :param include_self: keep the diagonal (with a threshold).
    :param max_memory: maximum bytes for the pairs that one task finds; None for its share of the free memory
        of its node.
    :param address: of a cluster; None for the open connection, RAY_ADDRESS, or a new one on this machine.
    :param block_rows: rows compared at a time; None chooses by the number of rows and processors. A run that
        continues keeps its own.
    :param show_progress_bar: show a progress bar on standard error.
    :param force: start over, and replace a graph that exists.
    :raises ValueError: as `onnxsim_embed.write_graph`, as are the next three.
    :raises FileExistsError: if the directory exists.
    :raises FileNotFoundError: if there are no such vectors, or the parent directory does not exist.
    :raises TableError: if another process writes the graph, or a file is damaged.
    :raises MemoryError: if one task finds more pairs than fit.
    :raises OnnxsimEmbedError: if a node does not see a path, or the cluster cannot be reached.
    """
    checkpoint = GraphCheckpoint(Path(directory))
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows must be positive, got {block_rows}")
    max_bytes = None if max_memory is None else MemoryBudget(max_memory).max_bytes
    checkpoint.check_target(force)
    require_ray()
    source = open_source(vectors)
    rows = source.shape[0]
    settings = graph_settings(rows, threshold, k, include_self, source.digest)
    with checkpoint, cluster(address), plain_errors():
        journal = checkpoint.resume(settings, force)
        check_shared(Directory(checkpoint.directory), source.path)
        if journal is None:
            journal = _plan(rows, sum(cluster_cpus()), k is None, block_rows)
            checkpoint.record(**journal)
        elif "columns" not in journal:
            raise ValueError(
                f"{checkpoint.target} has an unfinished run of onnxsim_embed.write_graph (without --engine "
                "ray): finish it there, or start over with force=True"
            )
        tiles = source.tiles(journal["part_rows"])
        comparison = Comparison(
            tiles, source.shape, journal["part_rows"], journal["columns"], checkpoint.shards,
            settings["threshold"], settings["k"], max_bytes,
        )  # fmt: skip
        shards = comparison.write_missing(show_progress_bar)
        checkpoint.finish(shards, None if threshold is None else _diagonal(tiles, threshold))
    return open_graph(checkpoint.target)


def _plan(rows: int, cpus: float, upper: bool, block_rows: int | None) -> dict[str, int]:
    """Return the rows of a tile, and the number of tiles of columns that a task compares it with."""
    tasks = max(1, int(cpus)) * TASKS_PER_CPU
    tile_rows = block_rows or min(max(-(-rows // tasks), MIN_TILE_ROWS), MAX_TILE_ROWS)
    tiles = -(-rows // tile_rows)
    pairs = rows * rows // (2 if upper else 1)
    task_pairs = min(max(pairs // tasks, MIN_TASK_PAIRS), SHARD_PAIRS)
    columns = min(max(1, task_pairs // (tile_rows * tile_rows)), max(1, tiles))
    return {"part_rows": tile_rows, "columns": columns}


def _diagonal(tiles: Sequence[Any], threshold: float) -> Float32:
    import ray

    task = ray.remote(max_retries=-1)(diagonal_of)
    scores = [task.remote(tile, threshold) for tile in tiles]
    return np.concatenate([np.zeros(0, np.float32), *ray.get(scores)])


@dataclass(frozen=True)
class Comparison:
    """The comparison of all tiles, of which tasks do a part each.

    :param columns: tiles of columns of a task.
    :param shards: directory of the shards.
    :param max_bytes: for the pairs of a task; None for its share of the free memory of its node.
    """

    tiles: Sequence[Any]
    shape: tuple[int, int]
    tile_rows: int
    columns: int
    shards: Path
    threshold: float | None
    k: int | None
    max_bytes: int | None

    def write_missing(self, show_progress_bar: bool) -> list[GraphShard]:
        """Return all shards, after writing those that do not exist."""
        numbers = range(len(self.tiles))
        partials = {number: self.partials(number) for number in numbers}
        existing = {n: shard for n in numbers if (shard := self.read(n)) is not None}
        missing = [number for number in numbers if number not in existing]
        tasks = [
            {"shard": number, "partial": partial}
            for number in missing
            for partial in partials[number]
            if not (self.shards / partial_file(number, partial)).exists()
        ]
        total = sum(map(len, partials.values()))
        with progress_bar(
            desc="Comparing", unit=" tiles", total=total, initial=total - len(tasks),
            disable=not show_progress_bar,
        ) as bar:  # fmt: skip
            for _ in run_each(tasks, self.compare):
                bar.update(1)
        merges = [{"shard": number} for number in missing if len(partials[number]) > 1]
        for _ in run_each(merges, self.merge):
            pass
        for path in self.shards.glob("piece-*.npz"):
            path.unlink()
        shards = [existing.get(number) or self.read(number) for number in numbers]
        if None in shards:
            raise TableError(f"{shard_file(shards.index(None))} was not written; repeat the call")
        return [shard for shard in shards if shard is not None]

    def partials(self, number: int) -> range:
        """Return the numbers of the partial shards of a shard, which are groups of tiles of columns."""
        first = number if self.k is None else 0
        return range(first // self.columns, -(-len(self.tiles) // self.columns))

    def read(self, number: int) -> GraphShard | None:
        """Return a shard; None if it is missing or damaged."""
        first = number * self.tile_rows
        rows = min(self.tile_rows, self.shape[0] - first)
        path = self.shards / shard_file(number)
        pointers = row_pointers(path, rows)
        if pointers is None or len(pointers) - 1 != rows:
            return None
        return GraphShard(path.name, first, rows, int(pointers[-1]))

    def compare(self, task: Mapping[str, Any]) -> None:
        """Write a partial shard, or a shard that consists of one."""
        number, partial = int(task["shard"]), int(task["partial"])
        units = ObjectStoreRows(self.tiles, self.tile_rows, self.shape)
        pairs = AllPairs(units, units, TILE_BYTES)
        rows = slice(number * self.tile_rows, min((number + 1) * self.tile_rows, self.shape[0]))
        width = self.columns * self.tile_rows
        columns = slice(partial * width, min((partial + 1) * width, self.shape[0]))
        found: Iterator[RowPairs]
        if self.threshold is not None:
            counter = pair_counter(_max_entries(self.max_bytes), self.threshold, ADVICE)
            found = pairs.above(
                self.threshold, upper=True, rows=rows, columns=columns, on_pairs=counter
            )
        else:
            best = pairs.top_k(int(self.k or 0), skip_self=True, rows=rows, columns=columns)
            found = map(by_column, best)
        alone = len(self.partials(number)) == 1
        name = shard_file(number) if alone else partial_file(number, partial)
        with write_errors(self.shards):
            write_shard(self.shards / name, build_matrix(found, self.shape[0]))

    def merge(self, task: Mapping[str, Any]) -> None:
        """Write a shard from its partial shards, and delete these."""
        number = int(task["shard"])
        paths = [self.shards / partial_file(number, n) for n in self.partials(number)]
        if not all(path.exists() for path in paths):
            return  # merged before by a worker that was lost afterwards
        partials = [sparse.csr_array(sparse.load_npz(path)) for path in paths]
        if self.k is None:
            found = concatenate_pairs([matrix_pairs(partial) for partial in partials])
        else:
            rows = partials[0].shape[0]
            scores = np.hstack([partial.data.reshape(rows, -1) for partial in partials])
            columns = np.hstack([partial.indices.reshape(rows, -1) for partial in partials])
            found = by_column(top_k_of_rows(scores, self.k, columns.astype(np.int64)))
        with write_errors(self.shards):
            write_shard(self.shards / shard_file(number), build_matrix([found], self.shape[0]))
        for path in paths:
            path.unlink(missing_ok=True)


def partial_file(number: int, partial: int) -> str:
    """Return the file name of a partial shard."""
    return f"piece-{number:05d}-{partial:05d}.npz"


def _max_entries(max_bytes: int | None) -> int:
    """Return how many pairs fit in some bytes, or in a task's share of the free memory of this node."""
    import ray

    if max_bytes is None:
        here = ray.get_runtime_context().get_node_id()
        cpus = [node["Resources"].get("CPU", 1) for node in nodes() if node["NodeID"] == here]
        max_bytes = int(available_memory() * MEMORY_SHARE / max(1, *cpus, 1))
    return max_bytes // PEAK_ENTRY_BYTES
