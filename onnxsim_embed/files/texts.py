"""Texts of a file: which column holds them, and what happens to rows without a text."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from onnxsim_embed.errors import NoTextsError, TableError
from onnxsim_embed.files.delimited import DELIMITERS
from onnxsim_embed.files.rows import Row, Rows, kind_of, open_rows
from onnxsim_embed.files.uris import display_name

logger = logging.getLogger(__name__)

# Names that mean "the text to embed" where a table has several columns and none was chosen.
TEXT_COLUMNS = ("text", "title_and_description", "sentence")

# Row numbers that a message lists.
LISTED = 10

# Halves of characters, which JSON can hold and no encoding.
SURROGATES = re.compile("[\ud800-\udfff]")

ON_ERROR = ("fail", "skip", "blank")


@dataclass
class ReadReport:
    """What a reader decided and what it found; filled while the texts are read."""

    column: str | None = None  # None if the rows are plain texts
    reason: str = ""  # why that column
    delimiter: str = ""  # of csv and tsv
    rows: int = 0  # of the file so far
    ids: list[Any] = field(default_factory=list)  # of each text so far, with an id column
    empty: list[int] = field(default_factory=list)  # rows with an empty text, from 0
    skipped: dict[int, str] = field(default_factory=dict)  # rows without a text, and why
    blanked: dict[int, str] = field(default_factory=dict)  # the same, read as an empty text
    warnings: list[str] = field(default_factory=list)  # what may be a mistake

    def describe(self) -> str:
        """Return a line on the column and the delimiter."""
        column = "one text per line" if self.column is None else f"column {self.column!r}"
        reason = f" ({self.reason})" if self.reason else ""
        return column + reason + (f", delimiter {self.delimiter!r}" if self.delimiter else "")

    def problems(self) -> list[str]:
        """Return a line for each warning, and for rows that are empty, skipped or blanked."""
        lines = list(self.warnings)
        for rows, state in ((self.skipped, "skipped"), (self.blanked, "read as empty")):
            if rows:
                reasons = [f"row {row} {reason}" for row, reason in islice(rows.items(), LISTED)]
                count = f"{len(rows):,} of {self.rows:,} rows {'was' if len(rows) == 1 else 'were'}"
                lines.append(f"{count} {state}: {'; '.join(reasons)}{_more(rows)}")
        if self.empty:
            verb = "is" if len(self.empty) == 1 else "are"
            count = f"{len(self.empty):,} of {self.rows:,} texts {verb} empty"
            lines.append(f"{count}: {list_rows(self.empty)}")
        return lines


def list_rows(rows: Collection[Any]) -> str:
    """Return row numbers for a message: "row 7", "rows 7, 9, 41 and 20 more"."""
    numbers = ", ".join(str(row) for row in islice(rows, LISTED))
    return f"row{'s' * (len(rows) > 1)} {numbers}{_more(rows)}"


def _more(rows: Collection[int]) -> str:
    return f" and {len(rows) - LISTED:,} more" if len(rows) > LISTED else ""


def iter_texts(
    path: str | Path,
    column: str | None = None,
    *,
    kind: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    on_error: str = "fail",
    id_column: str | None = None,
    report: ReadReport | None = None,
    source: IO[bytes] | None = None,
) -> Iterator[str]:
    """Yield the texts of a file in order, reading lazily.

    Rows are counted from 0, as in the vectors. A blank line is a row with an empty text, which is a
    text like any other; a null, a missing cell and a value that is not a string are errors.

    :param path: a file, or "-" for standard input.
    :param column: the column that holds texts; None if there is one, or one called text,
        title_and_description or sentence. Files of plain lines have no columns.
    :param kind: csv, tsv, jsonl, parquet or txt; None: by the file's ending, txt for standard input.
    :param delimiter: delimiter of csv and tsv; None: detected, as are quotes in tsv. tsv has none if
        the delimiter is given as a tab; kind="csv" follows the rules of csv.
    :param header: whether csv and tsv begin with column names; else the columns are "0", "1", ...
    :param on_error: "fail" raises at the first row without a text, "skip" skips such rows, "blank"
        yields an empty text for them.
    :param id_column: column of ids, which are put into the report.
    :param report: filled with what was decided and found; None: warnings are logged.
    :param source: stream to read; `path` is then its name only. parquet needs to seek.
    :raises FileNotFoundError: if the file does not exist.
    :raises ValueError: if the column does not exist (naming those that do) or an argument is invalid.
    :raises TableError: if the file is empty, damaged or not UTF-8, or a row has no text, naming it.
    """
    log, report = report is None, report if report is not None else ReadReport()
    for text, problem, row in iter_rows(
        path, column, kind=kind, delimiter=delimiter, header=header, on_error=on_error,
        id_column=id_column, report=report, source=source,
    ):  # fmt: skip
        number = report.rows - 1
        if problem:
            (report.skipped if on_error == "skip" else report.blanked)[number] = problem
        if problem and on_error == "skip":
            continue
        if not text.strip():
            report.empty.append(number)
        if id_column is not None:
            report.ids.append(row_id(path, number, row, id_column))
        yield text
    for message in report.problems() if log else ():
        logger.warning("%s: %s", display_name(path), message)


def iter_rows(
    path: str | Path,
    column: str | None = None,
    *,
    report: ReadReport,
    on_error: str = "fail",
    id_column: str | None = None,
    **opening: Any,  # noqa: ANN401 - keyword arguments of `open_rows`
) -> Iterator[tuple[str, str, Row]]:
    """Yield the text of each row, what is wrong with it (then the text is empty), and the row.

    For the parameters see `iter_texts`; only the number of rows and the columns are reported.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
    with open_rows(path, **opening) as rows:
        name = _choose_column(display_name(path), column, rows, report)
        # An empty file has no columns.
        if id_column is not None and id_column not in rows.names and (rows.names or rows.plain):
            names = ", ".join(rows.names) or "none"
            raise ValueError(f"{display_name(path)} has no column {id_column!r}; it has: {names}")
        rows.columns = [c for c in (name, id_column) if c is not None] or None
        row = None
        for row in rows.rows:
            if report.reason == "the only column" and len(row.values) > 1:
                names = f"{', '.join(map(str, row.values))}, rows before it only {name!r}"
                raise ValueError(
                    f"{_place(path, report.rows, row)} has the columns {names}: pass column"
                )
            value: Any = row.values.get(name, row.values.get(None))
            if problem := text_problem(value):
                problem = row.error or problem
            if problem and on_error == "fail":
                advice = "fix the row, or pass on_error='skip' or on_error='blank'"
                raise TableError(f"{_place(path, report.rows, row)} {problem}; {advice}")
            report.rows += 1
            yield "" if problem else value, problem, row
    if row is None:
        raise NoTextsError(f"{display_name(path)} holds no texts")


