"""Similarity graphs of any size on disk: a directory of sparse shards, which `graph_writer` writes.

    graph/
      index.json        what the graph is, and the rows of each shard
      part-00000.npz    the first rows, a scipy csr matrix as `scipy.sparse.load_npz` reads it
      diagonal.npy      with a threshold: each row's score with itself, NaN without an entry

With a threshold, each pair is stored once: a shard holds the columns beyond its own rows. With k, a shard holds
complete rows.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.uris import local_path
from onnxsim_embed.similarity.memory import PEAK_ENTRY_BYTES, MemoryBudget
from onnxsim_embed.similarity.sparse import build_matrix, matrix_pairs, symmetric_matrix
from onnxsim_embed.system.units import format_bytes

# Raised when the files or the scores in them change: shards of two versions never make one graph.
FORMAT_VERSION = 1
INDEX = "index.json"
DIAGONAL = "diagonal.npy"

# Upper bound of the header of an array, in units of 8 bytes.
MEMBER_HEADER = 128

# What numpy, scipy and zipfile raise for a damaged file.
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError,
          SyntaxError, TokenError, zipfile.BadZipFile, zlib.error)  # fmt: skip


@dataclass(frozen=True)
class GraphShard:
    """A stored shard: rows `first` to `first + rows`."""

    file: str
    first: int
    rows: int
    entries: int


@dataclass(frozen=True)
class SimilarityGraph:
    """A stored similarity graph.

    :param directory: its directory.
    :param rows: rows and columns of the matrix.
    :param threshold: scores strictly above it are entries; None with k.
    :param k: number of nearest neighbours of each row; None with a threshold.
    :param include_self: whether the diagonal is stored.
    :param vectors: digest of the vectors.
    :param parts: the shards.
    """

    directory: Path
    rows: int
    threshold: float | None
    k: int | None
    include_self: bool
    vectors: str
    parts: Sequence[GraphShard] = field(repr=False)

    @property
    def nnz(self) -> int:
        """Entries of the matrix, both triangles."""
        stored = sum(part.entries for part in self.parts)
        if self.threshold is None:
            return stored
        return 2 * stored + int(np.count_nonzero(~np.isnan(self._diagonal())))

    def blocks(self) -> Iterator[tuple[int, sparse.csr_array]]:
        """Yield the first row and the matrix of each shard, float32 csr_array (rows of the shard, rows).

        With a threshold, a shard has the entries beyond the diagonal only: each pair once.

        :raises TableError: for a shard that is missing, damaged or does not match the index.
        """
        for shard in self.parts:
            path = self.directory / shard.file
            try:
                with path.open("rb") as stream:  # numpy leaves a damaged file open
                    _check_arrays(stream, 8 * (shard.rows + shard.entries + MEMBER_HEADER))
                    stream.seek(0)
                    matrix = sparse.csr_array(sparse.load_npz(stream))
                matrix.check_format(full_check=True)  # an index out of bounds would crash scipy
            except DAMAGE as error:
                raise _damaged(path, error) from None
            if (matrix.shape, matrix.nnz) != ((shard.rows, self.rows), shard.entries):
                raise _damaged(path, f"{INDEX} describes another matrix")
            if matrix.dtype != np.dtype(np.float32):
                raise _damaged(path, f"scores are {matrix.dtype}, not float32")
            yield shard.first, matrix

    def to_matrix(self, *, max_memory: int | None = None) -> sparse.csr_array:
        """Return the complete matrix, as `similarity_matrix` would.

        :param max_memory: maximum bytes to use; None for three quarters of the free memory.
        :returns: float32 csr_array (rows, rows).
        :raises MemoryError: if it does not fit.
        :raises TableError: as `blocks`.
        """
        allowed, need = MemoryBudget(max_memory).max_bytes, self.nnz * PEAK_ENTRY_BYTES
        if allowed is not None and need > allowed:
            raise MemoryError(
                f"building the matrix of {self.directory} takes {format_bytes(need)}, and max_memory "
                f"allows {format_bytes(allowed)}: iterate over its shards with blocks()"
            )
        stored = (matrix_pairs(block) for _, block in self.blocks())
        if self.threshold is None:
            return build_matrix(stored, self.rows)
        return symmetric_matrix(stored, self._diagonal())

    def _diagonal(self) -> npt.NDArray[np.float32]:
        path = self.directory / DIAGONAL
        try:
            with np.errstate(over="ignore"):  # mapped: a shape beyond the file takes no memory
                scores = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        except DAMAGE as error:
            raise _damaged(path, error) from None
        if scores.shape != (self.rows,) or scores.dtype != np.dtype(np.float32):
            raise _damaged(path, f"{scores.dtype} of shape {scores.shape}, expected {self.rows}")
        return scores


def open_graph(directory: str | Path) -> SimilarityGraph:
    """Open a stored similarity graph; reads its index only.

    :raises FileNotFoundError: if there is none.
    :raises TableError: if the index is damaged or of another version.
    """
    directory = local_path(directory)
    path = directory / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a similarity graph: {INDEX} is missing")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version = table.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, expected {FORMAT_VERSION}")
        shards = tuple(GraphShard(**shard) for shard in table.pop("parts"))
        graph = SimilarityGraph(directory=directory, parts=shards, **table)
        _check(graph)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(
            f"{path} is damaged, or of another version of onnxsim-embed ({error}); write the graph again with force=True"
        ) from None
    return graph


def shard_file(number: int) -> str:
    """Return the file name of a shard."""
    return f"part-{number:05d}.npz"


def _damaged(path: Path, reason: object) -> TableError:
    return TableError(f"{path} is damaged: {reason}; write the graph again with force=True")


def _check_arrays(stream: IO[bytes], max_bytes: int) -> None:
    """Raise ValueError, before memory is allocated, if an array is larger than a shard's can be."""
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                header = np.lib.format.read_array_header_2_0
                if version == (1, 0):
                    header = np.lib.format.read_array_header_1_0
                shape, _, dtype = header(member)
            if entry.file_size > max_bytes or math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} is larger than the shard")


def _check(graph: SimilarityGraph) -> None:
    """Raise ValueError if an index contradicts itself, or names other files than shards."""
    counts = [graph.rows]
    for shard in graph.parts:
        counts += [shard.first, shard.rows, shard.entries]
    if any(type(count) is not int or not 0 <= count < 1 << 62 for count in counts):
        raise ValueError("invalid number of rows or entries")
    if not isinstance(graph.include_self, bool) or not isinstance(graph.vectors, str):
        raise ValueError("invalid include_self or vectors")
    if graph.k is None:
        valid = type(graph.threshold) in (int, float) and -1 <= (graph.threshold or 0) <= 1
    else:
        valid = graph.threshold is None and type(graph.k) is int and 1 <= graph.k < graph.rows
    if not valid:
        raise ValueError(f"invalid threshold {graph.threshold!r} and k {graph.k!r}")
    first = 0
    for number, shard in enumerate(graph.parts):
        if (shard.file, shard.first) != (shard_file(number), first):
            raise ValueError(f"shard {number}: expected row offset {first}, found {shard.first}")
        if shard.entries > shard.rows * graph.rows:
            raise ValueError(f"shard {number} has more entries than pairs")
        first += shard.rows
    if first != graph.rows:
        raise ValueError(f"shards have {first} rows, expected {graph.rows}")
