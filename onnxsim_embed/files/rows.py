"""The one reader of rows: csv, tsv, jsonl, txt (each also gzipped) and parquet.

A blank line is a row of empty cells in every format, so that rows and vectors have the same numbers.
csv is parsed here because the csv module's limit on cells belongs to the process, and it names neither
the line where a row begins nor an unclosed quote before the end of the file.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.parquet import check_file, open_parquet

KINDS = ("csv", "tsv", "jsonl", "parquet", "txt")
DELIMITERS = ",;\t|"

# Lines and characters that are read ahead to find the delimiter and the columns.
SAMPLE_LINES = 1000
SAMPLE_CHARACTERS = 1 << 20

# A quoted cell above this size is an unclosed quote.
MAX_CELL = 1 << 24


class Row(NamedTuple):
    """A row of a file.

    :param line: number of its first line, from 1; 0 in parquet.
    :param values: values by column; a line of plain text is the value of None.
    :param error: why the row is malformed.
    :param source: its line without the line end.
    """

    line: int
    values: dict[str | None, Any]
    error: str | None = None
    source: str = ""


class BlankRow(dict[str | None, Any]):
    """The values of a blank line: every cell is empty."""

    def get(self, key: str | None, default: object = None) -> str:  # type: ignore[override]
        """Return an empty cell."""
        return ""


class Rows:
    """Rows of an open file, to be iterated once.

    :param names: column names; in jsonl, those of the first rows.
    :param plain: whether rows are plain texts instead.
    :param delimiter: the delimiter in use; empty if the format has none.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[Sequence[str] | None], Iterator[Row]],
        delimiter: str = "",
        plain: bool = False,
    ) -> None:
        self.names = list(names)
        self.delimiter = delimiter
        self.plain = plain
        self._read = read

    def __iter__(self) -> Iterator[Row]:
        return self._read(None)

    def only(self, column: str | None) -> Iterator[Row]:
        """Iterate over rows that have at least one column, which saves time in parquet."""
        return self._read(None if column is None else [column])


def kind_of(path: str | Path) -> str:
    """Return the format of a file by its ending; txt for standard input."""
    if str(path) == "-":
        return "txt"
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    ending = suffixes[-1].lstrip(".") if suffixes else ""
    return {"ndjson": "jsonl", "text": "txt"}.get(ending, ending)


@contextmanager
def open_rows(
    path: str | Path,
    kind: str | None = None,
    *,
    delimiter: str | None = None,
    header: bool = True,
    source: IO[bytes] | None = None,
) -> Iterator[Rows]:
    """Open a file of rows.

    :param path: a file, or "-" for standard input.
    :param kind: csv, tsv, jsonl, parquet or txt; None: by the ending.
    :param delimiter: delimiter of csv and tsv; None: detected.
    :param header: whether csv and tsv begin with column names; else the columns are "0", "1", ...
    :param source: stream to read; `path` is then its name only. parquet needs to seek.
    :raises FileNotFoundError: if the file does not exist.
    :raises ValueError: for an unknown format or delimiter, or two columns of one name.
    :raises TableError: if the file is damaged, also while it is read inside the block.
    """
    kind = kind or kind_of(path)
    if kind not in KINDS:
        raise ValueError(
            f"{path}: cannot read files of format {kind!r}; expected one of {', '.join(KINDS)}"
        )
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"the delimiter must be a single character, got {delimiter!r}")
    if kind == "parquet":
        with open_parquet(path, source) as table:
            names = table.schema_arrow.names
            _check_names(path, names)
            yield Rows(names, partial(_parquet_rows, table))
        return
    with open_text(path, source) as stream:
        lines = _Lines(stream)
        try:
            if kind == "txt":
                yield Rows([], lambda _: _text_rows(lines), plain=True)
            elif kind == "jsonl":
                yield _json_rows(lines)
            else:
                yield _delimited_rows(
                    path, lines, delimiter, "\t" if kind == "tsv" else ",", header
                )
        except UnicodeDecodeError as error:
            raise TableError(f"{path} is not UTF-8 {_encoding_advice(path, error)}") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TableError(f"{path} is not a readable gzip file: {error}") from None


