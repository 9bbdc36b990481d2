"""Any number of vectors in a directory of parquet shards, as `onnxsim_embed.ray` writes them.

vectors/
  job.json               what the vectors depend on: model, input, settings; written first
  part-00000.parquet     columns id and vector, in the order of the input
  rejected.jsonl         diagnostics: id and reason of rows without a usable text, or with an unusual one
  index.json             shards and provenance; written last: it marks the directory as complete
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import json_bytes
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.provenance import METADATA_KEY, Provenance, parse_provenance
from onnxsim_embed.system.arrays import Float32

# Raised when the files change: shards of two versions never make one set.
FORMAT_VERSION = 1
INDEX = "index.json"
JOB = "job.json"
REJECTED = "rejected.jsonl"
SHARD_KEY = b"onnxsim_embed_part"


@dataclass(frozen=True)
class RowDiagnostic:
    """Why a row, by its id, has no vector (`encoded` is False), or what is unusual about its text."""

    id: int | str
    reason: str
    encoded: bool


@dataclass(frozen=True)
class VectorShard:
    """A file of vectors, how many it holds, their digest, and the diagnostics of its rows."""

    file: str
    rows: int
    digest: str
    diagnostics: Sequence[RowDiagnostic] = ()


@dataclass(frozen=True)
class VectorDirectory:
    """Stored vectors: where, their dimension, shards in the order of the rows, and provenance."""

    directory: Directory
    dim: int
    shards: Sequence[VectorShard] = field(repr=False)
    provenance: Provenance

    storage = property(attrgetter("directory"))  # earlier names
    parts = property(attrgetter("shards"))
    origin = property(attrgetter("provenance"))

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return sum(shard.rows for shard in self.shards)

    @property
    def digest(self) -> str:
        """Digest of all vectors."""
        digests = "".join(shard.digest for shard in self.shards) + str(self.dim)
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        """Return a range of vectors, float32 array (rows, dim), from the shards that hold them.

        :raises ValueError: for an invalid range.
        :raises TableError: for a missing or damaged shard.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start} to {stop} of {self.rows:,} vectors")
        vectors = [np.empty((0, self.dim), np.float32)]
        for shard, rows in self._ranges(start, stop):
            values = self._column(shard, "vector").combine_chunks().flatten().to_numpy()
            if values.dtype != np.float32 or len(values) != shard.rows * self.dim:
                raise self._mismatch(shard)
            vectors.append(values.reshape(shard.rows, self.dim)[rows])
        return np.concatenate(vectors)

    def ids(self) -> list[Any]:
        """Return the ids of all vectors: int, or str if they come from a text column."""
        columns = [self._column(shard, "id") for shard, _ in self._ranges(0, self.rows)]
        return [value for column in columns for value in column.to_pylist()]

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[VectorShard, slice]]:
        """Yield the shards that overlap a range of rows, and the rows inside each."""
        offset = 0
        for shard in self.shards:
            first, last = max(start - offset, 0), min(stop - offset, shard.rows)
            if first < last:
                yield shard, slice(first, last)
            offset += shard.rows

    def _column(self, shard: VectorShard, name: str) -> Any:  # noqa: ANN401 - pyarrow is untyped
        import pyarrow
        from pyarrow import parquet

        try:
            with (
                self.directory.open(shard.file) as stream,
                parquet.ParquetFile(stream, page_checksum_verification=True) as table,
            ):
                if _metadata(table).get("digest") != shard.digest:
                    raise self._mismatch(shard)
                column = table.read([name], use_threads=False).column(0)
        except FileNotFoundError:
            raise TableError(f"{self.directory} lacks {shard.file}; encode again") from None
        except (OSError, ValueError, KeyError, AttributeError, pyarrow.ArrowException) as error:
            raise TableError(f"{self.directory}/{shard.file} is damaged: {error}") from None
        if len(column) != shard.rows or column.null_count:
            raise self._mismatch(shard)
        return column

    def _mismatch(self, shard: VectorShard) -> TableError:
        return TableError(f"{self.directory}/{shard.file} does not match {INDEX}; encode again")

    def write_index(self) -> None:
        """Write diagnostics and index, which completes the directory."""
        rejected = [entry for shard in self.shards for entry in shard.diagnostics]
        if rejected:
            lines = (json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in rejected)
            self.directory.write(REJECTED, "".join(lines).encode())
        table = {
            "format_version": FORMAT_VERSION,
            "dim": self.dim,
            "rows": self.rows,
            "without_vector": sum(not entry.encoded for entry in rejected),
            "made_by": self.provenance.to_table(),
            "parts": [[shard.file, shard.rows, shard.digest] for shard in self.shards],
        }
        self.directory.write(INDEX, json_bytes(table))


