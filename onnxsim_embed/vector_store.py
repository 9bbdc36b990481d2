"""Vectors of any number in a directory of parquet parts, which `onnxsim_embed.ray` writes.

vectors/
  job.json               what the vectors depend on: model, input, settings; written first
  part-00000.parquet     columns id and vector, in the order of the input
  rejected.jsonl         the id of each row without a usable text, and why; where there are any
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
from onnxsim_embed.origins import METADATA_KEY, VectorOrigin, parse_origin
from onnxsim_embed.storage import Storage

# Raised when the files change: parts of two versions never make one set.
FORMAT_VERSION = 1
INDEX = "index.json"
JOB = "job.json"
REJECTED = "rejected.jsonl"
PART_KEY = b"onnxsim_embed_part"

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Remark:
    """What is to be said of a row.

    :param id: its id.
    :param reason: why it has no vector, or what is unusual about its text.
    :param encoded: whether it has a vector.
    """

    id: int | str
    reason: str
    encoded: bool


@dataclass(frozen=True)
class VectorPart:
    """A stored part.

    :param rows: vectors in it.
    :param digest: of its vectors.
    :param remarks: on its rows.
    """

    file: str
    rows: int
    digest: str
    remarks: Sequence[Remark] = ()


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
    parts: Sequence[VectorPart]
    origin: VectorOrigin

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

        :raises TableError: for a part that is missing or damaged.
        """
        stop = self.rows if stop is None else stop
        blocks = [np.zeros((0, self.dim), np.float32)]
        for part, rows in self._parts(start, stop):
            table = self._table(part)
            values = table.column("vector").combine_chunks().flatten().to_numpy()
            if values.dtype != np.float32 or len(values) != part.rows * self.dim:
                raise TableError(f"{self.storage.location}/{part.file} is not what {INDEX} says")
            blocks.append(values.reshape(part.rows, self.dim)[rows])
        return np.concatenate(blocks)

    def ids(self) -> list[Any]:
        """Return the ids of the vectors, in order."""
        return [
            value
            for part, _ in self._parts(0, self.rows)
            for value in self._table(part).column("id").to_pylist()
        ]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[VectorPart, slice]]:
        first = 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, part.rows)
            if begin < end:
                yield part, slice(begin, end)
            first += part.rows

    def _table(self, part: VectorPart) -> Any:  # noqa: ANN401 - pyarrow is untyped
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.read_table(io.BytesIO(self.storage.read(part.file)))
        except (OSError, pyarrow.ArrowException) as error:
            raise TableError(f"{self.storage.location}/{part.file} is damaged: {error}") from None
        if len(table) != part.rows or table.column_names != ["id", "vector"]:
            raise TableError(f"{self.storage.location}/{part.file} is not what {INDEX} says")
        return table

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
            f"{location} holds vectors of an unfinished job: give the encode command again, which does the rest"
            if half
            else f"{location} is no directory of vectors: it holds no {INDEX}"
        ) from None
    try:
        table = json.loads(data)
        if table["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {table['format_version']}, known is {FORMAT_VERSION}")
        parts = tuple(VectorPart(*_checked(part, i)) for i, part in enumerate(table["parts"]))
        dim = table["dim"]
        if type(dim) is not int or dim < 1:
            raise ValueError(f"dim {dim!r}")
        return VectorDirectory(storage, dim, parts, parse_origin(table["made_by"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(
            f"{location}/{INDEX} is damaged, or of another version of onnxsim-embed ({error}); encode again"
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


def pack_part(
    ids: Sequence[int] | Sequence[str],
    vectors: Float32,
    remarks: Sequence[Remark],
    origin: VectorOrigin,
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
    parquet.write_table(pyarrow.table(columns, schema=schema), stream)
    return stream.getvalue(), digest


def read_part(storage: Storage, number: int) -> VectorPart | None:
    """Return what a stored part says of itself; None where it is damaged."""
    import pyarrow
    from pyarrow import parquet

    try:
        with storage.open(part_file(number)) as stream:
            told = json.loads((parquet.read_schema(stream).metadata or {})[PART_KEY])
        remarks = tuple(Remark(**remark) for remark in told["remarks"])
        return VectorPart(part_file(number), told["rows"], told["digest"], remarks)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None
