"""Texts in, columns out: every kind of file, and one clear line for each way to be broken."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from onnxsim_embed.errors import MissingExtraError, NoTextsError, TableError
from onnxsim_embed.files.texts import iter_column, iter_texts, read_scored_pairs, write_rows

TEXTS = [
    "a road",
    'the "old" river, by the sea',
    "two\nlines",
    "",
    "  spaces  ",
    "naïve café 漢字 🙂",
    "tab\there",
    "line\u2028separator",
    "back\\slash",
]
LINES = [text.replace("\n", " ") for text in TEXTS]  # what a file of plain lines can hold


def as_csv(delimiter=",", terminator="\n"):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=terminator)
    writer.writerow(["id", "text", "note"])
    writer.writerows([i, text, "x,y"] for i, text in enumerate(TEXTS))
    return stream.getvalue()


CONTENTS = {
    "csv": as_csv(),
    "tsv": as_csv("\t"),
    "jsonl": "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS),
    "ndjson": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS),
    "txt": "".join(line + "\n" for line in LINES),
}


def write(path, content, encoding="utf-8"):
    data = content if isinstance(content, bytes) else content.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def failure(error, path, column=None, **kwargs):
    """Return the one line that reading a file fails with."""
    with pytest.raises(error) as caught:
        list(iter_texts(path, column, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is read


@pytest.mark.parametrize("ending", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_texts_of_each_kind_are_read_as_they_were_written(tmp_path, kind, ending):
    path = tmp_path / f"texts.{kind}{ending}"
    data = CONTENTS[kind].encode()
    path.write_bytes(gzip.compress(data) if ending else data)
    assert list(iter_texts(path)) == (LINES if kind == "txt" else TEXTS)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_byte_order_mark_is_no_part_of_the_first_text(tmp_path, kind):
    path = write(tmp_path / f"texts.{kind}", CONTENTS[kind], "utf-8-sig")
    assert next(iter_texts(path)) == "a road"


def test_windows_line_ends_are_understood(tmp_path):
    assert list(iter_texts(write(tmp_path / "a.csv", as_csv(terminator="\r\n")))) == TEXTS
    assert list(iter_texts(write(tmp_path / "a.txt", "one\r\n\r\ntwo"))) == ["one", "", "two"]
    assert list(iter_texts(write(tmp_path / "a.jsonl", '"one"\r\n\r\n"two"\r\n'))) == ["one", "two"]


def test_line_ends_inside_quotes_are_kept(tmp_path):
    path = write(tmp_path / "a.csv", 'text\r\n"one\r\ntwo"\r\n')
    assert list(iter_texts(path)) == ["one\r\ntwo"]


def test_json_lines_may_be_bare_strings(tmp_path):
    path = write(tmp_path / "a.jsonl", '"one"\n\n"two \\ud83d\\ude42"\n')
    assert list(iter_texts(path)) == ["one", "two 🙂"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_columns_of_text_are_read(tmp_path, kind):
    column = pyarrow.array(TEXTS, kind)
    for name, values in (("plain", column), ("dictionary", column.dictionary_encode())):
        parquet.write_table(
            pyarrow.table({"id": range(len(TEXTS)), "text": values}), tmp_path / name
        )
        assert list(iter_texts(tmp_path / name, kind="parquet")) == TEXTS


def test_a_large_cell_is_read(tmp_path):
    text = "water " * 50_000
    before = csv.field_size_limit()
    assert list(iter_texts(write(tmp_path / "a.csv", f'text\n"{text}"\n'))) == [text]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["title", "title_and_description", "sentence"])
def test_a_lone_column_or_a_telling_name_needs_no_choice(tmp_path, name):
    assert list(iter_texts(write(tmp_path / "a.csv", f"{name}\nroad\n"))) == ["road"]
    if name != "title":
        assert list(iter_texts(write(tmp_path / "b.csv", f"id,{name}\n1,road\n"))) == ["road"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_column_is_chosen_by_name(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", CONTENTS[kind])
    assert [str(value) for value in iter_column(path, "id")][:2] == (
        ["1", "1"] if kind == "jsonl" else ["0", "1"]
    )


def test_the_kind_may_be_said(tmp_path):
    path = write(tmp_path / "export.dat", CONTENTS["csv"])
    assert list(iter_texts(path, kind="csv")) == TEXTS


@pytest.mark.parametrize("kind", [None, "csv", "jsonl"])
def test_a_dash_reads_standard_input(monkeypatch, kind):
    data = CONTENTS[kind or "txt"].encode("utf-8-sig")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert list(iter_texts("-", kind=kind)) == (TEXTS if kind else LINES)


def test_reading_goes_as_it_is_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", '"one"\n{broken\n')
    texts = iter_texts(path)
    assert next(texts) == "one"
    texts.close()


# from an open stream


@pytest.mark.parametrize("ending", ["csv", "tsv.GZ", "jsonl", "ndjson.gz", "txt"])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_stream_is_read_in_place_of_the_file_that_names_it(ending, buffered):
    kind = ending.partition(".")[0]
    data = CONTENTS[kind].encode("utf-8-sig")
    stream = io.BytesIO(gzip.compress(data) if "." in ending else data)
    source = io.BufferedReader(stream, 16) if buffered else stream
    found = list(iter_column(f"/nowhere/a.{ending}", source=source))
    assert found == (LINES if kind == "txt" else TEXTS)


@pytest.mark.parametrize("kind", [None, "parquet"])
def test_parquet_is_read_from_a_stream(kind):
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS}), stream)
    stream.seek(0)
    name = "a" if kind else "a.parquet"
    assert list(iter_column(name, kind=kind, source=stream)) == TEXTS


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.csv", b'text\n"open'), ("a.jsonl", b"{"), ("a.txt", b"\xff"), ("a.txt.gz", b"x"),
     ("a.parquet", b"x"), ("a.txt", b"")],
)  # fmt: skip
def test_errors_of_a_stream_bear_its_name(name, data):
    with pytest.raises(TableError, match=rf"^s3://bucket/{name}"):
        list(iter_column(f"s3://bucket/{name}", source=io.BytesIO(data)))


def test_an_empty_file_is_told_from_a_damaged_one(tmp_path):
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "a.parquet"
    )
    for path in (write(tmp_path / "a.txt", ""), tmp_path / "a.parquet"):
        with pytest.raises(NoTextsError, match="holds no texts"):
            list(iter_column(path))
    with pytest.raises(TableError) as caught:
        list(iter_column(write(tmp_path / "b.parquet", "")))
    assert not isinstance(caught.value, NoTextsError)


# what is refused


def test_a_missing_file_is_named(tmp_path):
    for name in ("a.csv", "a.parquet", "a.txt.gz"):
        assert name in failure(FileNotFoundError, tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.parquet"])
def test_a_directory_is_no_file_of_texts(tmp_path, name):
    (tmp_path / name).mkdir()
    assert "directory" in failure(ValueError, tmp_path / name)


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.gz"])
def test_an_unknown_ending_lists_the_kinds(tmp_path, name):
    message = failure(ValueError, write(tmp_path / name, "x"))
    assert "known are csv, tsv, jsonl, parquet, txt" in message


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_missing_column_lists_those_there_are(tmp_path, kind):
    message = failure(ValueError, write(tmp_path / f"a.{kind}", CONTENTS[kind]), "titel")
    assert "no column 'titel'; it has: id, text" in message


def test_several_columns_ask_for_a_choice(tmp_path):
    message = failure(ValueError, write(tmp_path / "a.csv", "id,title\n1,road\n"))
    assert "choose one with --column: id, title" in message


def test_plain_lines_have_no_columns(tmp_path):
    assert "no column 'text'" in failure(ValueError, write(tmp_path / "a.txt", "one\n"), "text")
    assert "--column 'text'" in failure(ValueError, write(tmp_path / "a.jsonl", '"one"\n'), "text")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "a.csv.gz"])
def test_an_empty_file_holds_no_texts(tmp_path, name):
    assert failure(TableError, write(tmp_path / name, "")).endswith("holds no texts")


@pytest.mark.parametrize("content", ["id,text\n", "id,text"])
def test_a_header_alone_holds_no_texts(tmp_path, content):
    assert "holds no texts" in failure(TableError, write(tmp_path / "a.csv", content))


@pytest.mark.parametrize(("name", "encoding"), [("a.csv", "latin1"), ("a.txt", "utf-16")])
def test_a_file_that_is_not_utf8_says_how_to_convert_it(tmp_path, name, encoding):
    message = failure(TableError, write(tmp_path / name, "text\ncafé\n", encoding))
    assert "is not UTF-8" in message
    assert "iconv -f" in message


def test_null_rows_are_named(tmp_path):
    lines = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": null}\n')
    assert "row 1 holds no text (null)" in failure(TableError, lines)
    parquet.write_table(pyarrow.table({"text": ["one", "two", None]}), tmp_path / "a.parquet")
    assert "row 2 holds no text (null)" in failure(TableError, tmp_path / "a.parquet")


@pytest.mark.parametrize("value", ["7", "[1]", "true", '{"a": 1}'])
def test_values_that_are_no_texts_are_named(tmp_path, value):
    path = write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n{{"text": {value}}}\n')
    assert "row 1 holds" in failure(TableError, path)


def test_a_short_row_is_named(tmp_path):
    path = write(tmp_path / "a.csv", "id,text\n1,one\n2\n3,three\n")
    assert "row 1" in failure(TableError, path)


@pytest.mark.parametrize(
    "content", ["id,text\n1,one\n2,two, and more\n", "text\none\ntwo, and more\n"]
)
def test_a_row_with_too_many_cells_is_named_not_cut(tmp_path, content):
    assert "line 3" in failure(TableError, write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("content", ['text\none\n"two\nthree\n', 'text\none\n"two" 3\n'])
def test_broken_quotes_are_named_by_line(tmp_path, content):
    assert ", line " in failure(TableError, write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("line", ["{", '{"text": }', "one", "[" * 100_000])
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{line}\n')
    assert "line 3 is not JSON" in failure(TableError, path)


def test_a_column_that_the_first_line_lacks_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"title": "one"}\n{"text": "two"}\n')
    assert "line 2 has no column 'text'; it has: title" in failure(ValueError, path, "text")


def test_a_later_line_without_the_column_holds_no_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"title": "two"}\n')
    assert list(iter_column(path)) == ["one", None]
    assert "row 1 holds no text (null)" in failure(TableError, path)


def damaged(data):
    """Zip files that end too early, whose data or checksum is wrong, or that are none."""
    return {"cut": data[:-20], "body": data[:30] + bytes(20) + data[50:],
            "checksum": data[:-8] + bytes(8), "none": b"text\none\n"}  # fmt: skip


@pytest.mark.parametrize("damage", ["cut", "body", "checksum", "none"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    rng = np.random.default_rng(0)
    text = "text\n" + "".join(f"{number}\n" for number in rng.integers(0, 1 << 60, 200))
    path = tmp_path / "a.csv.gz"
    path.write_bytes(damaged(gzip.compress(text.encode()))[damage])
    assert "is not a readable gzip file" in failure(TableError, path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"id,text\n1,one\n" * 20])
def test_garbage_is_no_parquet(tmp_path, content):
    path = write(tmp_path / "a.parquet", content)
    assert "is not a readable parquet file" in failure(TableError, path)


def test_parquet_without_rows_or_columns_that_fit(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    assert "holds no texts" in failure(TableError, path)
    parquet.write_table(pyarrow.table({"id": [1], "title": ["one"]}), path)
    assert "--column: id, title" in failure(ValueError, path)
    assert "no column 'x'; it has: id, title" in failure(ValueError, path, "x")
    assert "row 0 holds 1" in failure(TableError, path, "id")


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'onnxsim-embed\[parquet\]'"):
        list(iter_texts(tmp_path / "a.parquet"))


# scored pairs


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("header", [True, False])
def test_scored_pairs_are_read_with_or_without_a_header(tmp_path, ending, header):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter="\t" if ending == "tsv" else ",")
    writer.writerows([["left", "right", "score"]] * header)
    writer.writerows([['a "road"', "one, two", 4.5, "more"], ["", "two\nlines", "-1"]])
    path = write(tmp_path / f"pairs.{ending}", stream.getvalue(), "utf-8-sig")
    left, right, scores = read_scored_pairs(path)
    assert (left, right, scores) == (['a "road"', ""], ["one, two", "two\nlines"], [4.5, -1.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no scored pairs"),
        ("left,right,score\n", "holds no scored pairs"),
        ("a,b\n", "line 1: expected text, text, score"),
        ("a,b,1\nc,d,high\n", "line 2: expected text, text, score"),
        ("a,b,1\nc\n", "line 2: expected text, text, score"),
        ('a,b,1\n"c,d,2\n', "line 2"),
        ("a,b,1\ncaf\xe9,d,2\n".encode("latin1"), "is not UTF-8"),
    ],
)
def test_pairs_without_texts_or_score_are_named(tmp_path, content, message):
    path = write(tmp_path / "pairs.csv", content)
    with pytest.raises(TableError, match=message) as caught:
        read_scored_pairs(path)
    assert str(path) in str(caught.value)


# rows


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_rows_read_back_as_they_were_written(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    write_rows({"row": np.arange(len(TEXTS)), "text": TEXTS}, path)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t" if ending == "tsv" else ","))
    assert rows == [["row", "text"], *([str(i), text] for i, text in enumerate(TEXTS))]
    assert list(iter_texts(path)) == TEXTS


def test_columns_of_unequal_length_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_rows({"a": [1, 2], "b": [1]}, tmp_path / "rows.csv")
    assert list(tmp_path.iterdir()) == []
