"""Texts of a file: which column holds them, and what happens to rows without a text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from onnxsim_embed.errors import NoTextsError, TableError
from onnxsim_embed.files.rows import DELIMITERS, Rows, kind_of, open_rows

logger = logging.getLogger(__name__)

# Names that mean "the text to embed" where a table has several columns and none was chosen.
TEXT_COLUMNS = ("text", "title_and_description", "sentence")

# Row numbers that a message lists.
LISTED = 10

ON_ERROR = ("fail", "skip", "blank")


@dataclass
class ReadReport:
    """What a reader decided and what it found; filled while the texts are read.

    :param column: the column that holds the texts; None if the rows are plain texts.
    :param reason: why that column.
    :param delimiter: delimiter of csv and tsv, else empty.
    :param rows: rows of the file so far.
    :param empty: numbers of rows with an empty text, from 0.
    :param skipped: numbers of rows without a text that were skipped, and why each has none.
    :param blanked: numbers of such rows that were read as an empty text, and why.
    :param warnings: what may be a mistake.
    """

    column: str | None = None
    reason: str = ""
    delimiter: str = ""
    rows: int = 0
    empty: list[int] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    blanked: dict[int, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return a line on the column and the delimiter."""
        column = "one text per line" if self.column is None else f"column {self.column!r}"
        delimiter = f", delimiter {self.delimiter!r}" if self.delimiter else ""
        return f"{column} ({self.reason}){delimiter}" if self.reason else column + delimiter

    def problems(self) -> list[str]:
        """Return a line for each warning, and for rows that are empty, skipped or blanked."""
        lines = list(self.warnings)
        for rows, state in ((self.skipped, "were skipped"), (self.blanked, "were read as empty")):
            if rows:
                reasons = "; ".join(f"row {row} {rows[row]}" for row in list(rows)[:LISTED])
                lines.append(f"{len(rows):,} of {self.rows:,} rows {state}: {reasons}{_more(rows)}")
        if self.empty:
            listed = ", ".join(map(str, self.empty[:LISTED]))
            plural = "texts are" if len(self.empty) > 1 else "text is"
            lines.append(
                f"{len(self.empty):,} of {self.rows:,} {plural} empty: rows {listed}{_more(self.empty)}"
            )
        return lines


def _more(rows: Sequence[int] | dict[int, str]) -> str:
    return f" and {len(rows) - LISTED:,} more" if len(rows) > LISTED else ""