def text_problem(value: object) -> str:
    """Return why a value is not a text; an empty string if it is one."""
    if isinstance(value, str) and not SURROGATES.search(value):
        return ""
    held = "null" if value is None else repr(value)[:60]
    return f"has no {'valid Unicode ' if isinstance(value, str) else ''}text ({held})"


def read_scored_pairs(
    path: str | Path, *, delimiter: str | None = None, header: bool = True, on_error: str = "fail"
) -> tuple[list[str], list[str], list[float]]:
    """Read text, text, score from the first three columns of a csv, tsv, jsonl or parquet file.

    :param delimiter: as for `iter_texts`.
    :param header: whether a first row of csv or tsv without a number as its score holds column names.
    :param on_error: "fail" raises at the first row that is no pair, "skip" logs and skips such rows.
    :raises TableError: if there are no pairs, or for such a row, naming it.
    """
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error must be fail or skip for pairs, got {on_error!r}")
    kind = kind_of(path) if kind_of(path) in ("tsv", "jsonl", "parquet") else "csv"
    header = header and kind in ("csv", "tsv")
    pairs: list[tuple[str, str, float]] = []
    skipped: list[int] = []
    with open_rows(path, kind, delimiter=delimiter, header=False) as rows:
        for number, row in enumerate(rows.rows):
            left, right, score = (row.values.get(name) for name in (*rows.names, "", "", "")[:3])
            value = parse_number(score)
            if isinstance(left, str) and isinstance(right, str) and value is not None:
                pairs.append((left, right, value))
            elif number == 0 and header and isinstance(score, str):
                continue
            elif on_error == "skip":
                skipped.append(number)
            else:
                cells = row.error or f"{list(row.values.values())!r:.80}"
                problem = f"{_place(path, number, row)} is not text, text, score: {cells}"
                raise TableError(f"{problem}; fix the row, or pass on_error='skip'")
    if skipped:
        count = f"{len(skipped):,} of {number + 1:,} rows"
        logger.warning("%s: %s without a pair are skipped: %s", path, count, list_rows(skipped))
    if not pairs:
        raise TableError(f"{path} holds no scored pairs")
    left_texts, right_texts, scores = map(list, zip(*pairs, strict=True))
    return left_texts, right_texts, scores


def parse_number(cell: Any) -> float | None:  # noqa: ANN401 - whatever a file holds
    """Return a cell as a finite number, or None."""
    try:
        number = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _choose_column(
    path: str | Path, column: str | None, rows: Rows, report: ReadReport
) -> str | None:
    """Return the column of the texts, and report it."""
    names, delimiter = rows.names, rows.delimiter
    report.column, report.delimiter = column, delimiter
    report.reason = "as chosen" if column else ""
    report.warnings += [rows.warning] if rows.warning else []
    if rows.plain and column is not None:
        raise ValueError(f"{path} has no columns, so there is no column {column!r}")
    if not names:  # plain texts, or an empty file
        return column
    if column is not None and column not in names:
        likely = next((d for d in DELIMITERS if len(names) == 1 and d in names[0]), None)
        hint = f"; the delimiter may be {likely!r}, not {delimiter!r}" if likely else ""
        raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(names)}{hint}")
    if column is None and len(names) == 1:
        report.column, report.reason = names[0], "the only column"
        like_text = re.search(r"\w\s+\w", names[0]) or parse_number(names[0]) is not None
        if delimiter and like_text and names != ["0"]:  # of a file without a header
            first = f"the first line, {names[0]!r:.60}, was read as the header"
            report.warnings.append(f"{first}; pass header=False if it is a text")
    elif column is None:
        report.column = next((name for name in TEXT_COLUMNS if name in names), None)
        report.reason = "by its name"
        if report.column is None:
            raise ValueError(f"{path} has several columns, pass one as column: {', '.join(names)}")
    return report.column


def row_id(path: str | Path, number: int, row: Row, column: str) -> str | int:
    """Return the id of a row; raise TableError if it has none."""
    value = row.values.get(column)
    if not isinstance(value, (str, int)) or value == "" or SURROGATES.search(str(value)):
        raise TableError(f"{_place(path, number, row)} has no id: {column!r} is {value!r:.60}")
    return value


def _place(path: str | Path, number: int, row: Row) -> str:
    line = f", line {row.line}" if row.line else ""
    return f"{display_name(path)}{line}: row {number}"
