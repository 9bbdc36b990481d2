"""Pairs of texts: which columns of a file hold them, and which of them can be trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from onnxsim_embed.errors import TableError
from onnxsim_embed.files import texts as files
from onnxsim_embed.files.rows import kind_of
from onnxsim_embed.files.texts import iter_column

# Column names that need no argument: ours, then sentence-transformers' own.
COLUMNS = {
    "source_column": ("source_sentence", "anchor", "sentence1"),
    "target_column": ("target_sentence", "positive", "sentence2"),
    "negative_column": ("negative_sentence", "negative"),
    "score_column": ("score", "similarity_score"),
}

# Fewer distinct pairs cannot be split into training, validation and evaluation.
MIN_PAIRS = 10

T = TypeVar("T")


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

        def take(column: Sequence[T]) -> list[T]:
            return [column[row] for row in rows]

        return TextPairs(
            take(self.sources),
            take(self.targets),
            None if self.negatives is None else take(self.negatives),
            None if self.scores is None else take(self.scores),
        )


def read_pairs(
    path: str | Path,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    negative_column: str | None = None,
    score_column: str | None = None,
) -> TextPairs:
    """Read pairs from a csv, tsv, jsonl or parquet file.

    :param source_column: default: source_sentence, anchor or sentence1.
    :param target_column: default: target_sentence, positive or sentence2.
    :param negative_column: hard negatives; default: negative_sentence, negative, or the third column of
        three, if there are no scores.
    :param score_column: default: score or similarity_score, if `negative_column` is None.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if a column does not exist, listing those that do.
    :raises TableError: if a row lacks a text or a number, naming the row, counted from 0.
    """
    names = column_names(path)
    columns = {
        "source_column": source_column,
        "target_column": target_column,
        "negative_column": negative_column,
        "score_column": score_column,
    }
    for argument, name in columns.items():
        if name is not None and name not in names:
            raise ValueError(f"{path} has no column {name!r}; its columns: {', '.join(names)}")
        if name is None:
            columns[argument] = next((known for known in COLUMNS[argument] if known in names), None)
        if columns[argument] is None and argument in ("source_column", "target_column"):
            raise ValueError(
                f"{path} has no column {COLUMNS[argument][0]!r}; set {argument} to one of: "
                + ", ".join(names)
            )
    source, target, negative, score = columns.values()
    if negative_column is not None and score_column is None:
        score = None
    if score is not None and negative_column is None:
        negative = None
    if score is None and negative is None and len(names) == 3 and names[2] not in (source, target):
        negative = names[2]
    used = [name for name in (source, target, negative, score) if name is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"{path}: one column cannot have two uses: {', '.join(used)}")
    negatives = None if negative is None else _read(path, negative, _text)
    if (
        negatives
        and negative_column is None
        and all(_number(text) is not None for text in negatives)
    ):
        raise ValueError(
            f"{path}: column {negative!r} holds numbers instead of hard negatives; if they are scores, "
            f"set score_column to {negative!r}, else remove the column"
        )
    assert source is not None
    assert target is not None
    return TextPairs(
        _read(path, source, _text),
        _read(path, target, _text),
        negatives,
        None if score is None else _read(path, score, _number),
    )


def column_names(path: str | Path) -> list[str]:
    """Return the names of a table's columns.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: for a file without columns.
    :raises TableError: if it is empty or cannot be read.
    """
    if kind_of(path) not in ("csv", "tsv", "jsonl", "parquet") or str(path) == "-":
        raise ValueError(f"{path}: pairs are read from csv, tsv, jsonl or parquet files")
    names = files.column_names(path)
    if not names:
        raise TableError(f"{path} holds no pairs")
    return names


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


def _read(path: str | Path, column: str, convert: Callable[[Any], T | None]) -> list[T]:
    """Read a column, every cell of which must convert."""
    values: list[T] = []
    for row, cell in enumerate(iter_column(path, column)):
        value = convert(cell)
        if value is None:
            expected = "a text that is not empty" if convert is _text else "a finite number"
            raise TableError(
                f"{path}: row {row} holds {cell!r:.60} in column {column!r}, expected {expected}; fill it "
                "or drop the row"
            )
        values.append(value)
    return values


def _text(cell: object) -> str | None:
    return cell if isinstance(cell, str) and cell.strip() else None


def _number(cell: Any) -> float | None:  # noqa: ANN401
    try:
        number = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
