"""Similarity graphs on a cluster: blocks of pairs as tasks, over vectors in the object store.

The rows are cut into blocks, each loaded once into the object store and read in place by every task of a node. A task
compares one block with some others on or beyond it (for the k best: with any others) and writes the pairs it
found; tasks of one block whose pairs lie in several files are put together at the end. Which block a pair falls into
changes nothing about its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.blocks import Best, Found
from onnxsim_embed.budget import PEAK_ENTRY_BYTES, USUAL_SHARE, Budget, Limit
from onnxsim_embed.csr import matrix_of, pairs_of
from onnxsim_embed.errors import TableError
from onnxsim_embed.graph_job import (
    ADVICE,
    PART_PAIRS,
    GraphJob,
    by_column,
    check_graph_target,
    check_wanted,
    digest,
    graph_settings,
    row_pointers,
    write_part,
)
from onnxsim_embed.graph_store import Part, SimilarityGraph, open_graph, part_file
from onnxsim_embed.kept_rows import locked, naming
from onnxsim_embed.machine import available_memory
from onnxsim_embed.panels import AllPairs, keep_best, side_by_side
from onnxsim_embed.progress import progress_bar
from onnxsim_embed.ray.cluster import (
    ACTOR_SHARE,
    EXPECTED,
    LOADER_SHARE,
    check_shared,
    cluster,
    cpus_of,
    nodes,
    pack,
    plain_errors,
    quiet,
    require_ray,
    unpack,
)
from onnxsim_embed.similarity import BLOCK_BYTES
from onnxsim_embed.storage import Storage, absolute
from onnxsim_embed.units import UnitRows, unit_vectors
from onnxsim_embed.vector_files import read_vectors
from onnxsim_embed.vector_store import VectorDirectory, is_vector_directory, open_vectors

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
    target = Path(directory).absolute()
    check_wanted(threshold, k)
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows must be positive, got {block_rows}")
    check_graph_target(target, force)
    require_ray()
    source = _source(vectors)
    settings = graph_settings(source.rows, threshold, k, include_self, source.digest)
    with locked(target) as work, cluster(address), plain_errors():
        job = GraphJob(work, target, settings, force)
        check_shared(Storage.at(work), source.path)
        if job.journal is None:
            job.begin(**_plan(source.rows, sum(cpus_of(nodes())), k is None, block_rows))
        elif "columns" not in job.journal:
            raise TableError(
                f"{target} is half done without --engine ray: finish it so, or start over with --force"
            )
        columns = int(job.journal["columns"]) if job.journal else 1
        run = _Run(
            job,
            source,
            job.part_rows,
            columns,
            None if max_memory is None else Budget(max_memory).most,
        )
        job.finish(run.parts(show_progress_bar), run.diagonal() if k is None else None)
    return open_graph(target)


def _plan(rows: int, cpus: float, upper: bool, block_rows: int | None) -> dict[str, int]:
    """Return rows of a block, and blocks of columns that a task compares one block with."""
    tasks = max(1, int(cpus)) * TASKS_PER_CPU
    height = block_rows or min(max(-(-rows // tasks), LEAST_ROWS), MOST_ROWS)
    blocks = -(-rows // height)
    pairs = rows * rows // (2 if upper else 1)
    most = min(max(pairs // tasks, LEAST_PAIRS), PART_PAIRS)
    return {"part_rows": height, "columns": min(max(1, most // (height * height)), max(1, blocks))}


@dataclass(frozen=True)
class _Source:
    """Vectors, wherever they are."""

    vectors: VectorDirectory | npt.NDArray[Any]
    path: str | None = None

    @property
    def rows(self) -> int:
        found = self.vectors
        return found.rows if isinstance(found, VectorDirectory) else len(found)

    @property
    def width(self) -> int:
        found = self.vectors
        return found.dim if isinstance(found, VectorDirectory) else found.shape[1]

    def digest(self) -> str:
        found = self.vectors
        return found.digest if isinstance(found, VectorDirectory) else digest(found)

    def loads(self, height: int) -> list[Any]:
        """Return references to the unit vectors of each block."""
        import ray

        # So little that it fits beside a task that waits for it, which keeps its processor: a block that was
        # lost with a node is loaded again while all processors are taken.
        load = ray.remote(num_cpus=LOADER_SHARE, max_retries=-1)(_load)
        starts = range(0, self.rows, height)
        if self.path is not None or isinstance(self.vectors, VectorDirectory):
            what = ray.put(self.path or self.vectors)  # an index may be of many parts
            return [load.remote(what, start, min(start + height, self.rows)) for start in starts]
        return [ray.put(unit_vectors(self.vectors[s : s + height], first_row=s)) for s in starts]


def _source(vectors: npt.ArrayLike | str | Path) -> _Source:
    if not isinstance(vectors, (str, Path)):
        array = np.asarray(vectors)
        UnitRows(array[:0])  # checks shape and dtype
        return _Source(array)
    if "://" in str(vectors) or is_vector_directory(vectors):
        return _Source(open_vectors(vectors))
    path = Path(vectors)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or directory {path}")
    if path.suffix != ".npy":
        raise ValueError(
            f"{path}: --engine ray takes vectors from a directory that encode --engine ray wrote, or from .npy"
        )
    return _Source(read_vectors(path), absolute(path))


def _load(source: str | VectorDirectory, start: int, stop: int) -> Float32:
    """Return the unit vectors of a block."""
    if isinstance(source, VectorDirectory):
        rows: npt.NDArray[Any] = source.read(start, stop)
    else:
        rows = read_vectors(source)[start:stop]
    return unit_vectors(rows, first_row=start)


def _self_scores(rows: Float32, threshold: float) -> Float32:
    return UnitRows(rows).diagonal(threshold)


class BlockRows(UnitRows):
    """Unit vectors in the object store.

    :param blocks: a reference to each block.
    :param height: rows of a block.
    """

    def __init__(self, blocks: Sequence[Any], height: int, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self.panel_rows = height
        self._blocks = blocks
        self._whole = None

    @property
    def whole(self) -> bool:
        """Blocks are compared one by one, even if there is one only."""
        return False

    def load(self, rows: slice) -> Float32:
        """Return a block, float32 (rows, dim), without a copy where this node has it."""
        import ray

        block: Float32 = ray.get(self._blocks[rows.start // self.panel_rows])
        return block


class _Run:
    """The tasks of a job.

    :param height: rows of a block.
    :param columns: blocks of columns of a task.
    :param most: bytes for the pairs of a task; None for its share of a node's.
    """

    def __init__(
        self, job: GraphJob, source: _Source, height: int, columns: int, most: int | None
    ) -> None:
        self._job = job
        self._source = source
        self._height = height
        self._columns = columns
        self._most = most
        self._blocks = source.loads(height)

    def parts(self, show: bool) -> list[Part]:
        """Write the parts that are missing; return all."""
        counts = range(len(self._blocks))
        pieces = {number: self._pieces(number) for number in counts}
        there = {number: part for number in counts if (part := self._part(number)) is not None}
        missing = [number for number in counts if number not in there]
        tasks = [
            {"part": number, "piece": piece, "alone": len(pieces[number]) == 1}
            for number in missing
            for piece in pieces[number]
            if not (self._job.parts / piece_file(number, piece)).exists()
        ]
        total = sum(map(len, pieces.values()))
        compare = _Compare(
            self._blocks, self._height, self._columns, self._source.rows, self._source.width,
            self._job.parts, self._job.k, self._job.threshold, self._most,
        )  # fmt: skip
        with progress_bar(
            desc="Comparing",
            unit=" blocks",
            total=total,
            initial=total - len(tasks),
            disable=not show,
        ) as bar:
            for _ in _each(tasks, compare):
                bar.update(1)
        merge = _Merge(self._job.parts, self._source.rows, self._job.k)
        several = [number for number in missing if len(pieces[number]) > 1]
        for _ in _each([{"part": n, "pieces": list(pieces[n])} for n in several], merge):
            pass
        for path in self._job.parts.glob("piece-*.npz"):
            path.unlink()
        return [there.get(number) or self._whole(number) for number in counts]

    def diagonal(self) -> Float32:
        """Return each row's score with itself, NaN where that is not above the threshold."""
        import ray

        look = ray.remote(max_retries=-1)(_self_scores)
        scores = [look.remote(block, self._job.threshold) for block in self._blocks]
        return np.concatenate([np.zeros(0, np.float32), *ray.get(scores)])

    def _pieces(self, number: int) -> range:
        """Return the numbers of the tasks of a block: by groups of columns, from 0."""
        first = number if self._job.k is None else 0
        return range(first // self._columns, -(-len(self._blocks) // self._columns))

    def _part(self, number: int) -> Part | None:
        first = number * self._height
        rows = min(self._height, self._source.rows - first)
        path = self._job.parts / part_file(number)
        pointers = row_pointers(path, rows)
        if pointers is None or len(pointers) - 1 != rows:
            return None
        return Part(path.name, first, rows, int(pointers[-1]))

    def _whole(self, number: int) -> Part:
        part = self._part(number)
        if part is None:
            raise TableError(f"{part_file(number)} was not written; give the same command again")
        return part


def piece_file(number: int, piece: int) -> str:
    """Return the name of the file of a task's pairs, where a block has several tasks."""
    return f"piece-{number:05d}-{piece:05d}.npz"


def _each(
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
class _Compare:
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
        pairs = AllPairs(rows, rows, BLOCK_BYTES)
        own = slice(number * self.height, min((number + 1) * self.height, self.rows))
        width = self.columns * self.height
        others = slice(piece * width, min((piece + 1) * width, self.rows))
        found: Iterator[Found]
        if self.k is None:
            limit = Limit(_room(self.most), self.threshold, ADVICE)
            found = pairs.above(self.threshold, upper=True, rows=own, columns=others, seen=limit)
        else:
            best = pairs.best(self.k, skip_self=True, rows=own, columns=others)
            found = map(by_column, best)
        name = part_file(number) if task["alone"] else piece_file(number, piece)
        with naming(self.parts):
            write_part(self.parts / name, matrix_of(found, self.rows))


def _room(most: int | None) -> int:
    """Return how many pairs fit into so many bytes, or into a task's share of this node's memory."""
    import ray

    if most is None:
        free = available_memory()
        if free is None:
            return int(np.iinfo(np.int64).max)
        here = ray.get_runtime_context().get_node_id()
        cpus = [node["Resources"].get("CPU", 1) for node in nodes() if node["NodeID"] == here]
        most = int(free * USUAL_SHARE / max(1, *cpus, 1))
    return most // PEAK_ENTRY_BYTES


@dataclass(frozen=True)
class _Merge:
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
            found = side_by_side([pairs_of(piece) for piece in pieces])
        else:
            height = pieces[0].shape[0]
            scores, columns = keep_best(
                np.hstack([piece.data.reshape(height, -1) for piece in pieces]),
                np.hstack([piece.indices.reshape(height, -1).astype(np.int64) for piece in pieces]),
                self.k,
            )
            found = by_column(Best(scores, columns))
        with naming(self.parts):
            write_part(self.parts / part_file(number), matrix_of([found], self.rows))
        for path in paths:
            path.unlink(missing_ok=True)