def shard_file(number: int) -> str:
    """Return the file name of a shard."""
    return f"part-{number:05d}.parquet"


def is_vector_directory(location: str | Path) -> bool:
    """Return whether a local path is a directory of vectors, complete or not."""
    return any((Path(location) / name).is_file() for name in (INDEX, JOB)) and not any(
        Path(location).glob("part-*.npz")  # a similarity graph
    )


def open_vectors(location: str | Path) -> VectorDirectory:
    """Open stored vectors; reads their index only.

    :param location: path or URI.
    :raises FileNotFoundError: if there is no directory of vectors, or it is incomplete.
    :raises TableError: if the index is damaged or of another version.
    """
    directory = Directory(location)
    try:
        data = directory.read(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{directory} is incomplete: the call that writes it continues it"
            if JOB in directory.names()
            else f"{directory} is not a directory of vectors: {INDEX} is missing"
        ) from None
    try:
        table = json.loads(data)
        if table["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {table['format_version']}, expected {FORMAT_VERSION}")
        shards = tuple(VectorShard(*entry) for entry in table["parts"])
        for number, shard in enumerate(shards):
            types = tuple(map(type, (shard.file, shard.rows, shard.digest)))
            if types != (str, int, str) or shard.file != shard_file(number) or shard.rows < 0:
                raise ValueError(f"shard {number}: {shard!r:.60}")
        if type(table["dim"]) is not int or table["dim"] < 1:
            raise ValueError(f"dim {table['dim']!r}")
        return VectorDirectory(directory, table["dim"], shards, parse_provenance(table["made_by"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(
            f"{directory}/{INDEX} is damaged or of another version ({error}); encode again"
        ) from None


def pack_shard(
    ids: Sequence[int] | Sequence[str],
    vectors: Float32,
    diagnostics: Sequence[RowDiagnostic],
    provenance: Provenance,
    id_type: str,
) -> tuple[bytes, str]:
    """Return the parquet content of a shard, and the digest of its vectors."""
    import pyarrow
    from pyarrow import parquet

    values = np.ascontiguousarray(vectors)
    digest = hashlib.sha256(values.data).hexdigest()[:16]
    columns = {
        "id": pyarrow.array(ids, pyarrow.type_for_alias(id_type)),
        "vector": pyarrow.FixedSizeListArray.from_arrays(values.ravel(), vectors.shape[1]),
    }
    remarks = [asdict(entry) for entry in diagnostics]
    metadata = {
        METADATA_KEY: json.dumps(provenance.to_table()),
        SHARD_KEY: json.dumps({"rows": len(ids), "digest": digest, "remarks": remarks}),
    }
    stream = io.BytesIO()
    parquet.write_table(
        pyarrow.table(columns, metadata=metadata),
        stream,
        use_dictionary=False,  # like compression, it costs time and does not make vectors smaller
        compression="none",
        write_page_checksum=True,
    )
    return stream.getvalue(), digest


def read_shard(directory: Directory, number: int) -> VectorShard | None:
    """Return a stored shard from its own metadata; None if it is damaged."""
    import pyarrow
    from pyarrow import parquet

    name = shard_file(number)
    try:
        with directory.open(name) as stream, parquet.ParquetFile(stream) as table:
            shard = _metadata(table)
            diagnostics = tuple(RowDiagnostic(**entry) for entry in shard["remarks"])
            if shard["rows"] != table.metadata.num_rows:
                return None
        return VectorShard(name, shard["rows"], shard["digest"], diagnostics)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None


def _metadata(table: Any) -> Any:  # noqa: ANN401 - pyarrow is untyped
    return json.loads((table.schema_arrow.metadata or {}).get(SHARD_KEY, b"{}"))
