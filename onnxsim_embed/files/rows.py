"""The one reader of rows: csv, tsv, jsonl, txt (each also gzipped) and parquet.

A blank line is a row of empty cells in every format, so that rows and vectors have the same numbers.
csv is parsed here: the csv module's limit on cells belongs to the process, and it names neither the
line where a row begins nor an unclosed quote before the end of the file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.delimited import detect_delimiter, split_records, tsv_is_quoted
from onnxsim_embed.files.parquet import check_file, open_parquet
from onnxsim_embed.files.uris import display_name, local_path

KINDS = ("csv", "tsv", "jsonl", "parquet", "txt")

# Lines and characters that are read ahead to find the delimiter and the columns.
SAMPLE_LINES = 1000
SAMPLE_CHARACTERS = 1 << 20

# First bytes of files that are often taken for text files.
MAGIC = {
    b"PK\3\4": "a zip archive, as .xlsx is: save it as csv",
    b"PAR1": "parquet: pass kind='parquet'",
    b"\x93NUMPY": "an array",
    codecs.BOM_UTF32_LE: "UTF-32: convert it to UTF-8",
    codecs.BOM_UTF32_BE: "UTF-32: convert it to UTF-8",
}


class Row(NamedTuple):
    """A row of a file."""

    line: int  # number of its first line, from 1; 0 in parquet
    values: dict[str | None, Any]  # by column; a plain text is the value of None
    error: str | None = None  # why the row is malformed
    source: str = ""  # its line without the line end


class BlankRow(dict[str | None, Any]):
    """The values of a blank line: every cell is empty."""

    def get(self, key: str | None, default: object = None) -> str:
        """Return an empty cell."""
        return ""


@dataclass
class Rows:
    """An open file of rows."""

    names: list[str]  # columns; in jsonl, those of the first rows
    rows: Iterator[Row]  # to be iterated once
    delimiter: str = ""  # in use; empty if the format has none
    plain: bool = False  # whether rows are plain texts instead of columns
    columns: list[str] | None = None  # to read of parquet, set before the iteration; None for all
    warning: str = ""  # what may be a mistake


def kind_of(path: str | Path) -> str:
    """Return the format of a file by its ending; txt for standard input."""
    if str(path) == "-":
        return "txt"
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
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
    """Open a file of rows; for the parameters see `iter_texts`."""
    path = display_name(path) if source is not None or str(path) == "-" else local_path(path)
    kind = kind or kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"{path}: unknown format {kind!r}; expected one of {', '.join(KINDS)}")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"the delimiter must be a single character, got {delimiter!r}")
    if kind == "parquet":
        with open_parquet(path, source) as table:
            opened = Rows(_checked_names(path, table.schema_arrow.names), iter(()))
            opened.rows = _parquet_rows(table, opened)
            yield opened
        return
    try:
        with open_text(path, source) as stream:
            lines = _Lines(stream)
            if kind == "txt":
                texts = (line.rstrip("\r\n") for line in lines)
                rows = (Row(lines.number, {None: text}, None, text) for text in texts)
                yield Rows([], rows, plain=True)
            elif kind == "jsonl":
                yield _json_rows(lines)
            else:
                yield _delimited_rows(path, lines, delimiter, kind, header)
    except UnicodeDecodeError as error:
        try:
            error.object.decode("cp1252")
            encoding = "cp1252"
        except UnicodeDecodeError:
            encoding = "latin1"
        raise _not_utf8(path, encoding, f" (byte 0x{error.object[error.start]:02x})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TableError(f"{path} is not a readable gzip file: {error}") from None


def _parquet_rows(table: Any, rows: Rows) -> Iterator[Row]:  # noqa: ANN401 - pyarrow is untyped
    for batch in table.iter_batches(columns=rows.columns, batch_size=4096):
        for values in batch.to_pylist():
            yield Row(0, values)


class _Lines(Iterator[str]):
    """Lines of a stream with their ends, counted; some may be read ahead."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._ahead, self.number = stream, deque[str](), 0

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._stream)
        self.number += 1
        return line

    def sample(self) -> list[str]:
        """Return the next lines without consuming them."""
        size = 0
        while len(self._ahead) < SAMPLE_LINES and size < SAMPLE_CHARACTERS:
            if not (line := next(self._stream, "")):
                break
            self._ahead.append(line)
            size += len(line)
        return list(self._ahead)


# JSON lines