def iter_texts(
    path: str | Path,
    column: str | None = None,
    *,
    kind: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    on_error: str = "fail",
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
    :param delimiter: delimiter of csv and tsv; None: detected.
    :param header: whether csv and tsv begin with column names; else the columns are "0", "1", ...
    :param on_error: "fail" raises at the first row without a text, "skip" skips such rows, "blank"
        yields an empty text for them.
    :param report: filled with what was decided and found; None: warnings are logged.
    :param source: stream to read; `path` is then its name only.
    :raises FileNotFoundError: if the file does not exist.
    :raises ValueError: if the column does not exist (naming those that do) or an argument is invalid.
    :raises TableError: if the file is empty, damaged or not UTF-8, or a row has no text, naming it.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
    log = report is None
    report = report if report is not None else ReadReport()
    values = _values(path, column, kind, delimiter, header, source, report)
    for row, (value, line, error) in enumerate(values):
        report.rows += 1
        if not isinstance(value, str):
            problem = error or (
                "has no text (null)" if value is None else f"holds {value!r:.60}, not a text"
            )
            if on_error == "fail":
                advice = "fix the row, or pass on_error='skip' or on_error='blank'"
                raise TableError(f"{_place(path, row, line)} {problem}; {advice}")
            (report.skipped if on_error == "skip" else report.blanked)[row] = problem
            if on_error == "skip":
                continue
            value = ""
        if not value.strip():
            report.empty.append(row)
        yield value
    if log:
        for message in report.problems():
            logger.warning("%s: %s", path, message)


def iter_column(
    path: str | Path,
    column: str | None = None,
    *,
    kind: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    source: IO[bytes] | None = None,
) -> Iterator[Any]:
    """Yield the raw values of a column; see `iter_texts`."""
    values = _values(path, column, kind, delimiter, header, source, ReadReport())
    for row, (value, line, error) in enumerate(values):
        if error is not None:
            raise TableError(f"{_place(path, row, line)} {error}")
        yield value


def column_names(
    path: str | Path, kind: str | None = None, delimiter: str | None = None
) -> list[str]:
    """Return the column names of a table; an empty list for plain texts."""
    with open_rows(path, kind, delimiter=delimiter) as rows:
        return rows.names


def read_scored_pairs(path: str | Path) -> tuple[list[str], list[str], list[float]]:
    """Read text, text, score from the first three columns of a csv or tsv file.

    If the third column of the first row is not a number, that row is a header.

    :raises FileNotFoundError: if the file does not exist.
    :raises TableError: naming the row without two texts and a number.
    """
    left: list[str] = []
    right: list[str] = []
    scores: list[float] = []
    kind = kind_of(path) if kind_of(path) in ("csv", "tsv") else "csv"
    with open_rows(path, kind, header=False) as rows:
        for number, row in enumerate(rows):
            try:
                score = float(row.values.get("2"))
                left.append(row.values["0"])
                right.append(row.values["1"])
                scores.append(score)
            except (TypeError, KeyError, ValueError):
                if number == 0 and "2" in row.values:
                    continue
                raise TableError(
                    f"{_place(path, number, row.line)} expected text, text, score: "
                    f"{row.error or list(row.values.values())!r:.80}"
                ) from None
    if not scores:
        raise TableError(f"{path} holds no scored pairs")
    return left, right, scores


def _values(
    path: str | Path,
    column: str | None,
    kind: str | None,
    delimiter: str | None,
    header: bool,
    source: IO[bytes] | None,
    report: ReadReport,
) -> Iterator[tuple[Any, int, str | None]]:
    """Yield value, line and error of each row.

    :raises NoTextsError: after the last row if there is none.
    """
    kind = kind or kind_of(path)
    empty = True
    with open_rows(path, kind, delimiter=delimiter, header=header, source=source) as rows:
        name = _choose_column(path, rows, column, report)
        guessed = report.reason == ONLY_COLUMN
        for row in rows.only(name):
            empty = False
            if guessed and kind == "jsonl" and len(row.values) > 1:
                raise ValueError(
                    f"{_place(path, report.rows, row.line)} has the columns {', '.join(map(str, row.values))}, "
                    f"rows before only {name!r}; pass column"
                )
            yield row.values.get(name, row.values.get(None)), row.line, row.error
    if empty:
        raise NoTextsError(f"{path} holds no texts")


ONLY_COLUMN = "the only column"


def _choose_column(
    path: str | Path, rows: Rows, column: str | None, report: ReadReport
) -> str | None:
    """Return the column of the texts, and report it."""
    names, delimiter = rows.names, rows.delimiter
    report.delimiter, report.column = delimiter, column
    if rows.plain and column is not None:
        raise ValueError(f"{path} has no columns, so there is no column {column!r}")
    if not names:
        pass  # plain texts, or an empty file
    elif column is not None:
        report.reason = "as chosen"
        if column not in names:
            likely = next((d for d in DELIMITERS if len(names) == 1 and d in names[0]), None)
            hint = f"; the delimiter may be {likely!r}, not {delimiter!r}" if likely else ""
            raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(names)}{hint}")
    elif len(names) == 1:
        report.column, report.reason = names[0], ONLY_COLUMN
        if delimiter and re.search(r"\w\s+\w", names[0]):
            report.warnings.append(
                f"the first line, {names[0]!r:.60}, was read as the header; pass header=False if it is "
                "a text"
            )
    else:
        report.column = next((name for name in TEXT_COLUMNS if name in names), None)
        report.reason = "by its name"
        if report.column is None:
            raise ValueError(f"{path} has several columns, pass one as column: {', '.join(names)}")
    return report.column


def _place(path: str | Path, row: int, line: int) -> str:
    return f"{path}, line {line}: row {row}" if line else f"{path}: row {row}"
