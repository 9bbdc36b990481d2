"""Vectors of any number in a directory of parquet parts, which `onnxsim_embed.ray` writes.

vectors/
  job.json               what the vectors depend on: model, input, settings; written first
  part-00000.parquet     columns id and vector, in the order of the input
  rejected.jsonl         the id of each row without a usable text, or with an unusual one, and why; where there are any
  index.json             the parts and what made them; written last: its presence means whole
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.locations import Storage
from onnxsim_embed.files.provenance import METADATA_KEY, Provenance, parse_provenance

# Raised when the files change: parts of two versions never make one set.
FORMAT_VERSION = 1
INDEX = "index.json"
JOB = "job.json"
REJECTED = "rejected.jsonl"
PART_KEY = b"onnxsim_embed_part"

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowDiagnostic:
    """What is to be said of a row.

    :param id: its id.
    :param reason: why it has no vector, or what is unusual about its text.
    :param encoded: whether it has a vector.
    """

    id: int | str
    reason: str
    encoded: bool


@dataclass(frozen=True)
class VectorShard:
    """A stored part.

    :param rows: vectors in it.
    :param digest: of its vectors.
    :param remarks: on its rows.
    """

    file: str
    rows: int
    digest: str
    remarks: Sequence[RowDiagnostic] = ()


@dataclass(frozen=True)
class VectorDirectory:
    """Stored vectors.

    :param storage: where they are.
    :param dim: width of a vector.
    :param parts: in order.
    :param origin: what made them.
    """

    storage: Storage
    dim: int
    parts: Sequence[VectorShard]
    origin: Provenance

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return sum(part.rows for part in self.parts)

    @property
    def digest(self) -> str:
        """What tells these vectors apart from others."""
        whole = "".join(part.digest for part in self.parts) + str(self.dim)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        """Return some vectors, float32 array (rows, dim); all where nothing else is said.

        Only the parts that hold them are read.

        :raises ValueError: for rows that there are not.
        :raises TableError: for a part that is missing or damaged.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start} to {stop} of {self.rows:,} vectors")
        vectors = np.empty((stop - start, self.dim), np.float32)
        filled = 0
        for part, rows in self._parts(start, stop):
            count = rows.stop - rows.start
            vectors[filled : filled + count] = self._vectors(part)[rows]
            filled += count
        return vectors

    def ids(self) -> list[Any]:
        """Return the ids of the vectors, in order; int, or str if they come from a column of texts."""
        return [
            value
            for part, _ in self._parts(0, self.rows)
            for value in self._column(part, "id").to_pylist()
        ]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[VectorShard, slice]]:
        first = 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, part.rows)
            if begin < end:
                yield part, slice(begin, end)
            first += part.rows

    def _vectors(self, part: VectorShard) -> Float32:
        column = self._column(part, "vector").combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False)
        if values.dtype != np.float32 or len(values) != part.rows * self.dim:
            raise TableError(self._strange(part))
        return values.reshape(part.rows, self.dim)

    def _column(self, part: VectorShard, name: str) -> Any:  # noqa: ANN401 - pyarrow is untyped
        """Read a column of a part, and nothing else of it."""
        import pyarrow
        from pyarrow import parquet

        try:
            with (
                self.storage.open(part.file) as stream,
                parquet.ParquetFile(stream, page_checksum_verification=True) as table,
            ):
                told = json.loads((table.schema_arrow.metadata or {}).get(PART_KEY, b"{}"))
                if told.get("digest") != part.digest:
                    raise TableError(self._strange(part))
                column = table.read([name], use_threads=False).column(0)
        except FileNotFoundError:
            raise TableError(f"{self.storage} lacks {part.file}; encode again") from None
        except (OSError, ValueError, KeyError, AttributeError, pyarrow.ArrowException) as error:
            raise TableError(f"{self.storage}/{part.file} is damaged: {error}") from None
        if len(column) != part.rows or column.null_count:
            raise TableError(self._strange(part))
        return column

    def _strange(self, part: VectorShard) -> str:
        return f"{self.storage}/{part.file} is not what {INDEX} says; encode again"

    def write_index(self) -> None:
        """Write the index, after which the directory is whole."""
        remarks = [remark for part in self.parts for remark in part.remarks]
        if remarks:
            lines = "".join(
                json.dumps(asdict(remark), ensure_ascii=False) + "\n" for remark in remarks
            )
            self.storage.write(REJECTED, lines.encode())
        table = {
            "format_version": FORMAT_VERSION,
            "dim": self.dim,
            "rows": self.rows,
            "without_vector": sum(not remark.encoded for remark in remarks),
            "made_by": self.origin.to_table(),
            "parts": [[part.file, part.rows, part.digest] for part in self.parts],
        }
        self.storage.write(INDEX, (json.dumps(table, indent=1) + "\n").encode())


