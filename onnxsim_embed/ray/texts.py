"""From files to shards of texts: a survey of the files, groups of small ones, and the rows of each shard.

A shard has the same rows in every run: they depend on the files and the rows of a shard, not on the cluster.
Files are read by `files.texts`, as without an engine, and not by Ray Data's own readers, which turn a csv column
of digits into numbers and reject a cell of several lines.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import NoTextsError, TableError
from onnxsim_embed.files.locations import file_version, open_file
from onnxsim_embed.files.rows import Row, kind_of
from onnxsim_embed.files.texts import ReadReport, iter_rows, row_id
from onnxsim_embed.files.uris import display_name

# Bytes read from an object store at a time; each request takes tens of milliseconds.
READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Columns:
    """How files are read; see `files.texts.iter_texts`."""

    text: str | None = None
    id: str | None = None  # None: numbers of the rows, from 0
    kind: str | None = None
    delimiter: str | None = None
    header: bool = True
    on_error: str = "skip"


@dataclass(frozen=True)
class TextFile:
    """A surveyed file.

    :param id_type: int64 or string, None for a file without rows.
    :param version: what changes when the file is written.
    :param id_hashes: 64 bits for each row's id.
    """

    location: str
    rows: int
    digest: str
    id_type: str | None
    version: str
    report: ReadReport
    id_hashes: npt.NDArray[np.uint64] = field(compare=False, repr=False)

    def changed(self) -> TableError:
        """Return the error for a file whose rows are not those of the survey."""
        return TableError(
            f"{display_name(self.location)} has changed while it was encoded: it had {self.rows:,} rows; "
            "repeat the call with force=True, or for another directory"
        )

    def check(self) -> None:
        """Raise TableError if the file was written since the survey."""
        if file_version(self.location) != self.version:
            raise self.changed()


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
    """Rows of a group; `problems` says why rows, by their position, have no text."""

    number: int
    ids: list[Any]
    texts: list[str]
    problems: Mapping[int, str]


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
    """Count a file's rows, check their texts and ids, and digest its content; a file may be empty.

    :raises ValueError: for a column that does not exist.
    :raises TableError: for a damaged file, an invalid id, or with on_error="fail" a row without a text.
    """
    digest, report, version = hashlib.sha256(), ReadReport(), file_version(location)
    common, hashes = None, bytearray()
    for text, problem, row in _read(location, columns, report, digest):
        if not text.strip() and not problem:
            report.empty.append(report.rows - 1)
        name = _row_id(location, columns, report.rows - 1, row, problem)
        if columns.id is None or name is None:
            continue
        id_type = "int64" if isinstance(name, int) else "string"
        common = common or id_type
        if id_type != common:
            raise TableError(
                f"{display_name(location)}: row {report.rows - 1} has the id {name!r:.60}; ids must be as "
                f"before, of type {common}"
            )
        hashes += hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    if report.rows and columns.id is None:
        common = "int64"
    return TextFile(
        location, report.rows, digest.hexdigest()[:16], common, version, report,
        np.frombuffer(bytes(hashes), np.uint64),
    )  # fmt: skip


def with_rows(files: Sequence[TextFile]) -> tuple[list[TextFile], str]:
    """Return the files that are not empty, and the type of their ids.

    :raises TableError: if all are empty, or ids are of two types.
    """
    used = [file for file in files if file.rows]
    if not used:
        others = f", nor do {len(files) - 1} others" if len(files) > 1 else ""
        raise NoTextsError(f"{display_name(files[0].location)} holds no texts{others}")
    typed = [file for file in used if file.id_type]
    for file in typed:
        if file.id_type != typed[0].id_type:
            raise TableError(
                f"{display_name(file.location)} has ids of type {file.id_type}, and "
                f"{display_name(typed[0].location)} of type {typed[0].id_type}: use one type"
            )
    return used, str(typed[0].id_type) if typed else "string"


def repeated_ids(files: Sequence[TextFile]) -> int:
    """Return the number of ids that an earlier row has too, by 64-bit digests."""
    hashes = np.concatenate([file.id_hashes for file in files])
    return len(hashes) - len(np.unique(hashes))


def _row_id(location: str, columns: Columns, number: int, row: Row, problem: str) -> Any:  # noqa: ANN401
    """Return the id of a row; None where the row is malformed and skipped."""
    if columns.id is None:
        return number
    if row.error and problem and columns.on_error == "skip":
        return None
    name = row_id(display_name(location), number, row, columns.id)
    if isinstance(name, bool) or (isinstance(name, int) and not -(1 << 63) <= name < 1 << 63):
        raise TableError(
            f"{display_name(location)}: row {number} has the id {name}; ids must be 64-bit integers or texts"
        )
    return name


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
    group: Group, columns: Columns, shard_rows: int, finished: Sequence[int]
) -> Iterator[TextShard]:
    """Yield the shards of a group that are not finished; reads no further than the last of them.

    :raises TableError: before the shard in question, if a file has changed since the survey.
    """
    numbers = group.shards(shard_rows)
    missing = sorted(set(numbers) - set(finished))
    with closing(_rows(group, columns)) as rows:
        for number in range(numbers.start, missing[-1] + 1 if missing else numbers.start):
            chunk = list(islice(rows, shard_rows))
            if number == numbers[-1]:
                next(rows, None)  # raises if the last file has more rows
            if number in missing:
                ids, texts, problems = map(list, zip(*chunk, strict=True))
                unusable = {row: reason for row, reason in enumerate(problems) if reason}
                yield TextShard(number, ids, texts, unusable)


def _rows(group: Group, columns: Columns) -> Generator[tuple[Any, str, str], None, None]:
    """Yield the id of each row, its text, and why it has none."""
    first = group.first_row
    for file in group.files:
        file.check()
        report = ReadReport()
        for text, problem, row in _read(file.location, columns, report):
            number = report.rows - 1
            if number == file.rows:
                raise file.changed()
            name = _row_id(file.location, columns, number, row, problem)
            if name is None:
                name = f"{display_name(file.location)}: row {number}"
            yield first + number if columns.id is None else name, text, problem
        if report.rows < file.rows:
            raise file.changed()
        file.check()
        first += file.rows


def _read(
    location: str,
    columns: Columns,
    report: ReadReport,
    digest: Any = None,  # noqa: ANN401
) -> Iterator[tuple[str, str, Row]]:
    """Yield the rows of a file, none if it is empty, and digest what they are made of."""
    name = display_name(location)
    parquet = (columns.kind or kind_of(name)) == "parquet"
    with suppress(NoTextsError), open_file(location) as source:
        if not parquet:
            raw = source if digest is None else _HashingStream(source, digest)
            source = _BatchedReader(cast("io.RawIOBase", raw), READ_BYTES)
        for text, problem, row in iter_rows(
            name, columns.text, source=source, report=report, on_error=columns.on_error,
            id_column=columns.id, kind=columns.kind, delimiter=columns.delimiter, header=columns.header,
        ):  # fmt: skip
            if parquet and digest is not None:
                digest.update(repr(problem or text).encode() + b"\n")
                if columns.id is not None:
                    digest.update(repr(row.values.get(columns.id)).encode() + b"\n")
            yield text, problem, row
