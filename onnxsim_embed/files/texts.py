"""Texts in (csv, tsv, jsonl, parquet, txt, each also gzipped but parquet), columns out (csv, tsv)."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt

from onnxsim_embed.errors import MissingExtraError, NoTextsError, TableError
from onnxsim_embed.files.atomic import atomic_file

KINDS = ("csv", "tsv", "jsonl", "parquet", "txt")

# Names that mean "the text to embed" where a table has several columns and none was asked for.
TEXT_COLUMNS = ("text", "title_and_description", "sentence")

# A cell above this is more likely a lost quote than a text; the csv module's own limit is 128 KiB.
LONGEST_CELL = 1 << 28


def iter_texts(
    path: str | Path, column: str | None = None, *, kind: str | None = None
) -> Iterator[str]:
    """Yield the texts of a file in order, reading as it goes.

    :param path: a file, or "-" for standard input.
    :param column: the column that holds texts; None where there is one, or one called text,
        title_and_description or sentence. Files of plain lines have no columns.
    :param kind: csv, tsv, jsonl, parquet or txt; None: by the file's ending, txt for standard input.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the column is not there (naming those that are) or the kind is unknown.
    :raises TableError: if the file is empty, not UTF-8, damaged, or holds a row without a text,
        naming the row. Rows are counted from 0, as in the vectors.
    """
    for row, value in enumerate(iter_column(path, column, kind=kind)):
        if not isinstance(value, str):
            raise TableError(
                f"{path}: row {row} holds {'no text (null)' if value is None else repr(value)[:60]}; "
                "fill it with '' or drop the row"
            )
        yield value


def iter_column(
    path: str | Path,
    column: str | None = None,
    *,
    kind: str | None = None,
    source: IO[bytes] | None = None,
) -> Iterator[Any]:
    """Yield the raw values of one column; see `iter_texts`.

    :param source: what to read instead of the file, which then only names it; parquet needs to seek.
    """
    kind = kind or kind_of(path)
    if kind not in KINDS:
        raise ValueError(
            f"{path}: cannot read files of kind {kind!r}; known are {', '.join(KINDS)}"
        )
    if kind == "parquet":
        empty = True
        for value in _parquet_column(path, column, source):
            empty = False
            yield value
        if empty:
            raise NoTextsError(f"{path} holds no texts")
        return
    with open_text(path, source) as stream:
        reader = {
            "csv": _csv_column,
            "tsv": _csv_column,
            "jsonl": _jsonl_column,
            "txt": _txt_lines,
        }[kind]
        try:
            empty = True
            for value in reader(stream, str(path), column, "\t" if kind == "tsv" else ","):
                empty = False
                yield value
        except UnicodeDecodeError as error:
            raise TableError(
                f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); convert it, "
                f"for example: iconv -f latin1 -t utf-8 {path} > converted"
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TableError(f"{path} is not a readable gzip file: {error}") from None
        if empty:
            raise NoTextsError(f"{path} holds no texts")


def kind_of(path: str | Path) -> str:
    """Return a file's kind by its ending; txt for standard input."""
    if str(path) == "-":
        return "txt"
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    ending = suffixes[-1].lstrip(".") if suffixes else ""
    return {"ndjson": "jsonl", "text": "txt"}.get(ending, ending)


@contextmanager
def open_text(path: str | Path, source: IO[bytes] | None = None) -> Iterator[IO[str]]:
    """Open a text file, gzipped or not, or standard input, as UTF-8.

    :param source: what to read instead of the file.
    """
    if str(path) == "-":
        yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        return
    if source is None:
        _check_file(Path(path))
        with Path(path).open("rb") as opened, open_text(path, opened) as stream:
            yield stream
    elif str(path).lower().endswith(".gz"):
        with gzip.open(source, "rt", encoding="utf-8-sig", newline="") as stream:
            yield stream
    else:
        with io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as stream:
            yield stream


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a file")


