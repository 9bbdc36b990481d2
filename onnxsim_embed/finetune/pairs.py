"""Pairs of texts: which columns of a file hold them, and which of them can be trained on."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.rows import Row, Rows, open_rows
from onnxsim_embed.files.texts import list_rows, parse_number

logger = logging.getLogger(__name__)

# Column names that need no argument: ours, then sentence-transformers' own.
COLUMNS = {
    "source_column": ("source_sentence", "anchor", "sentence1"),
    "target_column": ("target_sentence", "positive", "sentence2"),
    "negative_column": ("negative_sentence", "negative"),
    "score_column": ("score", "similarity_score"),
}

# Fewer distinct pairs cannot be split into training, validation and evaluation.
MIN_PAIRS = 10


@dataclass(frozen=True)
class TextPairs:
    """Texts that belong together.

    :param sources: n texts to search with.
    :param targets: n texts to find.
    :param negatives: n texts that look like the target of their row and are not (hard negatives), or
        None.
    :param scores: n numbers, higher for more similar pairs, or None where all belong together.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    negatives: Sequence[str] | None = None
    scores: Sequence[float] | None = None

    def __post_init__(self) -> None:
        columns = {"targets": self.targets, "negatives": self.negatives, "scores": self.scores}
        for name, column in columns.items():
            if column is not None and len(column) != len(self.sources):
                raise ValueError(
                    f"sources and {name} must have equal length, got {len(self.sources)} and {len(column)}"
                )
        if self.negatives is not None and self.scores is not None:
            raise ValueError("pairs have either scores or hard negatives, not both")

    def __len__(self) -> int:
        return len(self.sources)

    def rows(self, rows: Sequence[int]) -> TextPairs:
        """Return the pairs of some rows."""
        columns = (self.sources, self.targets, self.negatives, self.scores)
        taken: Any = [c if c is None else [c[row] for row in rows] for c in columns]
        return TextPairs(*taken)


def read_pairs(
    path: str | Path | Iterable[Any],
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    negative_column: str | None = None,
    score_column: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    on_error: str = "fail",
) -> TextPairs:
    """Read pairs from a csv, tsv, jsonl or parquet file, a data frame, or a list of pairs.

    :param path: a file; a pandas or polars data frame; or a list of tuples (source, target), with a hard
        negative or a score as third, or of mappings with the same column names as a file.
    :param source_column: default: source_sentence, anchor or sentence1.
    :param target_column: default: target_sentence, positive or sentence2.
    :param negative_column: hard negatives; default: negative_sentence, negative, or the third column of
        three, if there are no scores.
    :param score_column: default: score or similarity_score, if `negative_column` is None.
    :param delimiter: delimiter of csv and tsv; None: detected.
    :param header: whether csv and tsv begin with column names; else the columns are "0", "1", ...
    :param on_error: "fail" raises at the first row without its texts or score, "skip" logs and skips them.
    :raises FileNotFoundError: if there is no such file.
    :raises TypeError: if a list holds something else than pairs, naming the row.
    :raises ValueError: if a column does not exist, listing those that do.
    :raises TableError: if a row lacks a text or a number, naming the row, counted from 0.
    """
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error must be 'fail' or 'skip', got {on_error!r}")
    arguments = (source_column, target_column, negative_column, score_column)
    values: defaultdict[str, list[Any]] = defaultdict(list)
    skipped: list[int] = []
    if isinstance(path, (str, Path)):
        opened: Any = open_rows(path, delimiter=delimiter, header=header)
    else:
        opened, path = nullcontext(_rows_in_memory(path)), "pairs"
    with opened as table:
        columns = _choose_columns(path, table.names, dict(zip(COLUMNS, arguments, strict=True)))
        table.columns = list(columns.values())
        for number, row in enumerate(table.rows):
            cells = {use: _cell(use, row.values.get(column)) for use, column in columns.items()}
            invalid = [use for use, cell in cells.items() if cell is None]
            if not invalid:
                for use, cell in cells.items():
                    values[use].append(cell)
            elif on_error == "skip":
                skipped.append(number)
            else:
                column = columns[invalid[0]]
                kind = "finite number" if invalid == ["score_column"] else "text that is not empty"
                raise TableError(
                    f"{path}: row {number} (line {row.line}) holds {row.values.get(column)!r:.60} in column "
                    f"{column!r}, expected a {kind}; {row.error or 'fix or drop the row'}, or pass "
                    "on_error='skip'"
                )
    if skipped:
        count = f"{len(skipped):,} of {number + 1:,} rows"
        logger.warning("%s: %s without a pair are skipped: %s", path, count, list_rows(skipped))
    if not values:
        raise TableError(f"{path} holds no pairs")
    name = columns.get("negative_column")
    scores = [_cell("score_column", text) for text in values.get("negative_column", ())]
    if name and negative_column is None and None not in scores:
        raise ValueError(
            f"{path}: column {name!r} holds numbers instead of hard negatives; if they are scores, set "
            f"score_column to {name!r}, else remove the column"
        )
    return TextPairs(*(values.get(use) for use in COLUMNS))  # type: ignore[arg-type]


