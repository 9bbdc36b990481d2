"""Some rows of a file, with all their columns, into a file of the same or another kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.files.texts import kind_of, long_cells, open_text, require_pyarrow


def row_writer(file: str, kind: str | None, target: str, expected: int) -> Callable[..., None]:
    """Read all rows of a file; return a function of a path and an array of rows that writes these.

    :param kind: csv, tsv, jsonl, parquet or txt; None: by the file's ending.
    :param target: the kind to write.
    :param expected: rows that the file is known to have.
    :raises ValueError: if a file of that kind cannot hold the rows.
    """
    kind = kind or kind_of(file)
    if target == "parquet":
        table = _arrow_table(file, kind)
        from pyarrow import parquet

        return lambda path, kept: parquet.write_table(table.take(kept), path)
    names, rows, lines = _read_rows(file, kind)
    if len(rows) != expected:
        raise OnnxsimEmbedError(f"{file} has changed: {expected:,} rows, then {len(rows):,}")
    if target in ("jsonl", "txt") and target != kind:
        lines = _as_lines(file, names, rows, target)

    def write(path: Path, kept: npt.NDArray[np.int64]) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            if target in ("jsonl", "txt"):
                stream.writelines(f"{lines[row]}\n" for row in kept)
                return
            delimiter = "\t" if target == "tsv" else ","
            writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
            writer.writerow(names)
            writer.writerows([_cell(value) for value in rows[row]] for row in kept)

    return write


def _read_rows(file: str, kind: str) -> tuple[list[str], list[list[Any]], list[str]]:
    """Return the names of columns, the cells of each row, and each row's line where it has one."""
    if kind == "parquet":
        table = _arrow_table(file, kind)
        columns = [column.to_pylist() for column in table.columns]
        return table.column_names, [list(row) for row in zip(*columns, strict=True)], []
    with open_text(file) as stream:
        if kind in ("csv", "tsv"):
            with long_cells():
                reader = csv.reader(stream, delimiter="\t" if kind == "tsv" else ",", strict=True)
                names, *rows = [row for row in reader if row]
            return names, [row + [""] * (len(names) - len(row)) for row in rows], []
        lines = [line.rstrip("\r\n") for line in stream]
    if kind == "txt":
        return ["text"], [[line] for line in lines], lines
    lines = [line for line in lines if line.strip()]
    values = [json.loads(line) for line in lines]
    tables = [value if isinstance(value, dict) else {"text": value} for value in values]
    names = list(dict.fromkeys(name for table in tables for name in table))
    return names, [[table.get(name) for name in names] for table in tables], lines


def _arrow_table(file: str, kind: str) -> Any:  # noqa: ANN401 - pyarrow is untyped
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    if kind == "parquet":
        return parquet.read_table(file)
    names, rows, _ = _read_rows(file, kind)
    _check_names(file, names)
    try:
        return pyarrow.table([list(cells) for cells in zip(*rows, strict=True)], names=names)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} has a column of several types ({error}); write .jsonl") from None


def _as_lines(file: str, names: list[str], rows: list[list[Any]], target: str) -> list[str]:
    if target == "jsonl":
        _check_names(file, names)
        tables = [dict(zip(names, row, strict=True)) for row in rows]
        return [json.dumps(table, ensure_ascii=False, default=str) for table in tables]
    lines = [_cell(row[0]) for row in rows]
    if len(names) > 1 or any(character in line for line in lines for character in "\r\n"):
        raise ValueError(f"{file} has several columns or texts of several lines; write .csv")
    return lines


def _check_names(file: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{file} has two columns of one name; write .csv")


def _cell(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, (dict, list, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)
