"""Write tables: columns as csv or tsv, and selected rows of a file in any format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.rows import DELIMITERS, kind_of, open_rows


def write_rows(columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]], path: str | Path) -> None:
    """Write columns of equal length as csv (or tsv, by the file's ending), with a header."""
    path = Path(path)
    rows = [list(map(str, row)) for row in zip(*columns.values(), strict=True)]
    with atomic_file(path) as work, work.open("w", encoding="utf-8", newline="") as stream:
        _write_delimited(stream, list(columns), rows, "\t" if path.suffix == ".tsv" else ",")


def _write_delimited(
    stream: IO[str], names: Sequence[str], rows: Sequence[Sequence[str]], delimiter: str
) -> None:
    """Write csv, or tsv: without quotes, or if a cell cannot do without, with all cells quoted."""
    special = re.compile(r"[\t\r\n]" if delimiter == "\t" else r'[,"\r\n]')
    name_special = re.compile(rf'["\r\n{re.escape(DELIMITERS)}]')  # of which one would be detected
    quote_all = delimiter == "\t" and (
        any(special.search(cell) or cell.startswith('"') for row in (names, *rows) for cell in row)
        or (len(names) == 1 and name_special.search(names[0]) is not None)
    )

    def line(cells: Sequence[str], quoted: re.Pattern[str]) -> str:
        blank = delimiter == "," and list(cells) == [""]
        return delimiter.join(
            '"' + cell.replace('"', '""') + '"'
            if quote_all or blank or quoted.search(cell)
            else cell
            for cell in cells
        )

    stream.write(line(names, name_special if delimiter == "," else _NEVER) + "\n")
    stream.writelines(f"{line(row, special if delimiter == ',' else _NEVER)}\n" for row in rows)


_NEVER = re.compile(r"(?!)")


def row_writer(
    file: str,
    kind: str | None,
    target: str,
    expected: int,
    *,
    delimiter: str | None = None,
    header: bool = True,
    skipped: Collection[int] = (),
) -> Callable[[Path, npt.NDArray[np.int64]], None]:
    """Read all rows of a file; return a function of a path and row numbers that writes these rows.

    Whatever cannot be written in the target format is found here, before the function is called.

    :param kind: csv, tsv, jsonl, parquet or txt; None: by the file's ending.
    :param target: format to write.
    :param expected: number of rows that were read before, without skipped ones.
    :param delimiter: as for `iter_texts`, as is `header`.
    :param skipped: numbers of rows that were skipped; the function counts rows without them.
    :raises ValueError: if the target format cannot hold the rows.
    """
    kind = kind or kind_of(file)
    if kind == target == "parquet":
        return _arrow_writer(file, expected, skipped)
    with open_rows(file, kind, delimiter=delimiter, header=header) as opened:
        names = opened.names or ["text"]
        rows = [row for number, row in enumerate(opened) if number not in skipped]
    if len(rows) != expected:
        raise OnnxsimEmbedError(f"{file} has changed: {expected:,} rows, then {len(rows):,}")
    if kind == "jsonl":  # later rows may have more columns
        names = list(dict.fromkeys(n or "text" for row in rows for n in row.values)) or ["text"]
    cells = [[row.values.get(n, row.values.get(None) if n == "text" else None) for n in names] for row in rows]  # fmt: skip
    if target == "parquet":
        return _table_writer(file, names, cells)
    if target == kind and kind in ("jsonl", "txt"):
        return _line_writer([row.source for row in rows])
    if target == "jsonl":
        tables = (dict(zip(names, values, strict=True)) for values in cells)
        return _line_writer([json.dumps(t, ensure_ascii=False, default=str) for t in tables])
    texts = [[_cell(file, value) for value in values] for values in cells]
    if target == "txt":
        if len(names) > 1 or any(re.search(r"[\r\n]", text) for (text,) in texts):
            raise ValueError(f"{file} has several columns or texts of several lines; write .csv")
        return _line_writer([text for (text,) in texts])

    def write(path: Path, kept: npt.NDArray[np.int64]) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            chosen = [texts[row] for row in kept]
            _write_delimited(stream, names, chosen, "\t" if target == "tsv" else ",")

    return write


def _line_writer(lines: Sequence[str]) -> Callable[[Path, npt.NDArray[np.int64]], None]:
    def write(path: Path, kept: npt.NDArray[np.int64]) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            stream.writelines(f"{lines[row]}\n" for row in kept)

    return write


def _table_writer(
    file: str, names: Sequence[str], rows: Iterable[Sequence[Any]]
) -> Callable[[Path, npt.NDArray[np.int64]], None]:
    from onnxsim_embed.files.parquet import require_pyarrow

    require_pyarrow()
    import pyarrow

    try:
        columns = [list(cells) for cells in zip(*rows, strict=True)] or [[] for _ in names]
        table = pyarrow.table(columns, names=names)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} has a column of several types ({error}); write .jsonl") from None
    return _parquet_writer(table)


def _arrow_writer(
    file: str, expected: int, skipped: Collection[int]
) -> Callable[[Path, npt.NDArray[np.int64]], None]:
    """Return a writer of a parquet file's own table, whose types stay."""
    from onnxsim_embed.files.parquet import open_parquet

    with open_parquet(file) as opened:
        table = opened.read()
    keep = np.ones(len(table), bool)
    keep[list(skipped)] = False
    if keep.sum() != expected:
        raise OnnxsimEmbedError(f"{file} has changed: {expected:,} rows, then {keep.sum():,}")
    return _parquet_writer(table, np.flatnonzero(keep))


def _parquet_writer(
    table: Any,  # noqa: ANN401 - pyarrow is untyped
    rows: npt.NDArray[np.int64] | None = None,
) -> Callable[[Path, npt.NDArray[np.int64]], None]:
    from pyarrow import parquet

    def write(path: Path, kept: npt.NDArray[np.int64]) -> None:
        mask = np.zeros(len(table), bool)
        mask[kept if rows is None else rows[kept]] = True
        parquet.write_table(table.filter(mask), path)

    return write


def _cell(file: str, value: Any) -> str:  # noqa: ANN401 - whatever a file holds
    """Return a value as a cell of csv.

    :raises ValueError: for bytes.
    """
    if isinstance(value, bytes):
        raise ValueError(f"{file} holds bytes, which text formats cannot; write .parquet")
    if isinstance(value, (dict, list, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)