def _choose_column(path: str, names: Sequence[str], column: str | None) -> str:
    if column is not None:
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(names)}")
        return column
    if len(names) == 1:
        return names[0]
    for name in TEXT_COLUMNS:
        if name in names:
            return name
    raise ValueError(f"{path} has several columns; choose one with --column: {', '.join(names)}")


@contextmanager
def long_cells() -> Iterator[None]:
    """Let the csv module read cells of up to LONGEST_CELL characters for a while."""
    old = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(old)


def _csv_column(stream: IO[str], path: str, column: str | None, delimiter: str) -> Iterator[Any]:
    with long_cells():
        try:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            names = reader.fieldnames
            if not names:
                return
            name = _choose_column(path, names, column)
            for row in reader:
                if None in row:
                    raise TableError(
                        f"{path}, line {reader.line_num} has more cells than the {len(names)} columns of "
                        "the header: quote texts that hold the delimiter"
                    )
                yield row[name]
        except csv.Error as error:
            raise TableError(f"{path}, line {reader.line_num}: {error}") from None


def _jsonl_column(stream: IO[str], path: str, column: str | None, _: str) -> Iterator[Any]:
    found = False
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TableError(f"{path}, line {number} is not JSON: {error}") from None
        if isinstance(value, dict):
            if column is None:
                column = _choose_column(path, list(value), None)
            if column not in value and not found:
                raise ValueError(
                    f"{path}, line {number} has no column {column!r}; it has: {', '.join(value)}"
                )
            found = True
            value = value.get(column)  # left out by a later line: as good as null
        elif column is not None:
            raise ValueError(
                f"{path}, line {number} holds no columns, so --column {column!r} names nothing"
            )
        yield value


def _txt_lines(stream: IO[str], path: str, column: str | None, _: str) -> Iterator[str]:
    if column is not None:
        raise ValueError(f"{path} is plain text, one text a line: it has no column {column!r}")
    for line in stream:
        yield line.rstrip("\r\n")


def require_pyarrow() -> None:
    """Raise MissingExtraError where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError("reading and writing parquet", "parquet", "pyarrow")


def _parquet_column(
    path: str | Path, column: str | None, source: IO[bytes] | None
) -> Iterator[Any]:
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    if source is None:
        _check_file(Path(path))
    try:
        with parquet.ParquetFile(path if source is None else source) as table:
            name = _choose_column(str(path), table.schema_arrow.names, column)
            for batch in table.iter_batches(columns=[name], batch_size=4096):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise TableError(f"{path} is not a readable parquet file: {error}") from None


def read_scored_pairs(path: str | Path) -> tuple[list[str], list[str], list[float]]:
    """Read text, text, score from the first three columns of a csv or tsv file.

    A first line whose third column is no number is a header.

    :raises FileNotFoundError: if there is no such file.
    :raises TableError: naming the line that has no two texts and a number.
    """
    left: list[str] = []
    right: list[str] = []
    scores: list[float] = []
    with open_text(path) as stream:
        delimiter = "\t" if kind_of(path) == "tsv" else ","
        try:
            for number, row in enumerate(csv.reader(stream, delimiter=delimiter), start=1):
                try:
                    score = float(row[2])
                except (IndexError, ValueError):
                    if number == 1 and len(row) > 2:
                        continue
                    raise TableError(
                        f"{path}, line {number}: expected text, text, score; got {row!r:.80}"
                    ) from None
                left.append(row[0])
                right.append(row[1])
                scores.append(score)
        except UnicodeDecodeError as error:
            raise TableError(f"{path} is not UTF-8: {error.reason}") from None
    if not scores:
        raise TableError(f"{path} holds no scored pairs")
    return left, right, scores


def write_rows(columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]], path: str | Path) -> None:
    """Write columns of equal length as csv (or tsv, by the file's ending), with a header."""
    path = Path(path)
    with atomic_file(path) as work, work.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(
            stream, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n"
        )
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
