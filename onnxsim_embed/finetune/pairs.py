"""Pairs of texts: which columns hold them, and what cannot be learnt from."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.texts import iter_column, kind_of, long_cells, open_text, require_pyarrow

# Names that mean a column where none was asked for: ours, then sentence-transformers' own.
SOURCE_COLUMNS = ("source_sentence", "anchor", "sentence1")
TARGET_COLUMNS = ("target_sentence", "positive", "sentence2")
NEGATIVE_COLUMNS = ("negative_sentence", "negative")
SCORE_COLUMNS = ("score", "similarity_score")

# Fewer different pairs cannot be split into something to learn from and something to judge by.
LEAST_PAIRS = 10


@dataclass(frozen=True)
class TextPairs:
    """Texts that belong together.

    :param sources: n texts, what is searched with.
    :param targets: n texts, what is to be found.
    :param negatives: n texts that look like the target of their row and are not, or None.
    :param scores: n numbers, higher for pairs that are more alike, or None where all belong together.
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
                    f"{name} must be as many as sources, got {len(column)} and {len(self.sources)}"
                )
        if self.negatives is not None and self.scores is not None:
            raise ValueError("pairs have scores or hard negatives, not both")

    def __len__(self) -> int:
        return len(self.sources)

    def rows(self, chosen: Sequence[int]) -> TextPairs:
        """Return some of the pairs, by their numbers."""

        def pick(column: Sequence[Any] | None) -> list[Any] | None:
            return None if column is None else [column[int(row)] for row in chosen]

        return TextPairs(
            pick(self.sources) or [],
            pick(self.targets) or [],
            pick(self.negatives),
            pick(self.scores),
        )


@dataclass(frozen=True)
class PairCounts:
    """What became of the rows of a file.

    :param read: rows read.
    :param repeated: rows left out because an earlier one says the same.
    :param same_text: rows without a score left out because both texts are the same.
    """

    read: int
    repeated: int
    same_text: int


def read_pairs(
    path: str | Path,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    negative_column: str | None = None,
    score_column: str | None = None,
) -> TextPairs:
    """Read pairs from a csv, tsv, jsonl or parquet file.

    Columns that are not named are looked up: source_sentence and target_sentence (or anchor and
    positive, or sentence1 and sentence2), score, negative_sentence (or negative). The third column of
    three is a hard negative, unless it is a score.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if a column is not there, naming those that are.
    :raises TableError: if a row lacks a text or a number, naming the row, counted from 0.
    """
    names = column_names(path)
    source = _choose(path, names, source_column, SOURCE_COLUMNS, "--source-column")
    target = _choose(path, names, target_column, TARGET_COLUMNS, "--target-column")
    score = _choose(path, names, score_column, SCORE_COLUMNS, None)
    if negative_column is not None and score_column is None:
        score = None  # a row has one or the other, and this one was asked for
    negative = _choose(path, names, negative_column, NEGATIVE_COLUMNS, None)
    if score is not None and negative_column is None:
        negative = None
    if score is None and negative is None and len(names) == 3 and names[2] not in (source, target):
        negative = names[2]
    chosen = [name for name in (source, target, negative, score) if name is not None]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{path}: one column is named for two things: {', '.join(chosen)}")
    assert source is not None
    assert target is not None
    negatives = None if negative is None else _texts(path, negative)
    if negatives and negative_column is None and all(_number(text) for text in negatives):
        raise ValueError(
            f"{path}: column {negative!r} holds numbers, so it is no hard negative; if it holds scores, "
            f"say --score-column {negative}, else take it out of the file"
        )
    return TextPairs(
        _texts(path, source),
        _texts(path, target),
        negatives,
        None if score is None else _scores(path, score),
    )


