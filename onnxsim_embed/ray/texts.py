"""Files of texts -> parts of texts whose rows and numbers never change, whoever reads them.

Files are read by `tables`, as the command without an engine reads them, and not by Ray Data's own readers:
those turn a csv column of digits into numbers, and refuse a cell of several lines.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import IO, Any, cast

from onnxsim_embed.errors import NoTextsError, TableError
from onnxsim_embed.files.locations import open_file
from onnxsim_embed.files.rows import kind_of
from onnxsim_embed.files.texts import iter_column
from onnxsim_embed.files.uris import display_name

# Asked of an object store at a time; each request takes some tens of milliseconds.
READ_BYTES = 4 << 20


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
    :param digest: of its bytes; of parquet, of what is in the columns.
    :param id_type: int64 or string; None where there are no rows.
    """

    location: str
    rows: int
    digest: str
    id_type: str | None


@dataclass(frozen=True)
class Group:
    """Files that one task reads, one after the other.

    :param first_row: rows of the files before.
    :param first_part: number of the first part.
    """

    files: tuple[TextFile, ...]
    first_row: int
    first_part: int

    @property
    def rows(self) -> int:
        """Rows of its files."""
        return sum(file.rows for file in self.files)

    def parts(self, part_rows: int) -> range:
        """Return the numbers of its parts."""
        return range(self.first_part, self.first_part - (-self.rows // part_rows))


@dataclass(frozen=True)
class TextPart:
    """Rows of a group of files.

    :param values: texts, or whatever is in their place.
    """

    number: int
    ids: list[Any]
    values: list[Any]


class _Hashing(io.RawIOBase):
    """A stream that digests what is read from it."""

    def __init__(self, stream: IO[bytes], digest: Any) -> None:  # noqa: ANN401 - hashlib's own type is private
        self._stream = stream
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - typeshed's own type is private
        data = self._stream.read(len(buffer))
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)


class _Blocks(io.BufferedReader):
    """A stream that is read READ_BYTES at a time, however little of it is asked for."""

    def read1(self, size: int = -1, /) -> bytes:
        """Return as many bytes; the decoder asks for 8 KiB so, which else go past the buffer."""
        return self.read(size)


def survey(location: str, columns: Columns) -> TextFile:
    """Count a file's rows, check their ids and digest its content; a file may be empty.

    :raises ValueError: as `tables.iter_texts`, as are the rest.
    :raises TableError: for a row whose id is missing, or neither a whole number nor a text, or of
        another type than those before, naming it.
    """
    digest = hashlib.sha256()
    rows = sum(1 for _ in _column(location, columns.text, columns.kind, digest))
    id_type = None
    if rows:
        ids = [0] if columns.id is None else _column(location, columns.id, columns.kind, digest)
        id_type = _common_type(ids, display_name(location))
    return TextFile(location, rows, digest.hexdigest()[:16], id_type)


def with_rows(files: Sequence[TextFile]) -> tuple[list[TextFile], str]:
    """Return the files that are not empty, and the type of their ids.

    :raises TableError: if all are empty, or their ids are of two types.
    """
    used = [file for file in files if file.rows]
    if not used:
        others = f", nor do {len(files) - 1} others" if len(files) > 1 else ""
        raise NoTextsError(f"{display_name(files[0].location)} holds no texts{others}")
    first = used[0]
    for file in used:
        if file.id_type != first.id_type:
            raise TableError(
                f"{display_name(file.location)} has ids of type {file.id_type}, and {display_name(first.location)} "
                f"of type {first.id_type}: let all be numbers, or all texts"
            )
    return used, str(first.id_type)


def _common_type(ids: Iterable[Any], name: str) -> str:
    common = None
    for row, value in enumerate(ids):
        found = _id_type(value, name, row)
        common = common or found
        if found != common:
            raise TableError(
                f"{name}: row {row} has the id {value!r:.60}, of type {found}, those before are of type "
                f"{common}: let all be numbers, or all texts"
            )
    return str(common)


def _id_type(value: Any, name: str, row: int) -> str:  # noqa: ANN401 - whatever a file holds
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return "int64"
    if isinstance(value, str):
        try:
            value.encode()
            return "string"
        except UnicodeEncodeError:
            pass
    what = "no id (null)" if value is None else f"the id {value!r:.60}"
    raise TableError(f"{name}: row {row} has {what}; ids are whole numbers of 64 bits, or texts")


def group_files(files: Sequence[TextFile], part_rows: int) -> list[Group]:
    """Put small files together, so that a group has as many rows as a part, or more.

    :param files: each with rows.
    """
    groups: list[Group] = []
    held: list[TextFile] = []
    first_row = first_part = 0
    for number, file in enumerate(files):
        held.append(file)
        group = Group(tuple(held), first_row, first_part)
        if group.rows >= part_rows or number == len(files) - 1:
            groups.append(group)
            first_row += group.rows
            first_part = group.parts(part_rows).stop
            held = []
    return groups


def read_parts(
    group: Group, columns: Columns, part_rows: int, id_type: str, done: Sequence[int]
) -> Iterator[TextPart]:
    """Yield the parts of a group that are not done; reads no further than the last of them.

    :raises TableError: if a file has other rows than at first, or an id is of another type: before
        the part in question.
    """
    parts = group.parts(part_rows)
    missing = sorted(set(parts) - set(done))
    with closing(_rows(group, columns, id_type)) as rows:
        for number in range(parts.start, missing[-1] + 1 if missing else parts.start):
            chunk = list(islice(rows, part_rows))
            if number == parts[-1]:
                next(rows, None)  # which the last file has not
            if number in missing:
                ids, values = zip(*chunk, strict=True)
                yield TextPart(number, list(ids), list(values))


def _rows(group: Group, columns: Columns, id_type: str) -> Generator[tuple[Any, Any], None, None]:
    first = group.first_row
    for file in group.files:
        found = 0
        values = _column(file.location, columns.text, columns.kind)
        names: Iterator[Any] = count(first)
        if columns.id is not None:
            names = _column(file.location, columns.id, columns.kind)
        for name, value in zip(names, values, strict=False):
            if found == file.rows or (columns.id is not None and not _is_of(id_type, name)):
                raise _changed(file)
            yield name, value
            found += 1
        if found < file.rows:
            raise _changed(file)
        first += file.rows


def _is_of(id_type: str, value: object) -> bool:
    return type(value) is (int if id_type == "int64" else str)


def _changed(file: TextFile) -> TableError:
    return TableError(
        f"{display_name(file.location)} has changed while it was encoded: it had {file.rows:,} rows; give the "
        "same command again, with --force or another directory"
    )


def _column(
    location: str,
    column: str | None,
    kind: str | None,
    digest: Any = None,  # noqa: ANN401
) -> Iterator[Any]:
    """Yield the values of a column; none where the file is empty.

    :param digest: gets what they are made of.
    """
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
            raw = stream if digest is None else _Hashing(stream, digest)
            source = _Blocks(cast("io.RawIOBase", raw), READ_BYTES)
            yield from iter_column(name, column, kind=kind, source=source)
    except NoTextsError:
        return
