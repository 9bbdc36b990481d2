"""Which rows of a file are pairs, and which are refused."""

from __future__ import annotations

import csv
import json

import pytest

from onnxsim_embed.errors import TableError
from onnxsim_embed.finetune.pairs import TextPairs, clean_pairs, column_names, read_pairs


@pytest.fixture
def table(tmp_path):
    def write(header, *rows, name="pairs.csv"):
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        return path

    return write


PLAIN = ["source_sentence", "target_sentence"]


# columns


@pytest.mark.parametrize("names", [PLAIN, ["anchor", "positive"], ["sentence1", "sentence2"]])
def test_known_names_need_no_option(table, names):
    pairs = read_pairs(table(names, ["a", "b"], ["c", "d"]))
    assert pairs == TextPairs(["a", "c"], ["b", "d"])


def test_columns_can_be_named_in_any_order(table):
    path = table(["id", "answer", "question"], ["1", "b", "a"])
    pairs = read_pairs(path, source_column="question", target_column="answer", negative_column="id")
    assert pairs == TextPairs(["a"], ["b"], ["1"])


def test_a_missing_column_is_named_with_those_there_are(table):
    path = table(["question", "answer"], ["a", "b"])
    with pytest.raises(
        ValueError, match=r"no column 'source_sentence'.*--source-column.*question, answer"
    ):
        read_pairs(path)
    with pytest.raises(ValueError, match="no column 'anser'; it has: question, answer"):
        read_pairs(path, source_column="question", target_column="anser")


def test_one_column_cannot_be_two_things(table):
    with pytest.raises(ValueError, match="named for two things: target_sentence, target_sentence"):
        read_pairs(table(PLAIN, ["a", "b"]), source_column="target_sentence")


def test_a_third_column_is_a_hard_negative(table):
    pairs = read_pairs(table([*PLAIN, "wrong"], ["a", "b", "c"]))
    assert (pairs.negatives, pairs.scores) == (["c"], None)


def test_a_third_column_of_numbers_is_refused(table):
    with pytest.raises(ValueError, match=r"'rating' holds numbers.*--score-column rating"):
        read_pairs(table([*PLAIN, "rating"], ["a", "b", "1.5"]))


def test_further_columns_are_ignored(table):
    assert read_pairs(table(["id", *PLAIN], ["1", "a", "b"])) == TextPairs(["a"], ["b"])
    pairs = read_pairs(table(["id", *PLAIN, "date"], ["1", "a", "b", "2020"]))
    assert pairs == TextPairs(["a"], ["b"])


def test_scores_are_found_by_name_or_option(table):
    named = read_pairs(table([*PLAIN, "score"], ["a", "b", "0.5"]))
    asked = read_pairs(table([*PLAIN, "x"], ["a", "b", "0.5"]), score_column="x")
    assert named.scores == asked.scores == [0.5]
    assert named.negatives is asked.negatives is None


def test_a_negative_column_asked_for_wins_over_a_score_column(table):
    path = table([*PLAIN, "negative", "score"], ["a", "b", "c", "1"])
    assert read_pairs(path, negative_column="negative").negatives == ["c"]
    assert read_pairs(path).scores == [1.0]
    with pytest.raises(ValueError, match="scores or hard negatives, not both"):
        read_pairs(path, negative_column="negative", score_column="score")


def test_jsonl_and_parquet_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"anchor": ["a", "b"], "positive": ["c", "d"], "score": [1, 0.25]}
    lines = [
        json.dumps(dict(zip(rows, values, strict=True)))
        for values in zip(*rows.values(), strict=True)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    parquet.write_table(pyarrow.table(rows), tmp_path / "p.parquet")
    wanted = TextPairs(["a", "b"], ["c", "d"], scores=[1.0, 0.25])
    assert read_pairs(tmp_path / "p.jsonl") == read_pairs(tmp_path / "p.parquet") == wanted
    assert column_names(tmp_path / "p.parquet") == list(rows)


# cells


@pytest.mark.parametrize("cell", ["", "  "])
def test_an_empty_cell_is_named_by_its_row(table, cell):
    with pytest.raises(TableError, match="row 1 is empty in column 'target_sentence'"):
        read_pairs(table(PLAIN, ["a", "b"], ["c", cell]))


def test_a_cell_that_is_not_there_is_empty(table):
    with pytest.raises(TableError, match="row 0 is empty in column 'target_sentence'"):
        read_pairs(table(PLAIN, ["a"]))


@pytest.mark.parametrize("cell", ["", "high", "nan", "inf"])
def test_a_score_must_be_a_finite_number(table, cell):
    with pytest.raises(
        TableError, match=r"row 1 holds .* in column 'score', which is no finite number"
    ):
        read_pairs(table([*PLAIN, "score"], ["a", "b", "1"], ["c", "d", cell]))


def test_files_that_hold_no_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_pairs(tmp_path / "none.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(TableError, match="holds no pairs"):
        read_pairs(tmp_path / "empty.csv")
    (tmp_path / "lines.txt").write_text("a\n", encoding="utf-8")
    with pytest.raises(ValueError, match="csv, tsv, jsonl or parquet"):
        read_pairs(tmp_path / "lines.txt")
    (tmp_path / "latin.csv").write_bytes(b"source_sentence,target_sentenc\xe9\n")
    with pytest.raises(TableError, match="cannot be read"):
        read_pairs(tmp_path / "latin.csv")


# what is left to learn from


def numbered(count, **columns):
    return TextPairs([f"s{i}" for i in range(count)], [f"t{i}" for i in range(count)], **columns)


def test_repeated_rows_and_rows_of_one_text_are_left_out():
    plain = numbered(10)
    given = TextPairs([*plain.sources, "s3", "x"], [*plain.targets, "t3", "x"])
    cleaned, counts = clean_pairs(given)
    assert (cleaned, counts.read, counts.repeated, counts.same_text) == (plain, 12, 1, 1)


def test_scored_pairs_may_be_of_one_text():
    given = TextPairs([*numbered(9).sources, "x"], [*numbered(9).targets, "x"], scores=range(10))
    assert len(clean_pairs(given)[0]) == 10


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (numbered(1), r"at least 10 different pairs, got 1 \(1 read\)"),
        (TextPairs(["a"] * 50, ["b"] * 50), r"got 1 \(50 read, 49 repeat another\)"),
        (
            TextPairs(["a"] * 50, ["a"] * 50),
            r"got 0 \(50 read, 50 have the same text on both sides\)",
        ),
        (numbered(12, scores=[0.5] * 12), "all scores are 0.5"),
    ],
)
def test_too_little_to_learn_from(pairs, said):
    with pytest.raises(ValueError, match=said):
        clean_pairs(pairs)


def test_columns_must_be_as_long():
    with pytest.raises(ValueError, match="targets must be as many as sources, got 1 and 2"):
        TextPairs(["a", "b"], ["c"])
