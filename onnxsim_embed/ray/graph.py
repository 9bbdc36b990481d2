"""Similarity graphs on a cluster: blocks of pairs as tasks, over vectors in the object store.

The rows are cut into blocks, each loaded once into the object store and read in place by every task of a node. A task
compares one block with some others on or beyond it (for the k best: with any others) and writes the pairs it
found; tasks of one block whose pairs lie in several files are put together at the end. Which block a pair falls into
changes nothing about its score.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.ray.blocks import Source, self_scores, source_of
from onnxsim_embed.ray.comparison import Compare, Merge, piece_file, run_each
from onnxsim_embed.ray.connection import (
    check_shared,
    cluster,
    cpus_of,
    nodes,
    plain_errors,
    require_ray,
)
from onnxsim_embed.similarity.graph import GraphShard, SimilarityGraph, open_graph, shard_file
from onnxsim_embed.similarity.graph_writer import (
    SHARD_PAIRS,
    GraphCheckpoint,
    graph_settings,
    row_pointers,
)
from onnxsim_embed.similarity.memory import MemoryBudget
from onnxsim_embed.system.progress import progress_bar

Float32 = npt.NDArray[np.float32]

# Rows of a block: fewer make products slow, more make tasks hard to share out (25 to 100 MB at 384 wide).
LEAST_ROWS, MOST_ROWS = 2048, 65536

# Tasks for each processor, so that the last ones leave none idle for long; fewer pairs than these
# in a task are not worth its start.
TASKS_PER_CPU = 8
LEAST_PAIRS = 1 << 24


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
    """Compare all rows of a set with each other on a Ray cluster, and write the result part by part.

    Entries, scores and files are those of `onnxsim_embed.write_graph`, to the bit, whatever the cluster; as
    there, the same call goes on after a stop, and the directory appears when it is whole.

    :param vectors: a directory that `encode_files` wrote (path or URI), a .npy file that every node sees, or an
        array (n, dim).
    :param directory: path that every node sees.
    :param threshold: keep scores strictly above it, from -1 to 1.
    :param k: keep the k best other rows of each row; instead of a threshold.
    :param include_self: keep the diagonal (above a threshold).
    :param max_memory: most bytes for the pairs that one task finds; None for its share of what is free
        on its node.
    :param address: of a cluster; None for the one connected, RAY_ADDRESS, or a new one on this machine.
    :param block_rows: rows compared at a time; None chooses by the rows and the cluster's processors. A
        job that goes on keeps its own.
    :param show_progress_bar: show one on standard error.
    :param force: start over, and replace a graph that exists.
    :raises ValueError: as `onnxsim_embed.write_graph`, as are the next three.
    :raises FileExistsError: if the directory exists.
    :raises FileNotFoundError: if there are no such vectors, or the directory above does not exist.
    :raises TableError: if another process writes it, or a file is damaged.
    :raises MemoryError: if one task finds more pairs than fit.
    :raises OnnxsimEmbedError: if a node does not see a path, or the cluster cannot be reached.
    """
    checkpoint = GraphCheckpoint(Path(directory))
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows must be positive, got {block_rows}")
    checkpoint.check_target(force)
    require_ray()
    source = source_of(vectors)
    settings = graph_settings(source.rows, threshold, k, include_self, source.digest)
    with checkpoint, cluster(address), plain_errors():
        journal = checkpoint.resume(settings, force)
        check_shared(Directory(checkpoint.directory), source.path)
        if journal is None:
            journal = _plan(source.rows, sum(cpus_of(nodes())), k is None, block_rows)
            checkpoint.record(**journal)
        elif "columns" not in journal:
            raise ValueError(
                f"{checkpoint.target} has an unfinished run of onnxsim_embed.write_graph (without --engine "
                "ray): finish it there, or start over with force=True"
            )
        run = _Run(
            checkpoint,
            source,
            settings,
            journal["part_rows"],
            journal["columns"],
            None if max_memory is None else MemoryBudget(max_memory).max_bytes,
        )
        checkpoint.finish(run.parts(show_progress_bar), run.diagonal() if k is None else None)
    return open_graph(checkpoint.target)


def _plan(rows: int, cpus: float, upper: bool, block_rows: int | None) -> dict[str, int]:
    """Return rows of a block, and blocks of columns that a task compares one block with."""
    tasks = max(1, int(cpus)) * TASKS_PER_CPU
    height = block_rows or min(max(-(-rows // tasks), LEAST_ROWS), MOST_ROWS)
    blocks = -(-rows // height)
    pairs = rows * rows // (2 if upper else 1)
    most = min(max(pairs // tasks, LEAST_PAIRS), SHARD_PAIRS)
    return {"part_rows": height, "columns": min(max(1, most // (height * height)), max(1, blocks))}


class _Run:
    """The tasks of a job.

    :param height: rows of a block.
    :param columns: blocks of columns of a task.
    :param most: bytes for the pairs of a task; None for its share of a node's.
    """

    def __init__(
        self,
        checkpoint: GraphCheckpoint,
        source: Source,
        settings: Mapping[str, Any],
        height: int,
        columns: int,
        most: int | None,
    ) -> None:
        self._shards = checkpoint.shards
        self._threshold, self._k = settings["threshold"], settings["k"]
        self._source = source
        self._height = height
        self._columns = columns
        self._most = most
        self._blocks = source.loads(height)

    def parts(self, show: bool) -> list[GraphShard]:
        """Write the parts that are missing; return all."""
        counts = range(len(self._blocks))
        pieces = {number: self._pieces(number) for number in counts}
        there = {number: part for number in counts if (part := self._part(number)) is not None}
        missing = [number for number in counts if number not in there]
        tasks = [
            {"part": number, "piece": piece, "alone": len(pieces[number]) == 1}
            for number in missing
            for piece in pieces[number]
            if not (self._shards / piece_file(number, piece)).exists()
        ]
        total = sum(map(len, pieces.values()))
        compare = Compare(
            self._blocks, self._height, self._columns, self._source.rows, self._source.width,
            self._shards, self._k, self._threshold, self._most,
        )  # fmt: skip
        with progress_bar(
            desc="Comparing",
            unit=" blocks",
            total=total,
            initial=total - len(tasks),
            disable=not show,
        ) as bar:
            for _ in run_each(tasks, compare):
                bar.update(1)
        merge = Merge(self._shards, self._source.rows, self._k)
        several = [number for number in missing if len(pieces[number]) > 1]
        for _ in run_each([{"part": n, "pieces": list(pieces[n])} for n in several], merge):
            pass
        for path in self._shards.glob("piece-*.npz"):
            path.unlink()
        return [there.get(number) or self._whole(number) for number in counts]

    def diagonal(self) -> Float32:
        """Return each row's score with itself, NaN where that is not above the threshold."""
        import ray

        look = ray.remote(max_retries=-1)(self_scores)
        scores = [look.remote(block, self._threshold) for block in self._blocks]
        return np.concatenate([np.zeros(0, np.float32), *ray.get(scores)])

    def _pieces(self, number: int) -> range:
        """Return the numbers of the tasks of a block: by groups of columns, from 0."""
        first = number if self._k is None else 0
        return range(first // self._columns, -(-len(self._blocks) // self._columns))

    def _part(self, number: int) -> GraphShard | None:
        first = number * self._height
        rows = min(self._height, self._source.rows - first)
        path = self._shards / shard_file(number)
        pointers = row_pointers(path, rows)
        if pointers is None or len(pointers) - 1 != rows:
            return None
        return GraphShard(path.name, first, rows, int(pointers[-1]))

    def _whole(self, number: int) -> GraphShard:
        part = self._part(number)
        if part is None:
            raise TableError(f"{shard_file(number)} was not written; give the same command again")
        return part
