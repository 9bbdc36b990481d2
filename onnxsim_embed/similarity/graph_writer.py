"""Write a similarity graph shard by shard, in bounded memory and resumable.

The checkpoint of an unfinished graph holds `parts`, the directory that becomes the graph, and in its
journal the rows of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.files.atomic import durable_file, write_json
from onnxsim_embed.files.checkpoint import Checkpoint, Settings, differing_settings, write_errors
from onnxsim_embed.similarity.compare import TILE_BYTES, check_threshold
from onnxsim_embed.similarity.graph import (
    DAMAGE,
    DIAGONAL,
    FORMAT_VERSION,
    INDEX,
    GraphShard,
    SimilarityGraph,
    open_graph,
    shard_file,
)
from onnxsim_embed.similarity.memory import (
    MemoryBudget,
    Progress,
    ResultTooLargeError,
    pair_counter,
)
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.selection import RowPairs, TopK
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import UnitRows, check_vectors
from onnxsim_embed.system.units import check_integer

# Pairs compared for one shard, some ten seconds on two processors: the work that a kill may lose.
SHARD_PAIRS = 1 << 31

# Bytes of vectors read at a time for their digest.
DIGEST_BYTES = 64 << 20

ADVICE = "raise the threshold or max_memory, or keep the top k of each row (k=)"


def write_graph(
    vectors: npt.ArrayLike,
    directory: str | Path,
    *,
    threshold: float | None = None,
    k: int | None = None,
    include_self: bool = True,
    max_memory: int | None = None,
    show_progress_bar: bool = False,
    force: bool = False,
    block_bytes: int = TILE_BYTES,
) -> SimilarityGraph:
    """Compare all rows of a set with each other and write the similarity graph shard by shard.

    Entries and scores are bitwise those of `similarity_matrix` or `neighbours`. After a kill or a full
    disk the same call with the same vectors continues with the first missing shard. The directory
    appears when the graph is complete.

    :param vectors: (n, dim), of any norm; memory-mapped ones that do not fit in memory are read in tiles.
    :param threshold: keep scores strictly above it, from -1 to 1.
    :param k: keep the top k other rows of each row, instead of a threshold.
    :param include_self: keep the diagonal (with a threshold).
    :param max_memory: maximum bytes to use beyond the input; None for three quarters of the free memory.
    :param show_progress_bar: show a progress bar on standard error.
    :param force: start over, and replace a graph that exists.
    :param block_bytes: bytes of scores that each thread holds at a time.
    :returns: the graph that was written, by this call or an earlier one for the same vectors.
    :raises ValueError: as `similarity_matrix`; or if the checkpoint belongs to a run with other settings,
        naming those that differ.
    :raises FileExistsError: if the directory exists, unless it holds this graph, naming what differs.
    :raises FileNotFoundError: if its parent directory does not exist.
    :raises TableError: if another process writes the graph, or it cannot be written.
    :raises MemoryError: if not even the pairs of one row fit.

    Usage::

        graph = write_graph(np.load("vectors.npy", mmap_mode="r"), "graph", threshold=0.6)
        for first, block in graph.blocks():
            print(first, block.nnz)
    """
    checkpoint = GraphCheckpoint(Path(directory))
    array = np.asarray(vectors)
    check_vectors(array)
    settings = graph_settings(len(array), threshold, k, include_self)
    checkpoint.check_target(force, settings)
    settings["vectors"] = digest(array)
    if (graph := checkpoint.check_target(force, settings)) is not None:
        return graph
    threshold, k = settings["threshold"], settings["k"]
    budget = MemoryBudget(max_memory)
    with checkpoint:
        journal = checkpoint.resume(settings, force)
        if journal is not None and "columns" in journal:
            raise ValueError(
                f"{checkpoint.target} has an unfinished run of onnxsim_embed.ray.write_graph: finish it "
                "there, or start over with force=True"
            )
        units = UnitRows(array, budget.vector_bytes)
        pairs = AllPairs(units, units, block_bytes)
        if journal is None:
            rows = min(SHARD_PAIRS // max(1, units.rows), units.rows)
            rows = max(1, min(rows, budget.max_rows(units, threshold, k)))
            checkpoint.record(part_rows=rows)
        else:
            rows = journal["part_rows"]

        def compare(rows: slice) -> Iterator[RowPairs]:
            if k is not None:
                return iter([by_column(pairs.top_k(k, skip_self=True, rows=rows))])
            counter = pair_counter(budget.max_entries(units, units), threshold, ADVICE)
            return pairs.above(threshold, upper=True, rows=rows, on_pairs=counter)

        with Progress(units.rows, show_progress_bar) as progress:
            shards = checkpoint.write_missing(compare, rows, units.rows, progress)
        checkpoint.finish(shards, None if threshold is None else units.diagonal(threshold))
    return open_graph(checkpoint.target)


class GraphCheckpoint(Checkpoint):
    """Checkpoint of a similarity graph, whose finished shards lie in `parts`."""

    data = "parts"
    progress: ClassVar[Mapping[str, type]] = {"replaces": bool, "part_rows": int}
    format_version = FORMAT_VERSION

    @property
    def shards(self) -> Path:
        """Directory of the shards, which becomes the graph."""
        return self.directory / "parts"

    def check_target(self, force: bool, settings: Settings | None = None) -> SimilarityGraph | None:
        """Raise before any work if the graph could not be written after it.

        :param settings: those that are known; None accepts no graph that exists.
        :returns: the graph at the target, if it has these settings.
        :raises FileExistsError: if the target exists, unless it is a graph, and has these settings or
            `force` or the unfinished run replaces it.
        :raises FileNotFoundError: if its parent directory does not exist.
        """
        target = self.target
        if not target.exists():
            if not target.parent.is_dir():
                raise FileNotFoundError(
                    f"cannot write {target}: there is no directory {target.parent}"
                )
            return None
        if not (target / INDEX).is_file():
            raise FileExistsError(
                f"{target} exists and is not a similarity graph; choose another name"
            )
        journal = None if force else self.read()
        if force or (journal and journal["replaces"]):
            return None
        graph, reason = open_graph(target), ""
        if settings is not None:
            reason = differing_settings(vars(graph), settings)
            sizes = (row_pointers(target / shard.file, shard.rows) for shard in graph.parts)
            if not reason and any(pointers is None for pointers in sizes):
                reason = "damaged"
            if not reason:
                return graph
        raise FileExistsError(
            f"{target} exists{reason and f' ({reason})'}; replace it with force=True, or choose another name"
        )

    def record(self, **progress: Any) -> None:  # noqa: ANN401 - what JSON holds
        """See `Checkpoint`; makes the directory of the shards before."""
        with write_errors(self.target):
            self.shards.mkdir(exist_ok=True)
        super().record(**progress)

    def write_missing(
        self,
        compare: Callable[[slice], Iterator[RowPairs]],
        shard_rows: int,
        total: int,
        progress: Progress,
    ) -> list[GraphShard]:
        """Return all shards, after writing those that do not exist."""
        shards: list[GraphShard] = []
        first = 0
        while first < total:
            path = self.shards / shard_file(len(shards))
            pointers = row_pointers(path, total - first)
            rows = min(shard_rows, total - first)
            while pointers is None:
                try:
                    found = map(progress.count, compare(slice(first, first + rows)))
                    matrix = build_matrix(found, total)
                except ResultTooLargeError:  # these rows have more pairs than usual
                    if rows == 1:
                        raise
                    rows = (rows + 1) // 2
                    progress.move(first)
                    continue
                with write_errors(self.target):
                    write_shard(path, matrix)
                pointers = matrix.indptr
            shards.append(GraphShard(path.name, first, len(pointers) - 1, int(pointers[-1])))
            first += shards[-1].rows
            progress.move(first)
        return shards

    def finish(self, shards: list[GraphShard], diagonal: npt.NDArray[np.float32] | None) -> None:
        """Write the index, and move the graph to its target.

        :param diagonal: float32 array (rows,), NaN without an entry; None for the top k.
        """
        index = {
            "format_version": FORMAT_VERSION,
            **self._settings,
            "parts": [asdict(shard) for shard in shards],
        }
        with write_errors(self.target):
            if diagonal is not None:
                if not self._settings["include_self"]:
                    diagonal[:] = np.nan
                with durable_file(self.shards / DIAGONAL) as stream:
                    np.save(stream, diagonal, allow_pickle=False)
            write_json(self.shards / INDEX, index)
            for path in self.shards.glob(".*.partial"):  # an interrupted write of a killed process
                path.unlink()
        self.publish(self.shards)


def graph_settings(
    rows: int, threshold: float | None, k: int | None, include_self: bool
) -> dict[str, Any]:
    """Return the settings that a graph depends on beside the vectors, as its index holds them.

    :raises ValueError: unless one of a valid threshold and a valid k is given.
    """
    if (threshold is None) == (k is None):
        raise ValueError("a similarity graph needs either threshold or k")
    if threshold is not None:
        check_threshold(threshold)
    elif rows < 2:
        raise ValueError(f"there are no other rows to choose {k} from")
    else:
        k = check_integer("k", k, 1, rows - 1, "the other rows")
    return {
        "rows": rows,
        "threshold": None if threshold is None else float(threshold),
        "k": k,
        "include_self": include_self and k is None,
    }


def digest(array: npt.NDArray[Any]) -> str:
    """Return a digest of the shape, dtype and bytes of vectors."""
    hashed = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    step = max(1, DIGEST_BYTES // max(1, array.shape[1] * array.itemsize))
    for first in range(0, len(array), step):
        hashed.update(np.ascontiguousarray(array[first : first + step]).data)
    return hashed.hexdigest()[:16]


def write_shard(path: Path, matrix: sparse.csr_array) -> None:
    """Write a shard atomically."""
    with durable_file(path) as stream:
        sparse.save_npz(stream, matrix, compressed=False)


def row_pointers(path: Path, max_rows: int) -> npt.NDArray[Any] | None:
    """Return where the rows of a shard begin; None if it is missing, damaged or has too many rows."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            pointers = np.asarray(arrays["indptr"])
    except DAMAGE:
        return None
    return pointers if 1 <= len(pointers) - 1 <= max_rows else None


def by_column(best: TopK) -> RowPairs:
    """Return the top k of each row as pairs, columns ascending."""
    order = np.argsort(best.indices, axis=1)
    rows, k = best.indices.shape
    return RowPairs(
        np.full(rows, k, np.int64),
        np.take_along_axis(best.indices, order, axis=1).ravel(),
        np.take_along_axis(best.scores, order, axis=1).ravel(),
    )
