"""Text files -> shards of rows that never change, whoever reads them.

Files are read by `files.texts`, as without an engine, and not by Ray Data's own readers, which turn a csv column
of digits into numbers and reject a cell of several lines.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import IO, Any, cast

from onnxsim_embed.errors import NoTextsError, TableError
from onnxsim_embed.files.locations import open_file
from onnxsim_embed.files.rows import kind_of
from onnxsim_embed.files.texts import iter_column
from onnxsim_embed.files.uris import display_name

# Bytes read from an object store at a time; each request takes tens of milliseconds.
READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Columns:
    """Columns of texts and of ids, and the format of files; None as in `files.texts.iter_texts`."""

    text: str | None = None
    id: str | None = None  # None: numbers of the rows, from 0
    kind: str | None = None


@dataclass(frozen=True)
class TextFile:
    """A surveyed file; id_type is int64 or string, None for a file without rows."""

    location: str
    rows: int
    digest: str
    id_type: str | None

    def changed(self) -> TableError:
        """Return the error for a file whose rows are not those of the survey."""
        return TableError(
            f"{display_name(self.location)} has changed while it was encoded: it had {self.rows:,} rows; "
            "repeat the call with force=True, or for another directory"
        )


@dataclass(frozen=True)
class Group:
    """Files that one task reads one after the other, with the first numbers of its rows and shards."""

    files: tuple[TextFile, ...]
    first_row: int
    first_shard: int

    @property
    def rows(self) -> int:
        """Rows of its files."""
        return sum(file.rows for file in self.files)

    def shards(self, shard_rows: int) -> range:
        """Return the numbers of its shards."""
        return range(self.first_shard, self.first_shard - (-self.rows // shard_rows))


@dataclass(frozen=True)
class TextShard:
    """Rows of a group; values are texts, or what the file holds instead of them."""

    number: int
    ids: list[Any]
    values: list[Any]


class _HashingStream(io.RawIOBase):
    """A stream that digests what is read from it."""

    def __init__(self, stream: IO[bytes], digest: Any) -> None:  # noqa: ANN401 - hashlib's own type is private
        self._stream = stream
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - typeshed's own type is private
        content = self._stream.read(len(buffer))
        self._digest.update(content)
        buffer[: len(content)] = content
        return len(content)


class _BatchedReader(io.BufferedReader):
    """A stream that reads READ_BYTES at a time, also where a decoder asks for less past the buffer."""

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size)


def survey(location: str, columns: Columns) -> TextFile:
    """Count a file's rows, check their ids and digest its content; a file may be empty.

    :raises ValueError: for a column that does not exist.
    :raises TableError: for a damaged file, or an invalid id, naming the row.
    """
    digest, name = hashlib.sha256(), display_name(location)
    rows = sum(1 for _ in _column(location, columns.text, columns.kind, digest))
    common = "int64" if rows and columns.id is None else None
    if rows and columns.id is not None:
        ids = _column(location, columns.id, columns.kind, digest)
        for row, value in enumerate(ids):
            id_type = _id_type(value)
            common = common or id_type
            if id_type is None or id_type != common:
                allowed = f"as before, of type {common}" if id_type else "64-bit integers or texts"
                raise TableError(
                    f"{name}: row {row} has the id {value!r:.60}; ids must be {allowed}"
                )
    return TextFile(location, rows, digest.hexdigest()[:16], common)


def with_rows(files: Sequence[TextFile]) -> tuple[list[TextFile], str]:
    """Return the files that are not empty, and the type of their ids.

    :raises TableError: if all are empty, or ids are of two types.
    """
    used = [file for file in files if file.rows]
    if not used:
        others = f", nor do {len(files) - 1} others" if len(files) > 1 else ""
        raise NoTextsError(f"{display_name(files[0].location)} holds no texts{others}")
    for file in used:
        if file.id_type != used[0].id_type:
            raise TableError(
                f"{display_name(file.location)} has ids of type {file.id_type}, and "
                f"{display_name(used[0].location)} of type {used[0].id_type}: use one type"
            )
    return used, str(used[0].id_type)


def _id_type(value: Any) -> str | None:  # noqa: ANN401 - whatever a file holds
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return "int64"
    if isinstance(value, str) and value.isascii():
        return "string"
    try:
        return "string" if isinstance(value, str) and value.encode() else None
    except UnicodeEncodeError:
        return None


def group_files(files: Sequence[TextFile], shard_rows: int) -> list[Group]:
    """Put small files together, so that a group has at least as many rows as a shard."""
    groups: list[Group] = []
    pending: list[TextFile] = []
    first_row = first_shard = 0
    for number, file in enumerate(files):
        pending.append(file)
        group = Group(tuple(pending), first_row, first_shard)
        if group.rows >= shard_rows or number == len(files) - 1:
            groups.append(group)
            first_row += group.rows
            first_shard = group.shards(shard_rows).stop
            pending = []
    return groups


def read_shards(
    group: Group, columns: Columns, shard_rows: int, id_type: str, finished: Sequence[int]
) -> Iterator[TextShard]:
    """Yield the shards of a group that are not finished; reads no further than the last of them.

    :raises TableError: before the shard in question, if a file has changed since the survey.
    """
    numbers = group.shards(shard_rows)
    missing = sorted(set(numbers) - set(finished))
    with closing(_rows(group, columns, id_type)) as rows:
        for number in range(numbers.start, missing[-1] + 1 if missing else numbers.start):
            chunk = list(islice(rows, shard_rows))
            if number == numbers[-1]:
                next(rows, None)  # raises if the last file has more rows
            if number in missing:
                ids, values = zip(*chunk, strict=True)
                yield TextShard(number, list(ids), list(values))


def _rows(group: Group, columns: Columns, id_type: str) -> Generator[tuple[Any, Any], None, None]:
    first = group.first_row
    for file in group.files:
        rows = 0
        values = _column(file.location, columns.text, columns.kind)
        ids: Iterator[Any] = count(first)
        if columns.id is not None:
            ids = _column(file.location, columns.id, columns.kind)
        for name, value in zip(ids, values, strict=False):
            if rows == file.rows or type(name) is not (int if id_type == "int64" else str):
                raise file.changed()
            yield name, value
            rows += 1
        if rows < file.rows:
            raise file.changed()
        first += file.rows


def _column(
    location: str,
    column: str | None,
    kind: str | None,
    digest: Any = None,  # noqa: ANN401
) -> Iterator[Any]:
    """Yield the values of a column, none if the file is empty, and digest what they are made of."""
    name = display_name(location)
    kind = kind or kind_of(name)
    try:
        with open_file(location) as stream:
            if kind == "parquet":
                for value in iter_column(name, column, kind=kind, source=stream):
                    if digest is not None:
                        digest.update(repr(value).encode() + b"\n")
                    yield value
                return
            raw = stream if digest is None else _HashingStream(stream, digest)
            source = _BatchedReader(cast("io.RawIOBase", raw), READ_BYTES)
            yield from iter_column(name, column, kind=kind, source=source)
    except NoTextsError:
        return