def _json_rows(lines: _Lines) -> Rows:
    names = list(dict.fromkeys(name for line in lines.sample() for name in _json_row(line).values))
    return Rows(
        [name for name in names if name is not None],
        (_json_row(line, lines.number) for line in lines),
        plain=names == [None],
    )


def _json_row(line: str, number: int = 0) -> Row:
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


# csv and tsv


def _delimited_rows(
    path: str | Path, lines: _Lines, delimiter: str | None, kind: str, header: bool
) -> Rows:
    sample = lines.sample()
    while header and sample and not sample[0].strip("\r\n"):
        sample.pop(0)
        next(lines)
    if sample and (
        marker := re.fullmatch(r'"?sep=(.)"?\1*[\r\n]*', sample[0])
    ):  # as Excel writes it
        sample.pop(0)
        next(lines)
        delimiter = delimiter or marker[1]
    quoting, warning = not (kind == "tsv" and delimiter == "\t"), ""
    delimiter = delimiter or detect_delimiter(sample, "\t" if kind == "tsv" else ",")
    if quoting and kind == "tsv" and delimiter == "\t" and (quoting := tsv_is_quoted(sample)):
        warning = "quotes were read by the rules of csv; pass delimiter='\\t' if texts hold them"
    first = next(split_records(iter(sample), delimiter, quoting), [])
    if isinstance(first, str):
        raise TableError(f"{path}, line {lines.number + 1}: the header {first}")
    names = [str(column) for column in range(len(first))]
    records = split_records(lines, delimiter, quoting)
    if header:
        names = [name or f"column {number}" for number, name in enumerate(first, start=1)]
        next(records, None)
    rows = _named(path, lines, records, names)
    return Rows(_checked_names(path, names), rows, delimiter, warning=warning)


def _named(
    path: str | Path, lines: _Lines, records: Iterator[list[str] | str], names: Sequence[str]
) -> Iterator[Row]:
    """Yield records as rows."""
    line = lines.number + 1
    for cells in records:
        if isinstance(cells, str):
            if lines.number > line:  # it is not known where the next row begins
                raise TableError(f"{path}, line {line}: the row {cells}")
            yield Row(line, {}, cells)
        elif len(cells) > len(names):
            counts = f"has {len(cells)} cells, more than the {len(names)} columns"
            yield Row(line, {}, f"{counts}: quote texts that hold the delimiter")
        else:
            blank = cells == [""] or (len(cells) < len(names) and not "".join(cells).strip())
            yield Row(line, BlankRow() if blank else dict(zip(names, cells, strict=False)))
        line = lines.number + 1


def _checked_names(path: str | Path, names: list[str]) -> list[str]:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has two columns of one name: {', '.join(repeated)}")
    return names


@contextmanager
def open_text(path: str | Path, source: IO[bytes] | None = None) -> Iterator[IO[str]]:
    """Open a text file, gzipped or not, as UTF-8, or as UTF-16 if it begins with its byte order mark."""
    if source is None and str(path) != "-":
        check_file(path)
        with Path(path).open("rb") as opened, open_text(path, opened) as stream:
            yield stream
        return
    source = source or sys.stdin.buffer
    wrapped = None if hasattr(source, "peek") else io.BufferedReader(cast("io.RawIOBase", source))
    data: Any = wrapped or source
    if str(path).lower().endswith(".gz") or data.peek(2)[:2] == b"\x1f\x8b":
        data = gzip.GzipFile(fileobj=data)
    head = data.peek(512)[:512]
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise TableError(f"{path} is not a text file but {what}")
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    nulls = head[::2].count(0), head[1::2].count(0)
    if not utf16 and sum(nulls) > len(head) / 4 and 0 in nulls:
        raise _not_utf8(path, "utf-16le" if nulls[1] else "utf-16be", "")
    stream = io.TextIOWrapper(data, encoding="utf-16" if utf16 else "utf-8-sig", newline="")
    try:
        yield stream
    finally:  # not to close the source, unless it is closed
        with suppress(ValueError):
            stream.detach()
            if wrapped is not None:
                wrapped.detach()


def _not_utf8(path: str | Path, encoding: str, byte: str) -> TableError:
    convert = f"iconv -f {encoding} -t utf-8"
    if str(path).lower().endswith(".gz"):
        convert = f"gzip -dc {path} | {convert}"
    elif str(path) != "-":
        convert += f" {path}"
    return TableError(
        f"{path} is not UTF-8{byte}; if it is {encoding}, convert it: {convert} > converted"
    )
