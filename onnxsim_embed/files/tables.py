"""Write tables: columns as csv or tsv, and selected rows of a file in any format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.delimited import DELIMITERS
from onnxsim_embed.files.parquet import open_parquet, require_pyarrow
from onnxsim_embed.files.rows import kind_of, open_rows
from onnxsim_embed.files.texts import SURROGATES
from onnxsim_embed.system.arrays import Int64


def write_rows(columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]], path: str | Path) -> None:
    """Write columns of equal length as csv, tsv or jsonl (by the file's ending), by their names."""
    path = Path(path)
    rows = zip(*columns.values(), strict=True)
    with atomic_file(path) as work, work.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".jsonl":
            tables = (dict(zip(columns, row, strict=True)) for row in rows)
            stream.writelines(f"{json.dumps(each, ensure_ascii=False)}\n" for each in tables)
        else:
            cells = [list(map(str, row)) for row in rows]
            _write_delimited(stream, list(columns), cells, path.suffix)


def _write_delimited(
    stream: IO[str], names: Sequence[str], rows: Sequence[Sequence[str]], ending: str
) -> None:
    """Write csv, or tsv: without quotes, or if a cell cannot do without, with all cells quoted."""
    tsv = ending == ".tsv"
    special = re.compile('[\t\r\n]|^"' if tsv else '[,"\r\n]')
    # A lone name that holds another delimiter would be split by a reader that detects it.
    plain_names = not any(re.search(f'["\r\n{DELIMITERS}]', name) for name in names)
    cells = (cell for row in (names, *rows) for cell in row)
    quote_all = tsv and (any(map(special.search, cells)) or (len(names) == 1 and not plain_names))

    def line(row: Sequence[str], quote: bool) -> str:
        quote = quote or (not tsv and list(row) == [""])  # which would be a blank line
        quoted = [
            '"' + cell.replace('"', '""') + '"'
            if quote or (not tsv and special.search(cell))
            else cell
            for cell in row
        ]
        return ("\t" if tsv else ",").join(quoted) + "\n"

    stream.write(line(names, quote_all or not (tsv or plain_names)))
    stream.writelines(line(row, quote_all) for row in rows)


def row_writer(
    file: str,
    kind: str | None,
    target: str,
    expected: int,
    *,
    delimiter: str | None = None,
    header: bool = True,
    skipped: Collection[int] = (),
) -> Callable[[Path, Int64], None]:
    """Read all rows of a file; return a function of a path and row numbers that writes these rows.

    Whatever cannot be written in the target format is found here, before the function is called.

    :param expected: number of rows that were read before, without skipped ones.
    :param skipped: numbers of rows that were skipped; the function counts rows without them.
    :raises ValueError: if the target format cannot hold the rows.
    """
    kind = kind or kind_of(file)
    if kind == target == "parquet":
        import pyarrow

        with open_parquet(file) as opened:
            content = opened.read()  # whose types stay
        try:
            content = content.filter([number not in skipped for number in range(len(content))])
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{file} has rows that cannot be selected ({error}); write .jsonl"
            ) from None
    else:
        with open_rows(file, kind, delimiter=delimiter, header=header) as opened:
            rows = [row for number, row in enumerate(opened.rows) if number not in skipped]
        names = opened.names
        if kind in ("jsonl", "txt"):  # later rows may have more columns; plain texts have none
            names = list(dict.fromkeys(n or "text" for row in rows for n in row.values)) or ["text"]
        if target == kind and kind in ("jsonl", "txt"):
            content = [row.source for row in rows]
        else:
            cells = [[row.values.get(n, row.values.get(None)) for n in names] for row in rows]
            content = _convert(file, names, cells, target)
    if len(content) != expected:
        raise OnnxsimEmbedError(f"{file} has changed: {expected:,} rows, then {len(content):,}")

    def write(path: Path, kept: Int64) -> None:
        if target == "parquet":
            from pyarrow import parquet

            mask = np.isin(np.arange(len(content)), kept)
            parquet.write_table(content.filter(mask), path)  # take fails for some types
            return
        chosen = [content[row] for row in kept]
        with path.open("w", encoding="utf-8", newline="") as stream:
            if target in ("jsonl", "txt"):
                stream.writelines(f"{line}\n" for line in chosen)
            else:
                _write_delimited(stream, names, chosen, f".{target}")

    return write


def _convert(file: str, names: list[str], rows: list[list[Any]], target: str) -> Any:  # noqa: ANN401
    """Return rows as a pyarrow table, as lines of jsonl or txt, or as rows of strings."""
    if target == "parquet":
        require_pyarrow()
        import pyarrow

        try:
            columns = [list(cells) for cells in zip(*rows, strict=True)] or [[] for _ in names]
            return pyarrow.table(columns, names=names)
        except (pyarrow.ArrowException, UnicodeEncodeError) as error:
            problem = f"{file} has a column of several types ({error}); write .jsonl"
            raise ValueError(problem) from None
    if target == "jsonl":
        tables = (dict(zip(names, values, strict=True)) for values in rows)
        return [_json(file, table) for table in tables]
    texts = [[_cell(file, value) for value in values] for values in rows]
    if target != "txt":
        return texts
    if len(names) > 1 or any(re.search(r"[\r\n]", text) for (text,) in texts):
        raise ValueError(f"{file} has several columns or texts of several lines; write .csv")
    return [text for (text,) in texts]


def _cell(file: str, value: Any) -> str:  # noqa: ANN401 - whatever a file holds
    """Return a value as a cell of csv."""
    if isinstance(value, str) and SURROGATES.search(value):
        raise ValueError(f"{file} holds {value!r:.60}, which is not valid Unicode; write .jsonl")
    if isinstance(value, (dict, list, bool, bytes)):
        return _json(file, value)
    return "" if value is None else str(value)


def _json(file: str, value: Any) -> str:  # noqa: ANN401
    """Return a value as JSON; dates and decimals as texts."""

    def other(value: object) -> str:
        if isinstance(value, bytes):
            raise ValueError(f"{file} holds bytes, which text formats cannot; write .parquet")
        return str(value)

    return json.dumps(value, ensure_ascii=False, default=other)
