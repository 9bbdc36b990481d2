"""Which columns of a file hold pairs, and which pairs are skipped."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pandas
import pytest

from onnxsim_embed.errors import TableError
from onnxsim_embed.finetune.pairs import TextPairs, clean_pairs, read_pairs

PLAIN = ["source_sentence", "target_sentence"]


@pytest.fixture
def table(tmp_path):
    def write(header, *rows):
        path = tmp_path / "pairs.csv"
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        return path

    return write


# in memory


@pytest.mark.parametrize(
    ("third", "field"), [((), None), ((0.5, 1), "scores"), (("x", "y"), "negatives")], ids=str
)
@pytest.mark.parametrize("kind", ["tuples", "lists", "mappings", "frame", "generator"])
def test_pairs_of_a_notebook(third, field, kind):
    rows = [("a", "b", *third[:1]), ("c", "d", *third[1:])]
    names = ["anchor", "positive", field and field.removesuffix("s")][: len(rows[0])]
    mappings = [dict(zip(names, row, strict=True)) for row in rows]
    given = {
        "tuples": rows,
        "lists": [list(row) for row in rows],
        "mappings": mappings,
        "frame": pandas.DataFrame(mappings),
        "generator": iter(rows),
    }[kind]
    third = {field: list(third)} if field else {}
    assert read_pairs(given) == TextPairs(["a", "c"], ["b", "d"], **third)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [(["ab", "cd"], TypeError, "row 0 is"), ([("a", "b"), ("c",)], TypeError, "row 1 is"),
     ([("a", "b", "c", "d")], TypeError, "row 0 is"), ([("a", "b"), 7], TypeError, "row 1 is"),
     ([{"a", "b"}], TypeError, "row 0 is"), ([np.array(["a", "b"])] * 2, TypeError, "row 0 is"),
     ([("a", "b"), ("c", "")], TableError, r"pairs: row 1 .*''"), ([], TableError, "no pairs")],
)  # fmt: skip
def test_what_is_no_pair_is_named(pairs, error, message):
    with pytest.raises(error, match=message):
        read_pairs(pairs)


# columns


@pytest.mark.parametrize("names", [PLAIN, ["anchor", "positive"], ["sentence1", "sentence2"]])
def test_known_names_need_no_argument_and_others_come_in_any_order(table, names):
    path = table(["id", *names[::-1]], ["1", "b", "a"])
    assert read_pairs(path) == TextPairs(["a"], ["b"])
    columns = {"source_column": names[1], "target_column": names[0], "negative_column": "id"}
    assert read_pairs(path, **columns) == TextPairs(["b"], ["a"], ["1"])


@pytest.mark.parametrize(
    ("header", "options", "words"),
    [
        (["question", "answer"], {}, "source_column.*question, answer"),
        (["a", "b"], {"source_column": "a", "target_column": "c"}, "'c'.*a, b"),
        (PLAIN, {"source_column": "target_sentence"}, "two uses"),
        ([*PLAIN, "rating"], {}, "score_column.*rating"),
    ],
)
def test_columns_that_cannot_be_used(table, header, options, words):
    with pytest.raises(ValueError, match=words):
        read_pairs(table(header, ["a", "b", "1.5"][: len(header)]), **options)


@pytest.mark.parametrize(
    ("header", "row", "options", "more"),
    [
        ([*PLAIN, "wrong"], ["a", "b", "c"], {}, {"negatives": ["c"]}),
        (["id", *PLAIN], ["1", "a", "b"], {}, {}),
        (["id", *PLAIN, "date"], ["1", "a", "b", "2020"], {}, {}),
        ([*PLAIN, "score"], ["a", "b", "0.5"], {}, {"scores": [0.5]}),
        ([*PLAIN, "x"], ["a", "b", "0.5"], {"score_column": "x"}, {"scores": [0.5]}),
    ],
)
def test_a_third_column_holds_hard_negatives_or_scores(table, header, row, options, more):
    assert read_pairs(table(header, row), **options) == TextPairs(["a"], ["b"], **more)


def test_a_named_negative_column_takes_precedence_over_scores(table):
    path = table([*PLAIN, "negative", "score"], ["a", "b", "c", "1"])
    assert read_pairs(path, negative_column="negative").negatives == ["c"]
    assert read_pairs(path).scores == [1.0]
    with pytest.raises(ValueError, match="not both"):
        read_pairs(path, negative_column="negative", score_column="score")


def test_jsonl_and_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"anchor": ["a", "b"], "positive": ["c", "d"], "score": [1, 0.25]}
    rows = zip(*columns.values(), strict=True)
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    expected = TextPairs(["a", "b"], ["c", "d"], scores=[1.0, 0.25])
    assert read_pairs(tmp_path / "p.jsonl") == read_pairs(tmp_path / "p.parquet") == expected


# cells


@pytest.mark.parametrize(
    ("row", "column"),
    [*((["c", target, "1"], "target_sentence") for target in ("", "  ")), (["c"], "target_sentence"),
     *((["c", "d", score], "score") for score in ("", "high", "nan", "inf"))],
)  # fmt: skip
def test_an_invalid_cell_is_named_by_its_row(table, row, column):
    with pytest.raises(TableError, match=rf"row 1 .*{column}"):
        read_pairs(table([*PLAIN, "score"], ["a", "b", "1"], row))


def test_rows_without_a_pair_can_be_skipped(table, caplog):
    rows = [["a", "b", "1"], [], ["c", "", "2"], ["d", "e", ""], ["f", "g", "0"]]
    path = table([*PLAIN, "score"], *rows)
    pairs = read_pairs(path, on_error="skip")
    assert pairs == TextPairs(["a", "f"], ["b", "g"], scores=[1.0, 0.0])
    assert "1, 2, 3" in caplog.text
    with pytest.raises(ValueError, match="on_error"):
        read_pairs(path, on_error="blank")


def test_delimiters_and_gzip(tmp_path):
    path = tmp_path / "pairs.csv.gz"
    path.write_bytes(gzip.compress(b"anchor;positive\na;b, c\n"))
    assert read_pairs(path) == read_pairs(path, delimiter=";") == TextPairs(["a"], ["b, c"])
    assert read_pairs(path, delimiter=";", header=False, source_column="1", target_column="0") == (
        TextPairs(["positive", "b, c"], ["anchor", "a"])
    )


@pytest.mark.parametrize("content", [None, "", "source_sentence,target_sentence\n"])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.txt"])
def test_files_without_pairs(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(FileNotFoundError if content is None else TableError, match=name):
        read_pairs(tmp_path / name)


# cleaning


def numbered(count, **columns):
    return TextPairs([f"s{i}" for i in range(count)], [f"t{i}" for i in range(count)], **columns)


def test_repeated_pairs_and_pairs_of_one_text_are_skipped():
    plain = numbered(10)
    pairs = TextPairs([*plain.sources, "s3", " S3", "x"], [*plain.targets, "t3", "T3", "X"])
    assert clean_pairs(pairs) == (plain, {"read": 13, "repeated": 2, "same_text": 1})


def test_scored_pairs_may_be_of_one_text():
    nine = numbered(9)
    pairs = TextPairs([*nine.sources, "x"], [*nine.targets, "x"], scores=range(10))
    assert len(clean_pairs(pairs)[0]) == 10


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (numbered(1), "got 1"),
        (TextPairs(["a"] * 50, ["b"] * 50), "got 1 .*49 repeated"),
        (TextPairs(["a"] * 50, ["a"] * 50), "got 0 .*50 with the same text"),
        (numbered(12, scores=[0.5] * 12), "all scores are 0.5"),
    ],
)
def test_too_few_pairs(pairs, words):
    with pytest.raises(ValueError, match=words):
        clean_pairs(pairs)