def _rows_in_memory(pairs: Any) -> Rows:  # noqa: ANN401
    """Return the rows of a data frame, or of a list of tuples or mappings."""
    if hasattr(pairs, "columns"):
        names = [str(name) for name in pairs.columns]
        rows: list[Any] = list(zip(*(pairs[name] for name in pairs.columns), strict=True))
    else:
        rows = list(pairs)
        first: Any = rows[0] if rows else ()
        names = list(first)
        if not isinstance(first, Mapping):
            scored = len(names) == 3 and isinstance(names[2], Real)
            third = "score" if scored else "negative_sentence"
            names = ["source_sentence", "target_sentence", third][: len(names)]
        for row, pair in enumerate(rows):
            if not isinstance(pair, (tuple, list, Mapping)) or len(pair) != len(names):
                raise TypeError(
                    "pairs must be tuples (source, target), with a hard negative or a score as third, or "
                    f"mappings, all of one length; row {row} is {pair!r:.60}"
                )
        rows = [[row.get(n) for n in names] if isinstance(row, Mapping) else row for row in rows]
    return Rows(names, (Row(0, dict(zip(names, row, strict=True))) for row in rows))


def _choose_columns(
    path: str | Path, names: Sequence[str], chosen: dict[str, str | None]
) -> dict[str, str]:
    """Return the column of each use, given the arguments of `read_pairs`."""
    if not names:
        raise TableError(f"{path} holds no pairs: expected a table with a column for each text")
    columns = {}
    for use, name in chosen.items():
        if name is not None and name not in names:
            raise ValueError(f"{path} has no column {name!r}; its columns: {', '.join(names)}")
        found = name or next((known for known in COLUMNS[use] if known in names), None)
        if found is not None:
            columns[use] = found
        elif use in ("source_column", "target_column"):
            raise ValueError(
                f"{path} has no column {COLUMNS[use][0]!r}; set {use} to one of: {', '.join(names)}"
            )
    if chosen["negative_column"] and not chosen["score_column"]:
        columns.pop("score_column", None)
    elif "score_column" in columns and not chosen["negative_column"]:
        columns.pop("negative_column", None)
    if len(columns) == 2 and len(names) == 3 and names[2] not in columns.values():
        columns["negative_column"] = names[2]
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"{path}: one column cannot have two uses: {', '.join(columns.values())}")
    return columns


def clean_pairs(pairs: TextPairs) -> tuple[TextPairs, dict[str, int]]:
    """Skip pairs that repeat an earlier one, in whatever case, and, without scores, pairs of one text.

    :returns: the pairs, and the numbers of those read, repeated, and of the same text.
    :raises ValueError: if too few pairs are left, or all scores are equal.
    """
    columns = [c for c in (pairs.sources, pairs.targets, pairs.negatives, pairs.scores) if c]
    first: dict[tuple[Any, ...], int] = {}
    same_text = 0
    for row, cells in enumerate(zip(*columns, strict=True)):
        values = tuple(normalize(cell) if isinstance(cell, str) else cell for cell in cells)
        if pairs.scores is None and values[0] == values[1]:
            same_text += 1
        else:
            first.setdefault(values, row)
    repeated = len(pairs) - same_text - len(first)
    if len(first) < MIN_PAIRS:
        raise ValueError(
            f"fine-tuning needs at least {MIN_PAIRS} distinct pairs, got {len(first)} ({len(pairs)} read, "
            f"{repeated} repeated, {same_text} with the same text on both sides); a few hundred are a start"
        )
    cleaned = pairs.rows(list(first.values()))
    if cleaned.scores is not None and len(set(cleaned.scores)) < 2:
        raise ValueError(
            f"all scores are {cleaned.scores[0]:g}, so there is nothing to rank; omit the score column if "
            "all pairs belong together"
        )
    return cleaned, {"read": len(pairs), "repeated": repeated, "same_text": same_text}


def normalize(text: str) -> str:
    """Return a text without differences of case and whitespace."""
    return " ".join(text.casefold().split())


def _cell(use: str, cell: Any) -> str | float | None:  # noqa: ANN401
    """Return a cell's text, or its number if it is a score; None if it holds none."""
    if use != "score_column":
        return cell if isinstance(cell, str) and cell.strip() else None
    return parse_number(cell)