def part_file(number: int) -> str:
    """Return the name of a part's file."""
    return f"part-{number:05d}.parquet"


def is_vector_directory(location: str | Path) -> bool:
    """Return whether a local path is a directory of vectors, whole or not."""
    return any((Path(location) / name).is_file() for name in (INDEX, JOB)) and not any(
        Path(location).glob("part-*.npz")  # a similarity graph
    )


def open_vectors(location: str | Path) -> VectorDirectory:
    """Open stored vectors; reads their index only.

    :param location: path or URI.
    :raises FileNotFoundError: if there is no directory of vectors, or it is not whole.
    :raises TableError: if the index is damaged or of another version.
    """
    storage = Storage.at(location)
    try:
        data = storage.read(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        half = JOB in storage.names()
        raise FileNotFoundError(
            f"{storage} holds vectors of an unfinished job: give the encode command again, which does the rest"
            if half
            else f"{storage} is no directory of vectors: it holds no {INDEX}"
        ) from None
    try:
        table = json.loads(data)
        if table["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {table['format_version']}, known is {FORMAT_VERSION}")
        parts = tuple(VectorShard(*_checked(part, i)) for i, part in enumerate(table["parts"]))
        dim = table["dim"]
        if type(dim) is not int or dim < 1:
            raise ValueError(f"dim {dim!r}")
        return VectorDirectory(storage, dim, parts, parse_provenance(table["made_by"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(
            f"{storage}/{INDEX} is damaged, or of another version of onnxsim-embed ({error}); encode again"
        ) from None


def _checked(part: Any, number: int) -> tuple[str, int, str]:  # noqa: ANN401 - from JSON
    """Refuse a part that is not where it should be.

    :raises ValueError: naming it.
    """
    file, rows, digest = part
    if (
        file != part_file(number)
        or type(rows) is not int
        or rows < 0
        or not isinstance(digest, str)
    ):
        raise ValueError(f"part {number} is {part!r:.60}")
    return file, rows, digest


def pack_shard(
    ids: Sequence[int] | Sequence[str],
    vectors: Float32,
    remarks: Sequence[RowDiagnostic],
    origin: Provenance,
    id_type: str,
) -> tuple[bytes, str]:
    """Return a part as parquet, and the digest of its vectors.

    :param ids: of the rows that have a vector.
    :param vectors: float32 array (n, dim).
    :param id_type: int64 or string.
    """
    import pyarrow
    from pyarrow import parquet

    values = np.ascontiguousarray(vectors)
    digest = hashlib.sha256(values.data).hexdigest()[:16]
    kind = pyarrow.list_(pyarrow.float32(), vectors.shape[1])
    id_kind = pyarrow.type_for_alias(id_type)
    told = {"rows": len(ids), "digest": digest, "remarks": [asdict(remark) for remark in remarks]}
    schema = pyarrow.schema(
        [("id", id_kind), ("vector", kind)],
        metadata={
            METADATA_KEY: json.dumps(origin.to_table()).encode(),
            PART_KEY: json.dumps(told).encode(),
        },
    )
    columns = [
        pyarrow.array(ids, id_kind),
        pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), type=kind),
    ]
    stream = io.BytesIO()
    parquet.write_table(
        pyarrow.table(columns, schema=schema),
        stream,
        use_dictionary=False,  # both but cost time: vectors do not get smaller
        compression="none",
        write_page_checksum=True,
    )
    return stream.getvalue(), digest


def read_shard(storage: Storage, number: int) -> VectorShard | None:
    """Return what a stored part says of itself; None where it is damaged."""
    import pyarrow
    from pyarrow import parquet

    try:
        with storage.open(part_file(number)) as stream, parquet.ParquetFile(stream) as table:
            told = json.loads((table.schema_arrow.metadata or {})[PART_KEY])
            if told["rows"] != table.metadata.num_rows:
                return None
        remarks = tuple(RowDiagnostic(**remark) for remark in told["remarks"])
        return VectorShard(part_file(number), told["rows"], told["digest"], remarks)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None