class _Lines:
    """Lines of a stream with their ends, counted, of which some may be read ahead."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._ahead: deque[str] = deque()
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._stream)
        self.number += 1
        return line

    def sample(self) -> list[str]:
        """Return the next lines without consuming them."""
        size = sum(map(len, self._ahead))
        for line in self._stream:
            self._ahead.append(line)
            size += len(line)
            if len(self._ahead) >= SAMPLE_LINES or size > SAMPLE_CHARACTERS:
                break
        return list(self._ahead)


def _text_rows(lines: _Lines) -> Iterator[Row]:
    for line in lines:
        text = line.rstrip("\r\n")
        yield Row(lines.number, {None: text}, None, text)


# JSON lines


def _json_rows(lines: _Lines) -> Rows:
    names = dict.fromkeys(name for line in lines.sample() for name in _json_row(line, 0).values)
    return Rows(
        [name for name in names if name is not None],
        lambda _: (_json_row(line, lines.number) for line in lines),
        plain=list(names) == [None],
    )


def _json_row(line: str, number: int) -> Row:
    line = line.rstrip("\r\n")
    if not line.strip():
        return Row(number, BlankRow(), None, line)
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"is not JSON: {error}", line)
    return Row(number, value if isinstance(value, dict) else {None: value}, None, line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has two values of one name")
    return values


# parquet


def _parquet_rows(table: Any, columns: Sequence[str] | None) -> Iterator[Row]:  # noqa: ANN401
    for batch in table.iter_batches(columns=columns, batch_size=4096):
        for values in batch.to_pylist():
            yield Row(0, values)


# csv and tsv


def _delimited_rows(
    path: str | Path, lines: _Lines, delimiter: str | None, usual: str, header: bool
) -> Rows:
    """Return rows of csv or tsv."""
    sample = lines.sample()
    while header and sample and not sample[0].strip("\r\n"):
        next(lines)
        sample = sample[1:]
    marker = re.fullmatch(r'"?sep=(.)"?[\r\n]*', sample[0]) if sample else None
    if marker is not None:  # as Excel writes it
        next(lines)
        sample, delimiter = sample[1:], delimiter or marker[1]
    delimiter = delimiter or _detect_delimiter(sample, usual)
    first = next(_records(iter(sample), delimiter, True), [])
    quoting = not (usual == delimiter == "\t") or _tsv_is_quoted(sample)
    if not quoting:
        first = next(_records(iter(sample), delimiter, False), [])
    if not isinstance(first, list):
        raise TableError(f"{path}, line {lines.number + 1}: {first}")
    names = [str(column) for column in range(len(first))]
    records = _records(lines, delimiter, quoting)
    if header and sample:
        names = [name or f"column {number}" for number, name in enumerate(first, start=1)]
        _check_names(path, names)
        next(records)
    return Rows(names, lambda _: _named(path, lines, records, names), delimiter)


def _named(
    path: str | Path, lines: _Lines, records: Iterator[list[str] | str], names: Sequence[str]
) -> Iterator[Row]:
    """Yield records as rows."""
    while True:
        line = lines.number + 1
        cells = next(records, None)
        if cells is None:
            return
        if isinstance(cells, str):
            if lines.number > line:
                raise TableError(f"{path}, line {line}: {cells}")  # where to go on is not known
            yield Row(line, {}, cells)
        elif len(cells) > len(names):
            yield Row(
                line,
                {},
                f"has {len(cells)} cells, more than the {len(names)} columns: quote texts that hold "
                "the delimiter",
            )
        elif cells == [""]:
            yield Row(line, BlankRow())
        else:
            yield Row(line, dict(zip(names, cells, strict=False)))


def _records(lines: Iterator[str], delimiter: str, quoting: bool) -> Iterator[list[str] | str]:
    """Yield the cells of each record, or what is wrong with it."""
    for line in lines:
        if quoting and '"' in line:
            try:
                yield _split_quoted(line, lines, delimiter)
            except _MalformedError as error:
                yield str(error)
        else:
            yield line.rstrip("\r\n").split(delimiter)


class _MalformedError(Exception):
    """A record is not csv."""


def _split_quoted(line: str, lines: Iterator[str], delimiter: str) -> list[str]:
    """Return the cells of a record by RFC 4180; a quoted cell may continue on the next lines."""
    cells = []
    at = 0
    while True:
        if line.startswith('"', at):
            pieces, size, at = [], 0, at + 1
            while True:
                end = line.find('"', at)
                if end < 0:
                    pieces.append(line[at:])
                    size += len(line) - at
                    line, at = next(lines, ""), 0
                    if not line or size > MAX_CELL:
                        raise _MalformedError("a quote is not closed")
                elif line.startswith('"', end + 1):
                    pieces.append(line[at : end + 1])
                    at = end + 2
                else:
                    pieces.append(line[at:end])
                    at = end + 1
                    break
            cells.append("".join(pieces))
            if line[at:].strip("\r\n") and line[at] != delimiter:
                raise _MalformedError(f"{delimiter!r} expected after a closing quote")
        else:
            end = line.find(delimiter, at)
            cells.append(line[at:end] if end >= 0 else line[at:].rstrip("\r\n"))
            at = end if end >= 0 else len(line)
        if not line.startswith(delimiter, at):
            return cells
        at += 1


def _detect_delimiter(sample: Sequence[str], usual: str) -> str:
    """Return the delimiter that splits most sampled rows like the header: if it does, the usual one."""
    columns = {}
    for delimiter in (usual, *DELIMITERS):
        records = [r for r in _records(iter(sample), delimiter, True) if isinstance(r, list)]
        counts = [len(cells) for cells in records if cells != [""]]
        if counts and counts[0] > 1 and counts.count(counts[0]) > 0.8 * len(counts):
            columns[delimiter] = counts[0]
    return usual if usual in columns else max(columns, key=lambda d: columns[d], default=usual)


def _tsv_is_quoted(sample: Sequence[str]) -> bool:
    """Return whether tsv follows the quoting rules of csv: header quoted, or all quotes as csv's.

    By those rules a cell that holds a quote is quoted, and its quotes are doubled. Where lines read
    without quoting have the right number of cells, doubled quotes are required as evidence.
    """
    text, cell = "".join(sample), '"(?:[^"]|"")*"'
    if re.match(rf"{cell}(?:\t{cell})*(?:[\r\n]|$)", text):
        return True
    quoted = re.findall(rf"(?:^|(?<=[\t\r\n])){cell}(?=[\t\r\n]|$)", text)
    if not quoted or sum(part.count('"') for part in quoted) < text.count('"'):
        return False
    widths = {len(cells) for cells in _records(iter(sample), "\t", True) if cells != [""]}
    plain = {len(cells) for cells in _records(iter(sample), "\t", False) if cells != [""]}
    return len(widths) == 1 and (plain != widths or any('""' in part[1:-1] for part in quoted))


def _check_names(path: str | Path, names: Sequence[str]) -> None:
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"{path} has two columns of one name: {', '.join(repeated)}")


# Encodings


@contextmanager
def open_text(path: str | Path, source: IO[bytes] | None = None) -> Iterator[IO[str]]:
    """Open a text file, gzipped or not, as UTF-8, or as UTF-16 if it begins with its byte order mark.

    :param path: a file, or "-" for standard input.
    :param source: stream to read; `path` is then its name only.
    """
    if source is None and str(path) == "-":
        source = sys.stdin.buffer
    if source is None:
        check_file(path)
        with Path(path).open("rb") as opened, open_text(path, opened) as stream:
            yield stream
        return
    wrapped = None if hasattr(source, "peek") else io.BufferedReader(cast("io.RawIOBase", source))
    data: Any = wrapped or source
    if str(path).lower().endswith(".gz") or data.peek(2)[:2] == b"\x1f\x8b":
        data = gzip.GzipFile(fileobj=data)
    try:
        head = data.peek(512)[:512]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TableError(f"{path} is not a readable gzip file: {error}") from None
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if (
        not utf16
        and head.count(0) > len(head) / 4
        and min(head[::2].count(0), head[1::2].count(0)) == 0
    ):
        order = "le" if head[1::2].count(0) else "be"
        raise TableError(f"{path} is not UTF-8; {_conversion(path, f'utf-16{order}')}")
    stream = io.TextIOWrapper(data, encoding="utf-16" if utf16 else "utf-8-sig", newline="")
    try:
        yield stream
    finally:  # not to close the source, unless it is closed
        with suppress(ValueError):
            stream.detach()
            if wrapped is not None:
                wrapped.detach()


def _encoding_advice(path: str | Path, error: UnicodeDecodeError) -> str:
    try:
        error.object.decode("cp1252")
        encoding = "cp1252"
    except UnicodeDecodeError:
        encoding = "latin1"
    byte = error.object[error.start]
    return f"(byte 0x{byte:02x}: {error.reason}); {_conversion(path, encoding)}"


def _conversion(path: str | Path, encoding: str) -> str:
    unpack = f"gzip -dc {path} | " if str(path).lower().endswith(".gz") else ""
    file = "" if unpack or str(path) == "-" else f" {path}"
    return (
        f"if it is {encoding}, convert it: {unpack}iconv -f {encoding} -t utf-8{file} > converted"
    )
