"""Similarity graphs of any size on disk: a directory of sparse parts, which `graph_job` writes.

    graph/
      index.json        what the graph is, and the rows of each part
      part-00000.npz    the first rows, a scipy csr matrix as `scipy.sparse.load_npz` reads it
      diagonal.npy      of a graph above a threshold: each row's score with itself, NaN where there is none

Above a threshold, a set compared with itself is stored once: a part holds the columns beyond its own
rows. Of the k best of each row every part holds whole rows.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.errors import TableError
from onnxsim_embed.similarity.memory import PEAK_ENTRY_BYTES, MemoryBudget
from onnxsim_embed.similarity.sparse import build_matrix, matrix_pairs, symmetric_matrix
from onnxsim_embed.system.units import format_bytes

# Raised when the files change, or the scores in them: parts of two versions never make one graph.
FORMAT_VERSION = 1
INDEX = "index.json"
DIAGONAL = "diagonal.npy"

# More than what stands before the numbers of an array, in eights of bytes.
MEMBER_HEADER = 128

# What numpy, scipy and zipfile raise for a damaged file.
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError,
          SyntaxError, TokenError, zipfile.BadZipFile, zlib.error)  # fmt: skip


@dataclass(frozen=True)
class GraphShard:
    """A stored part: rows `first` to `first + rows`."""

    file: str
    first: int
    rows: int
    entries: int


@dataclass(frozen=True)
class SimilarityGraph:
    """A stored graph.

    :param directory: where it is.
    :param rows: rows of the set, and columns of the matrix.
    :param threshold: scores strictly above it are entries; None for the k best.
    :param k: best of each row; None above a threshold.
    :param include_self: whether the diagonal is there.
    :param vectors: digest of the vectors.
    """

    directory: Path
    rows: int
    threshold: float | None
    k: int | None
    include_self: bool
    vectors: str
    parts: Sequence[GraphShard]

    @property
    def nnz(self) -> int:
        """Entries of the matrix, both triangles."""
        stored = sum(part.entries for part in self.parts)
        if self.threshold is None:
            return stored
        return 2 * stored + int(np.count_nonzero(~np.isnan(self._diagonal())))

    def blocks(self) -> Iterator[tuple[int, sparse.csr_array]]:
        """Yield the first row and the matrix of each part, float32 csr_array (rows of the part, rows).

        Above a threshold a part has the entries beyond the diagonal only: each pair once.

        :raises TableError: for a part that is missing, damaged or another than the index says.
        """
        for part in self.parts:
            path = self.directory / part.file
            try:
                with path.open("rb") as stream:  # numpy leaves a damaged file open
                    _check_arrays(stream, 8 * (part.rows + part.entries + MEMBER_HEADER))
                    stream.seek(0)
                    matrix = sparse.csr_array(sparse.load_npz(stream))
                matrix.check_format(full_check=True)  # an index out of bounds would crash scipy
            except DAMAGE as error:
                raise TableError(f"{path} is damaged: {error}; make the graph again") from None
            found, told = (matrix.shape, matrix.nnz), ((part.rows, self.rows), part.entries)
            if found != told or matrix.dtype != np.dtype(np.float32):
                raise TableError(
                    f"{path} is not the part that {INDEX} describes; make the graph again"
                )
            yield part.first, matrix

    def to_matrix(self, *, max_memory: int | None = None) -> sparse.csr_array:
        """Return the whole matrix, as `similarity_matrix` would.

        :param max_memory: most bytes to use; None for three quarters of what is free.
        :returns: float32 csr_array (rows, rows).
        :raises MemoryError: if it does not fit.
        :raises TableError: as `blocks`.
        """
        most, need = MemoryBudget(max_memory).max_bytes, self.nnz * PEAK_ENTRY_BYTES
        if most is not None and need > most:
            raise MemoryError(
                f"the matrix of {self.directory} takes {format_bytes(need)} while it is put together, and "
                f"max_memory allows {format_bytes(most)}: go through its parts with blocks()"
            )
        whole = build_matrix((matrix_pairs(block) for _, block in self.blocks()), self.rows)
        return whole if self.threshold is None else symmetric_matrix(whole, self._diagonal())

    def _diagonal(self) -> npt.NDArray[np.float32]:
        path = self.directory / DIAGONAL
        try:
            with np.errstate(over="ignore"):  # mapped: a shape beyond the file takes no memory
                scores = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        except DAMAGE as error:
            raise TableError(f"{path} is damaged: {error}; make the graph again") from None
        if scores.shape != (self.rows,) or scores.dtype != np.dtype(np.float32):
            raise TableError(f"{path} is not of the graph that {INDEX} describes; make it again")
        return scores


def open_graph(directory: str | Path) -> SimilarityGraph:
    """Open a stored graph; reads its index only.

    :raises FileNotFoundError: if there is none.
    :raises TableError: if the index is damaged or of another version.
    """
    directory = Path(directory)
    path = directory / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no similarity graph: it holds no {INDEX}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version = table.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, known is {FORMAT_VERSION}")
        parts = tuple(GraphShard(**part) for part in table.pop("parts"))
        graph = SimilarityGraph(directory=directory, parts=parts, **table)
        _check(graph)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(
            f"{path} is damaged, or of another version of onnxsim-embed ({error}); make the graph again"
        ) from None
    return graph


def _check_arrays(stream: IO[bytes], most: int) -> None:
    """Refuse a part whose arrays are larger than they can be, before memory is taken for them.

    :param most: bytes of the largest.
    :raises ValueError: naming the array.
    """
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                old = version == (1, 0)
                read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0  # fmt: skip
                shape, _, dtype = read(member)
            if entry.file_size > most or math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} is larger than the part")


def shard_file(number: int) -> str:
    """Return the name of a part's file."""
    return f"part-{number:05d}.npz"


def _check(graph: SimilarityGraph) -> None:
    """Refuse an index that contradicts itself or names other files than parts.

    :raises ValueError: saying where.
    """
    counts = [
        graph.rows,
        *(n for part in graph.parts for n in (part.first, part.rows, part.entries)),
    ]
    if any(type(count) is not int or not 0 <= count < 1 << 62 for count in counts):
        raise ValueError("a number of rows or entries is none")
    if not isinstance(graph.include_self, bool) or not isinstance(graph.vectors, str):
        raise ValueError("include_self or vectors is of another kind")
    if graph.k is None:
        right = type(graph.threshold) in (int, float) and -1 <= (graph.threshold or 0) <= 1
    else:
        right = graph.threshold is None and type(graph.k) is int and 1 <= graph.k < graph.rows
    if not right:
        raise ValueError(f"threshold {graph.threshold!r} and k {graph.k!r} make no graph")
    first = 0
    for number, part in enumerate(graph.parts):
        if (part.file, part.first) != (shard_file(number), first):
            raise ValueError(f"part {number} is not where it should be")
        if part.entries > part.rows * graph.rows:
            raise ValueError(f"part {number} has more entries than pairs")
        first += part.rows
    if first != graph.rows:
        raise ValueError(f"parts have {first} rows of {graph.rows}")
