"""Writing a similarity graph part by part, so that memory does not bound it and a stop costs one part.

Parts lie in a hidden directory beside the graph's place until all are there. `.graph.partial` holds
`parts` and `job.json`, the journal: which job they belong to and how many rows a part has.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import durable_file
from onnxsim_embed.files.checkpoint import (
    JOURNAL,
    differing_settings,
    locked,
    naming,
    partial_directory,
)
from onnxsim_embed.similarity.compare import TILE_BYTES, check_threshold
from onnxsim_embed.similarity.graph import (
    DAMAGE,
    DIAGONAL,
    FORMAT_VERSION,
    INDEX,
    Part,
    SimilarityGraph,
    open_graph,
    part_file,
)
from onnxsim_embed.similarity.memory import MemoryBudget, PairCounter, Progress, ResultTooLargeError
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.scoring import RowPairs, TopK
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import UnitRows, check_vectors

PARTS = "parts"

# Pairs that a part compares, some ten seconds on two processors: what a kill may cost.
PART_PAIRS = 1 << 31

# Bytes of the vectors that are read at a time for their digest.
DIGEST_BYTES = 64 << 20

ADVICE = "raise the threshold or max_memory, or ask for the best of each row (k, --top-k)"


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
    """Compare all rows of a set with each other and write the result part by part, whatever its size.

    Entries and scores are those of `similarity_matrix` or `neighbours`, bit for bit. After a kill or a
    full disk the same call with the same vectors goes on with the first part that is missing; without
    `force`, which starts over. The directory appears when it is whole.

    :param vectors: (n, dim), of any norm; memory-mapped ones that memory does not hold are read in parts.
    :param threshold: keep scores strictly above it, from -1 to 1.
    :param k: keep the k best other rows of each row; instead of a threshold.
    :param include_self: keep the diagonal (above a threshold).
    :param max_memory: most bytes to use beyond the input; None for three quarters of what is free.
    :param show_progress_bar: show one on standard error.
    :param force: start over, and replace a graph that exists.
    :param block_bytes: bytes of scores held at a time by each thread.
    :raises ValueError: as `similarity_matrix`; or if what is half done belongs to another job, naming
        what differs.
    :raises FileExistsError: if the directory exists.
    :raises FileNotFoundError: if the directory above it does not.
    :raises TableError: if another process writes it, or it cannot be written.
    :raises MemoryError: if not even the pairs of one row fit.

    Usage::

        graph = write_graph(np.load("vectors.npy", mmap_mode="r"), "graph", threshold=0.6)
        for first, block in graph.blocks():
            print(first, block.nnz)
    """
    target = Path(directory).absolute()
    check_wanted(threshold, k)
    check_graph_target(target, force)
    array = np.asarray(vectors)
    check_vectors(array)
    settings = graph_settings(len(array), threshold, k, include_self, partial(digest, array))
    budget = MemoryBudget(max_memory)
    with locked(target) as work:
        job = GraphJob(work, target, settings, force)
        rows = UnitRows(array, budget.vector_bytes)
        parts = _write_parts(job, rows, block_bytes, budget, show_progress_bar)
        job.finish(parts, rows.diagonal(job.threshold) if k is None else None)
    return open_graph(target)


def _write_parts(
    job: GraphJob, units: UnitRows, block_bytes: int, budget: MemoryBudget, show: bool
) -> list[Part]:
    """Write the parts that are missing; return all."""
    size, pairs = units.rows, AllPairs(units, units, block_bytes)
    if job.journal is None:
        rows = min(PART_PAIRS // max(1, size), size)
        job.begin(max(1, min(rows, budget.max_rows(units, job.threshold, job.k))))
    elif "columns" in job.journal:
        raise ValueError(
            f"{job.target} is half done by --engine ray: finish it there, or start over with --force"
        )
    parts: list[Part] = []
    first = 0
    with Progress(size, show, upper=job.k is None) as progress:
        while first < size:
            path = job.parts / part_file(len(parts))
            pointers = row_pointers(path, size - first)
            if pointers is None:
                rows = min(job.part_rows, size - first)
                matrix = _fitting(job, pairs, first, rows, budget, progress)
                with naming(job.target):
                    write_part(path, matrix)
                pointers = matrix.indptr
            parts.append(Part(path.name, first, len(pointers) - 1, int(pointers[-1])))
            first += parts[-1].rows
            progress.move(first)
    return parts


def _fitting(
    job: GraphJob, pairs: AllPairs, first: int, rows: int, budget: MemoryBudget, progress: Progress
) -> sparse.csr_array:
    """Return the matrix of some rows from `first` on: of fewer where rows find more than usual."""
    while True:
        try:
            part = slice(first, first + rows)
            if job.k is None:
                limit = PairCounter(
                    budget.max_entries(pairs.left, pairs.right), job.threshold, ADVICE
                )
                found = pairs.above(job.threshold, upper=True, rows=part, on_pairs=limit)
            else:
                found = map(by_column, pairs.top_k(job.k, skip_self=True, rows=part))
            return build_matrix(map(progress.count, found), pairs.right.rows)
        except ResultTooLargeError:
            if rows == 1:
                raise
        rows = (rows + 1) // 2
        progress.move(first)


def check_graph_target(target: Path, force: bool) -> None:
    """Refuse a directory that is there, unless it is a graph and may be replaced.

    :raises FileExistsError: saying what it is.
    :raises FileNotFoundError: if the directory above does not exist.
    """
    if target.exists():
        if not (target / INDEX).is_file():
            raise FileExistsError(
                f"{target} exists and is no similarity graph; choose another name"
            )
        journal = None if force else _read_journal(partial_directory(target))
        if not (force or (journal and journal["replaces"])):
            raise FileExistsError(
                f"{target} exists; replace it with --force, or choose another name"
            )
    elif not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no directory {target.parent}")


def check_wanted(threshold: float | None, k: int | None) -> None:
    """Refuse both or none of a threshold and k, and a threshold that is none.

    :raises ValueError: saying what is wrong.
    """
    if (threshold is None) == (k is None):
        raise ValueError("a graph needs one of threshold and k")
    if threshold is not None:
        check_threshold(threshold)


def graph_settings(
    rows: int,
    threshold: float | None,
    k: int | None,
    include_self: bool,
    vectors: Callable[[], str],
) -> dict[str, Any]:
    """Return what a graph depends on, as its index says it.

    :param vectors: returns their digest.
    :raises ValueError: if there are not k other rows.
    """
    if k is not None:
        _check_k(k, rows - 1)
    return {
        "format_version": FORMAT_VERSION,
        "rows": rows,
        "threshold": None if threshold is None else float(threshold),
        "k": None if k is None else operator.index(k),
        "include_self": include_self and k is None,
        "vectors": vectors(),
    }


def _check_k(k: int, most: int) -> None:
    if most < 1:
        raise ValueError(f"there are no other rows to choose {k} from")
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to {most} (the other rows), got {k}")


def digest(array: npt.NDArray[Any]) -> str:
    """Return what tells vectors outliers: a digest of their shape, number format and bytes."""
    found = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    step = max(1, DIGEST_BYTES // max(1, array.shape[1] * array.itemsize))
    for first in range(0, len(array), step):
        found.update(np.ascontiguousarray(array[first : first + step]).data)
    return found.hexdigest()[:16]


class GraphJob:
    """A graph in the making.

    :param work: the hidden directory.
    :param target: where the graph is to be.
    :param settings: what the graph depends on.
    :param force: drop the parts found, and replace a graph.
    :raises ValueError: naming what differs, if the parts found are those of other settings.
    :raises TableError: if the journal found is damaged.
    """

    def __init__(self, work: Path, target: Path, settings: Mapping[str, Any], force: bool) -> None:
        self._work = work
        self.target = target
        self._settings = settings
        self.parts = work / PARTS
        self.journal = None if force else _read_journal(work)
        if self.journal is None:
            (work / JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir()
            return
        if differing := differing_settings(self.journal, settings):
            raise ValueError(
                f"{target} is half done with other settings ({differing}): finish that job, or start "
                "over with --force"
            )
        for path in self.parts.glob(".*.partial"):  # a write that was cut short
            path.unlink()

    @property
    def threshold(self) -> float:
        """The threshold; NaN for the k best."""
        value = self._settings["threshold"]
        return math.nan if value is None else float(value)

    @property
    def k(self) -> int | None:
        """How many of each row; None above a threshold."""
        return self._settings["k"]

    @property
    def part_rows(self) -> int:
        """Rows of a part, once the job has begun."""
        assert self.journal is not None
        return int(self.journal["part_rows"])

    def begin(self, part_rows: int, **plan: int) -> None:
        """Write the journal of a job without one.

        :param plan: what else has to stay the same when the job goes on.
        """
        self.journal = {"part_rows": part_rows, "replaces": self.target.exists(), **plan}
        with naming(self.target):
            _write_json({**self._settings, **self.journal}, self._work / JOURNAL)

    def finish(self, parts: list[Part], diagonal: npt.NDArray[np.float32] | None) -> None:
        """Write the index, and put the directory in its place.

        :param diagonal: float32 array (rows,), NaN where there is no entry; None for the k best.
        """
        table = {**self._settings, "parts": [asdict(part) for part in parts]}
        with naming(self.target):
            if diagonal is not None:
                if not self._settings["include_self"]:
                    diagonal[:] = np.nan
                with durable_file(self.parts / DIAGONAL) as stream:
                    np.save(stream, diagonal, allow_pickle=False)
            _write_json(table, self.parts / INDEX)
            old = self._work / "old"
            shutil.rmtree(old, ignore_errors=True)
            if self.journal and self.journal["replaces"] and self.target.exists():
                self.target.rename(old)
            self.parts.rename(self.target)
        (self._work / JOURNAL).unlink()


def write_part(path: Path, matrix: sparse.csr_array) -> None:
    """Write a part, whole or not at all."""
    with durable_file(path) as stream:
        sparse.save_npz(stream, matrix, compressed=False)


def _read_journal(work: Path) -> dict[str, Any] | None:
    """Read the journal of a hidden directory; None where there are no parts to go on from.

    :raises TableError: if it is damaged.
    """
    path = work / JOURNAL
    if not (path.exists() and (work / PARTS).is_dir()):
        return None
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows, replaces = table["part_rows"], table["replaces"]
        if type(rows) is not int or rows < 1 or not isinstance(replaces, bool):
            raise ValueError(f"part_rows {rows!r}, replaces {replaces!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TableError(f"{path} is damaged ({error}): start over with --force") from None
    return table


def row_pointers(path: Path, most: int) -> npt.NDArray[Any] | None:
    """Return where the rows of a part begin; None where it is missing, damaged or has too many rows."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as table:
            pointers = np.asarray(table["indptr"])
    except DAMAGE:
        return None
    return pointers if 1 <= len(pointers) - 1 <= most else None


def by_column(best: TopK) -> RowPairs:
    """Return the k best of each row as pairs, columns ascending."""
    order = np.argsort(best.indices, axis=1)
    rows, k = best.indices.shape
    return RowPairs(
        np.full(rows, k, np.int64),
        np.take_along_axis(best.indices, order, axis=1).ravel(),
        np.take_along_axis(best.scores, order, axis=1).ravel(),
    )


def _write_json(table: Mapping[str, Any], path: Path) -> None:
    with durable_file(path) as stream:
        stream.write(json.dumps(table, indent=2).encode())
