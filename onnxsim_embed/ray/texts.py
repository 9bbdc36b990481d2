"""Files of texts -> parts of texts whose rows and numbers never change, whoever reads them.

Files are read by `tables`, as the command without an engine reads them, and not by Ray Data's own readers:
those turn a csv column of digits into numbers, and refuse a cell of several lines.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, cast

from onnxsim_embed.errors import TableError
from onnxsim_embed.storage import open_file
from onnxsim_embed.tables import iter_column, kind_of

# A parquet file's end holds its schema, the place of each column and, in most files, smallest and
# largest values: it tells files apart that are of one size.
FOOTER_BYTES = 1 << 16


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    :param text: the texts; None where a file has one, or one called text or the like.
    :param id: the rows' names; None for their numbers, from 0.
    :param kind: csv, tsv, jsonl, parquet or txt; None: by each file's ending.
    """

    text: str | None = None
    id: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class TextFile:
    """A file.

    :param rows: its rows.
    :param digest: of its bytes.
    :param id_type: int64 or string.
    """

    location: str
    rows: int
    digest: str
    id_type: str


@dataclass(frozen=True)
class Group:
    """Files that one task reads, one after the other.

    :param first_row: rows of the files before.
    :param first_part: number of the first part.
    :param rows: rows of the group.
    """

    files: tuple[str, ...]
    first_row: int
    first_part: int
    rows: int

    def parts(self, part_rows: int) -> range:
        """Return the numbers of its parts."""
        return range(self.first_part, self.first_part - (-self.rows // part_rows))


@dataclass(frozen=True)
class TextPart:
    """Rows of a file.

    :param values: texts, or whatever is in their place.
    """

    number: int
    ids: list[Any]
    values: list[Any]


class _Hashing(io.RawIOBase):
    """A stream that digests what is read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - typeshed's own type is private
        data = self._stream.read(len(buffer))
        self.digest.update(data)
        buffer[: len(data)] = data
        return len(data)


def survey(location: str, columns: Columns) -> TextFile:
    """Count a file's rows and digest its bytes.

    :raises ValueError: as `tables.iter_texts`, as are the rest.
    """
    kind = columns.kind or kind_of(location)
    with open_file(location) as stream:
        if kind == "parquet":
            return _survey_parquet(location, columns, stream)
        hashing = _Hashing(stream)
        source = io.BufferedReader(hashing, 1 << 20)
        values = iter_column(location, columns.text, kind=kind, source=cast("IO[bytes]", source))
        rows = sum(1 for _ in values)
    id_type = "int64"
    if columns.id is not None:
        with open_file(location) as stream:
            first = next(iter_column(location, columns.id, kind=kind, source=stream))
            id_type = "int64" if type(first) is int else "string"
    return TextFile(location, rows, hashing.digest.hexdigest()[:16], id_type)


def _survey_parquet(location: str, columns: Columns, stream: IO[bytes]) -> TextFile:
    from pyarrow import parquet, types

    next(iter_column(location, columns.text, kind="parquet", source=stream))
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - FOOTER_BYTES))
    digest = hashlib.sha256(stream.read() + str(size).encode()).hexdigest()[:16]
    table = parquet.ParquetFile(stream)
    id_type = "int64"
    if columns.id is not None:
        if columns.id not in table.schema_arrow.names:
            raise ValueError(
                f"{location} has no column {columns.id!r}; it has: {', '.join(table.schema_arrow.names)}"
            )
        whole = types.is_integer(table.schema_arrow.field(columns.id).type)
        id_type = "int64" if whole else "string"
    return TextFile(location, table.metadata.num_rows, digest, id_type)


def group_files(files: Sequence[TextFile], part_rows: int) -> list[Group]:
    """Put small files together, so that a group has as many rows as a part, or more."""
    groups: list[Group] = []
    held: list[str] = []
    first_row = first_part = rows = 0
    for number, file in enumerate(files):
        held.append(file.location)
        rows += file.rows
        if rows >= part_rows or number == len(files) - 1:
            groups.append(Group(tuple(held), first_row, first_part, rows))
            first_row += rows
            first_part = groups[-1].parts(part_rows).stop
            held, rows = [], 0
    return groups


def read_parts(
    group: Group, columns: Columns, part_rows: int, id_type: str, done: Sequence[int]
) -> Iterator[TextPart]:
    """Yield the parts of a group that are not done.

    :raises TableError: if a file has other rows than at first, or an id is of another type.
    """
    rows = _rows(group, columns, id_type)
    finished = frozenset(done)
    left = group.rows
    for number in group.parts(part_rows):
        chunk = list(islice(rows, min(part_rows, left)))
        left -= len(chunk)
        if not chunk:
            raise TableError(f"{', '.join(group.files)}: fewer rows than at first; it has changed")
        if number not in finished:
            ids, values = zip(*chunk, strict=True)
            yield TextPart(number, list(ids), list(values))
    if left or next(rows, None) is not None:
        raise TableError(f"{', '.join(group.files)}: other rows than at first; it has changed")


def _rows(group: Group, columns: Columns, id_type: str) -> Iterator[tuple[Any, Any]]:
    row = group.first_row
    for file in group.files:
        with _values(file, columns.text, columns.kind) as values:
            if columns.id is None:
                for value in values:
                    yield row, value
                    row += 1
                continue
            with _values(file, columns.id, columns.kind) as ids:
                for name, value in zip(ids, values, strict=True):
                    yield _checked_id(name, id_type, file), value


def _checked_id(name: Any, id_type: str, file: str) -> int | str:  # noqa: ANN401 - whatever a file holds
    if id_type == "int64" and type(name) is int:
        return name
    if id_type == "string" and name is not None:
        return name if isinstance(name, str) else str(name)
    raise TableError(f"{file}: the id {name!r:.60} is not of type {id_type}, as others are")


@contextmanager
def _values(file: str, column: str | None, kind: str | None) -> Iterator[Iterator[Any]]:
    with open_file(file) as stream:
        yield iter_column(file, column, kind=kind or kind_of(file), source=stream)