def column_names(path: str | Path) -> list[str]:
    """Return the names of a table's columns.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: for a file without columns.
    :raises TableError: if it is empty or cannot be read.
    """
    kind = kind_of(path)
    if kind == "parquet":
        require_pyarrow()
        import pyarrow
        from pyarrow import parquet

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            return list(parquet.read_schema(path).names)
        except pyarrow.ArrowException as error:
            raise TableError(f"{path} is not a readable parquet file: {error}") from None
    if kind not in ("csv", "tsv", "jsonl") or str(path) == "-":
        raise ValueError(f"{path}: pairs are read from csv, tsv, jsonl or parquet files")
    try:
        with open_text(path) as stream, long_cells():
            if kind == "jsonl":
                row = json.loads(next((line for line in stream if line.strip()), "{}"))
                names = list(row) if isinstance(row, dict) else []
            else:
                names = next(csv.reader(stream, delimiter="\t" if kind == "tsv" else ","), [])
    except (UnicodeDecodeError, csv.Error, ValueError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise TableError(f"{path} cannot be read: {error}") from None
    if not names:
        raise TableError(f"{path} holds no pairs")
    return names


def clean_pairs(pairs: TextPairs) -> tuple[TextPairs, PairCounts]:
    """Leave out rows that repeat an earlier one and, where there are no scores, rows of twice one text.

    :raises ValueError: if too few pairs are left, or all scores are the same.
    """
    columns = [c for c in (pairs.sources, pairs.targets, pairs.negatives, pairs.scores) if c]
    first: dict[tuple[Any, ...], int] = {}
    same_text = 0
    for row, values in enumerate(zip(*columns, strict=True)):
        if pairs.scores is None and values[0] == values[1]:
            same_text += 1
        else:
            first.setdefault(values, row)
    counts = PairCounts(len(pairs), len(pairs) - same_text - len(first), same_text)
    if len(first) < LEAST_PAIRS:
        why = [f"{counts.read} read"]
        if counts.repeated:
            why.append(f"{counts.repeated} repeat another")
        if same_text:
            why.append(f"{same_text} have the same text on both sides")
        raise ValueError(
            f"fine-tuning needs at least {LEAST_PAIRS} different pairs, got {len(first)} "
            f"({', '.join(why)}); a few hundred are a start"
        )
    cleaned = pairs.rows(list(first.values()))
    if cleaned.scores is not None and len(set(cleaned.scores)) < 2:
        raise ValueError(
            f"all scores are {cleaned.scores[0]:g}: scores teach by their differences; leave the score "
            "column out if all pairs belong together"
        )
    return cleaned, counts


def drop_sources(pairs: TextPairs, texts: Sequence[str]) -> TextPairs:
    """Return the pairs that hold none of some texts on the source side."""
    taken = set(map(normalize, texts))
    return pairs.rows(
        [row for row, text in enumerate(pairs.sources) if normalize(text) not in taken]
    )


def normalize(text: str) -> str:
    """Return what two texts share that say the same but for case and spaces."""
    return " ".join(text.casefold().split())


def without_negatives(pairs: TextPairs) -> TextPairs:
    """Return the pairs without their hard negatives, which judging does not need."""
    return replace(pairs, negatives=None)


def _choose(
    path: str | Path,
    names: Sequence[str],
    asked: str | None,
    known: Sequence[str],
    option: str | None,
) -> str | None:
    if asked is not None:
        if asked not in names:
            raise ValueError(f"{path} has no column {asked!r}; it has: {', '.join(names)}")
        return asked
    found = next((name for name in known if name in names), None)
    if found is None and option is not None:
        raise ValueError(
            f"{path} has no column {known[0]!r}; choose one with {option}: {', '.join(names)}"
        )
    return found


def _texts(path: str | Path, column: str) -> list[str]:
    texts: list[str] = []
    for row, value in enumerate(iter_column(path, column)):
        if not isinstance(value, str) or not value.strip():
            held = "is empty" if value is None or isinstance(value, str) else f"holds {value!r:.60}"
            raise TableError(
                f"{path}: row {row} {held} in column {column!r}; every pair needs its texts: fill it "
                "or drop the row"
            )
        texts.append(value)
    return texts


def _scores(path: str | Path, column: str) -> list[float]:
    scores: list[float] = []
    for row, value in enumerate(iter_column(path, column)):
        if isinstance(value, bool) or not _number(value):
            raise TableError(
                f"{path}: row {row} holds {value!r:.60} in column {column!r}, which is no finite number"
            )
        scores.append(float(value))
    return scores


def _number(value: object) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
