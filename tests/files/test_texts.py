"""Texts of csv, tsv, jsonl, txt and parquet files: the same texts, or an error that names the row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from onnxsim_embed.errors import MissingExtraError, NoTextsError, TableError
from onnxsim_embed.files import rows as reader
from onnxsim_embed.files.texts import (
    ReadReport,
    column_names,
    iter_column,
    iter_texts,
    read_scored_pairs,
)

TEXTS = [
    "a road",
    'the "old" river, by the sea',
    "two\nlines",
    "",
    "  spaces  ",
    "naïve café 漢字 🙂",
    "line\u2028separator",
    "back\\slash",
]
LINES = [text.replace("\n", " ") for text in TEXTS]  # what plain lines and tsv can hold


def as_csv(delimiter=",", terminator="\n"):
    stream = io.StringIO(newline="")
    writer = csv.writer(
        stream, delimiter=delimiter, lineterminator=terminator, quoting=csv.QUOTE_ALL
    )
    writer.writerow(["id", "text", "note"])
    writer.writerows([i, text, "x,y"] for i, text in enumerate(TEXTS))
    return stream.getvalue()


CONTENTS = {
    "csv": as_csv(),
    "tsv": "id\ttext\tnote\n" + "".join(f"{i}\t{text}\tx,y\n" for i, text in enumerate(LINES)),
    "jsonl": "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS),
    "ndjson": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS),
    "txt": "".join(line + "\n" for line in LINES),
}
EXPECTED = {"tsv": LINES, "txt": LINES}


def write(path, content, encoding="utf-8"):
    data = content if isinstance(content, bytes) else content.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def failure(error, path, column=None, **kwargs):
    """Return the one line that reading a file fails with."""
    with pytest.raises(error) as caught:
        list(iter_texts(path, column, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(path, column=None, **kwargs):
    """Return the texts of a file and the report on them."""
    report = ReadReport()
    return list(iter_texts(path, column, report=report, **kwargs)), report


# Formats and encodings


@pytest.mark.parametrize("ending", ["", ".GZ"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_texts_of_each_format(tmp_path, kind, encoding, ending):
    path = write(tmp_path / f"texts.{kind}{ending}", CONTENTS[kind], encoding)
    assert list(iter_texts(path)) == EXPECTED.get(kind, TEXTS)


@pytest.mark.parametrize("arrow_type", [pyarrow.string(), pyarrow.large_string()])
def test_texts_of_parquet(tmp_path, arrow_type):
    column = pyarrow.array(TEXTS, arrow_type)
    for values in (column, column.dictionary_encode()):
        path = write_parquet(tmp_path / "texts", id=range(len(TEXTS)), text=values)
        assert list(iter_texts(path, kind="parquet")) == TEXTS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    assert list(iter_texts(write(tmp_path / "a.csv", as_csv(terminator=end)))) == TEXTS
    path = write(tmp_path / "a.txt", end.join(["one", "", "two"]))
    assert list(iter_texts(path)) == ["one", "", "two"]
    path = write(tmp_path / "b.csv", f'text{end}"one{end}two"{end}')
    assert list(iter_texts(path)) == [f"one{end}two"]  # inside quotes they stay


@pytest.mark.parametrize("kind", [None, "csv", "jsonl"])
def test_a_dash_reads_standard_input(monkeypatch, kind):
    data = CONTENTS[kind or "txt"].encode("utf-8-sig")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert list(iter_texts("-", kind=kind)) == (TEXTS if kind else LINES)
    assert not sys.stdin.closed


@pytest.mark.parametrize("ending", ["csv", "tsv.GZ", "jsonl", "ndjson.gz", "txt"])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_stream_is_read_instead_of_the_file(ending, buffered):
    kind = ending.partition(".")[0]
    data = CONTENTS[kind].encode("utf-8-sig")
    stream = io.BytesIO(gzip.compress(data) if "." in ending else data)
    source = io.BufferedReader(stream, 16) if buffered else stream
    values = list(iter_column(f"s3://nowhere/a.{ending}", source=source))
    assert values == EXPECTED.get(kind, TEXTS)


def test_parquet_is_read_from_a_stream():
    stream = io.BytesIO()
    write_parquet(stream, text=TEXTS)
    assert list(iter_column("a", kind="parquet", source=stream)) == TEXTS


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.csv", b'text\n"open'), ("a.jsonl", b"{"), ("a.txt", b"\xff"), ("a.txt.gz", b"x"),
     ("a.parquet", b"x"), ("a.txt", b"")]
)  # fmt: skip
def test_errors_of_a_stream_bear_its_name(name, data):
    with pytest.raises(TableError, match=rf"^s3://bucket/{name}"):
        list(iter_column(f"s3://bucket/{name}", source=io.BytesIO(data)))


def test_reading_is_lazy(tmp_path):
    path = write(tmp_path / "a.jsonl", '"one"\n{broken\n')
    texts = iter_texts(path)
    assert next(texts) == "one"
    texts.close()


@pytest.mark.parametrize(
    ("name", "encoding", "advice"),
    [("a.csv", "cp1252", "iconv -f cp1252"), ("a.txt", "utf-16-le", "iconv -f utf-16le"),
     ("a.csv", "utf-16-be", "iconv -f utf-16be"), ("a.csv.gz", "cp1252", "gzip -dc")]
)  # fmt: skip
def test_another_encoding_is_named(tmp_path, name, encoding, advice):
    message = failure(TableError, write(tmp_path / name, "text\ncafé – bar\n", encoding))
    assert "is not UTF-8" in message
    assert advice in message


def test_bytes_that_are_not_cp1252_are_called_latin1(tmp_path):
    assert "latin1" in failure(TableError, write(tmp_path / "a.txt", b"caf\xe9 \x81\n"))


def test_nul_characters_are_kept(tmp_path):
    for kind in ("csv", "tsv", "txt"):
        path = write(tmp_path / f"a.{kind}", "a long first line\nno\0thing\n")
        assert list(iter_texts(path))[-1] == "no\0thing"


# Columns


@pytest.mark.parametrize("name", ["title", "title_and_description", "sentence"])
def test_a_single_column_or_a_known_name_needs_no_choice(tmp_path, name):
    assert list(iter_texts(write(tmp_path / "a.csv", f"{name}\nroad\n"))) == ["road"]
    if name != "title":
        assert list(iter_texts(write(tmp_path / "b.csv", f"id,{name}\n1,road\n"))) == ["road"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_column_is_chosen_by_name(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", CONTENTS[kind])
    assert [str(value) for value in iter_column(path, "id")][:2] == (
        ["1", "1"] if kind == "jsonl" else ["0", "1"]
    )
    assert column_names(path)[:2] == ["id", "text"]
    assert "id, text" in failure(ValueError, path, "titel")


def test_the_format_is_an_argument(tmp_path):
    path = write(tmp_path / "export.dat", CONTENTS["csv"])
    assert list(iter_texts(path, kind="csv")) == TEXTS


def test_several_columns_need_a_choice(tmp_path):
    assert "id, title" in failure(ValueError, write(tmp_path / "a.csv", "id,title\n1,road\n"))
    path = write_parquet(tmp_path / "a.parquet", id=[1], title=["one"])
    assert "id, title" in failure(ValueError, path)
    assert "id, title" in failure(ValueError, path, "x")
    assert "row 0 holds 1" in failure(TableError, path, "id")


def test_plain_lines_have_no_columns(tmp_path):
    for name, content in (("a.txt", "one\n"), ("a.jsonl", '"one"\n')):
        assert "'text'" in failure(ValueError, write(tmp_path / name, content), "text")


def test_two_columns_of_one_name_are_an_error(tmp_path):
    for name, content in (("a.csv", "text,text\na,b\n"), ("a.tsv", "text\tid\ttext\na\t1\tb\n")):
        assert "text" in failure(ValueError, write(tmp_path / name, content), "text")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    assert "text" in failure(ValueError, path)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n')
    assert "line 2: row 1" in failure(TableError, path)
    assert list(iter_texts(write(tmp_path / "b.csv", "text,,\na,,\n"), "text")) == ["a"]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([{"id": "a"}, {"id": "b", "text": "c"}], TableError),  # the first row lacks its text
        ([{"id": "a"}] * reader.SAMPLE_LINES + [{"id": "b", "text": "c"}], ValueError),
        ([{"id": "a", "title": "b"}, {"id": "c", "title": "d"}], ValueError),
    ],
)
def test_the_first_line_of_jsonl_does_not_decide_for_all(tmp_path, lines, error):
    failure(error, write(tmp_path / "a.jsonl", "".join(json.dumps(x) + "\n" for x in lines)))


def test_the_report_says_which_column_was_chosen(tmp_path):
    path = write(tmp_path / "a.csv", "id;text\n1;a\n")
    for column, reason in ((None, "by its name"), ("text", "as chosen")):
        _, report = read(path, column)
        assert (report.column, report.reason, report.delimiter) == ("text", reason, ";")
        assert report.describe() == f"column 'text' ({reason}), delimiter ';'"
    _, report = read(write(tmp_path / "a.txt", "a\n"))
    assert (report.column, report.describe()) == (None, "one text per line")


# Delimiters, quotes and headers


@pytest.mark.parametrize(
    ("name", "content", "delimiter"),
    [
        ("a.csv", "id;text\n1;hello, world\n2;bye\n", ";"),
        ("a.csv", "sep=;\nid;text\n1;hello, world\n2;bye\n", ";"),
        ("a.csv", "sep=|\r\ntext|id\r\nhello, world|1\r\nbye|2", "|"),
        ("a.csv", "id\ttext\n1\thello, world\n2\tbye\n", "\t"),
        ("a.csv", "id|text\n1|hello, world\n\n2|bye\n", "|"),
        ("a.tsv", 'id,text\n1,"hello, world"\n2,bye\n', ","),
        ("a.csv", 'id;text\n1;"hello, world"\n2;bye\n', ";"),
        ("a.csv", 'id,text\n1,"hello, world"\n2,bye\n', ","),
        ("a.csv", '\n"id","text; long"\n1,"hello, world"\n2,bye\n', ","),
    ],
)
def test_the_delimiter_is_detected(tmp_path, name, content, delimiter):
    texts, report = read(write(tmp_path / name, content), column_names(tmp_path / name)[-1]
                         if "long" in content else "text")  # fmt: skip
    assert [text for text in texts if text] == ["hello, world", "bye"]
    assert report.delimiter == delimiter


@pytest.mark.parametrize(
    "content", ["text\na;b\nc;d\n", "Titel; lang\none\ntwo\n", "text\n", 'text\n"a;b"\n"c;d"\n']
)
def test_one_column_is_not_split(tmp_path, content):
    path = write(tmp_path / "a.csv", content)
    assert len(column_names(path)) == 1


def test_the_delimiter_is_an_argument(tmp_path):
    path = write(tmp_path / "a.csv", "a;text,b\n1;2,c\n")
    assert column_names(path, delimiter=";") == ["a", "text,b"]
    assert "';'" in failure(ValueError, write(tmp_path / "b.csv", "a;b\n1;2\n"), "b", delimiter=",")
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(ValueError, match="delimiter"):
            list(iter_texts(path, delimiter=wrong))


@pytest.mark.parametrize("text", ['"said" he', '"open', 'close"', '""', '5" pipe', '"all"'])
def test_tsv_has_no_quotes(tmp_path, text):
    assert list(iter_texts(write(tmp_path / "a.tsv", f"id\ttext\n1\t{text}\n2\tb\n"))) == [
        text,
        "b",
    ]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('"id"\t"text"\n1\t"all"\n', ["all"]),  # every cell quoted
        ('id\ttext\n1\t"two\nlines\t""x"""\n', ['two\nlines\t"x"']),
        ('id\ttext\n1\t"a ""b"""\n2\tc\n', ['a "b"', "c"]),
        ('id\ttext\n1\t"two\nlines"\n', ["two\nlines"]),
        ('id\ttext\n1\t"a\n2\tb"\n', ['"a', 'b"']),  # right without quoting
    ],
)
def test_tsv_is_read_by_the_rules_of_csv_where_it_was_written_so(tmp_path, content, texts):
    assert list(iter_texts(write(tmp_path / "a.tsv", content))) == texts


def test_a_file_without_a_header(tmp_path):
    path = write(tmp_path / "a.csv", "hello world\nsecond text\n")
    texts, report = read(path)
    assert texts == ["second text"]
    assert "hello world" in report.problems()[0]
    assert read(path, header=False)[0] == ["hello world", "second text"]
    path = write(tmp_path / "b.csv", "1,one\n2,two\n")
    assert read(path, "1", header=False)[0] == ["one", "two"]
    assert "0, 1" in failure(ValueError, path, header=False)


def test_long_cells_leave_the_limit_of_the_csv_module_alone(tmp_path):
    text = "water " * 50_000
    path = write(tmp_path / "a.csv", f'text\nfirst\n"{text}"\n{text}\n')
    before = csv.field_size_limit()
    one, two = iter_texts(path), iter_texts(path)
    next(two)
    assert list(one) == ["first", text, text]
    assert csv.field_size_limit() == before
    assert list(two) == [text, text]


@pytest.mark.parametrize(
    ("content", "line", "row"),
    [
        ('id,text\n1,ok\n2,"never closed\n3,x\n', 3, None),
        ('id,text\n1,ok\n2,"a"b\n3,x\n', 3, 1),
        ('id,text\n1,"two\nlines"\n2,ok\n3,"a"b\n', 5, 2),
        ('id,text\n1,"a\nb"c\n', 2, None),
        ("id,text\n1,one\n2,two, and more\n", 3, 1),
        ("text\none\ntwo, and more\n", 3, 1),
        ("id,text\n1,one\n2\n3,three\n", 3, 1),
        ('id,"tex\n1,one\n', 1, None),
    ],
)
def test_malformed_csv_is_named_by_line_and_row(tmp_path, content, line, row):
    message = failure(TableError, write(tmp_path / "a.csv", content))
    assert f"line {line}:" in message
    assert row is None or f"row {row} " in message


def test_an_unclosed_quote_fails_early(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_CELL", 1000)
    taken = []

    class Source(io.BytesIO):
        def readinto(self, buffer):
            taken.append(len(buffer))
            return super().readinto(buffer)

    source = Source(b'text\none\n"open\n' + b"line\n" * 200_000)
    with pytest.raises(TableError, match="line 3"):
        list(iter_column("a.csv", source=source))
    assert sum(taken) < 200_000


# Rows without a text


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "first\n\nthird\n"), ("a.csv", "text\nfirst\n\nthird\n"),
     ("a.csv", "id,text\n0,first\n\n2,third\n"), ("a.tsv", "text\nfirst\n\nthird\n"),
     ("a.jsonl", '"first"\n\n"third"\n'), ("a.jsonl", '{"text": "first"}\n \n{"text": "third"}\n'),
     ("a.csv", 'id,text\n0,first\n1,""\n2,third\n'), ("a.jsonl", '"first"\n""\n"third"\n')]
)  # fmt: skip
def test_a_blank_line_is_an_empty_text_in_every_format(tmp_path, name, content):
    texts, report = read(write(tmp_path / name, content))
    assert texts == ["first", "", "third"]
    assert (report.rows, report.empty) == (3, [1])
    assert report.problems() == ["1 of 3 text is empty: rows 1"]


NULLS = {
    "a.jsonl": '{"text": "one"}\n{"text": null}\n{"text": "three"}\n',
    "b.jsonl": '{"text": "one"}\n{"title": "two"}\n{"text": "three"}\n',
    "c.jsonl": '{"text": "one"}\n{"text": 7}\n{"text": "three"}\n',
    "d.jsonl": '{"text": "one"}\n{broken\n{"text": "three"}\n',
    "a.csv": "id,text\n1,one\n2\n3,three\n",
    "b.csv": "id,text\n1,one\n2,two,more\n3,three\n",
    "c.csv": 'id,text\n1,one\n2,"a"b\n3,three\n',
    "a.tsv": "id\ttext\n1\tone\n2\n3\tthree\n",
}


@pytest.mark.parametrize("name", [*NULLS, "a.parquet"])
def test_on_error(tmp_path, name, caplog):
    if name.endswith("parquet"):
        path = write_parquet(tmp_path / name, text=["one", None, "three"])
    else:
        path = write(tmp_path / name, NULLS[name])
    assert "row 1 " in failure(TableError, path)
    texts, report = read(path, on_error="skip")
    assert (texts, list(report.skipped), report.rows) == (["one", "three"], [1], 3)
    texts, report = read(path, on_error="blank")
    assert (texts, list(report.blanked)) == (["one", "", "three"], [1])
    assert "row 1 " in report.problems()[0]
    with caplog.at_level(logging.WARNING):
        list(iter_texts(path, on_error="skip"))
    assert "row 1 " in caplog.text
    with pytest.raises(ValueError, match="fail, skip, blank"):
        list(iter_texts(path, on_error="ignore"))


def test_long_lists_of_rows_are_shortened(tmp_path):
    _, report = read(write(tmp_path / "a.txt", "\n" * 30))
    assert report.problems() == [
        "30 of 30 texts are empty: rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more"
    ]


@pytest.mark.parametrize("line", ["{", '{"text": }', "one", "[" * 100_000])
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{line}\n')
    assert "line 3: row 2 is not JSON" in failure(TableError, path)
    with pytest.raises(TableError, match="row 2"):
        list(iter_column(path))


# Missing, empty and damaged files


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.txt.gz"])
def test_a_missing_file_a_directory_and_a_uri_are_rejected(tmp_path, name):
    assert name in failure(FileNotFoundError, tmp_path / name)
    (tmp_path / name).mkdir()
    assert "directory" in failure(ValueError, tmp_path / name)
    message = failure(ValueError, f"s3://user:SECRET@bucket/{name}")
    assert "bucket" in message
    assert "SECRET" not in message


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.gz"])
def test_an_unknown_ending_lists_the_formats(tmp_path, name):
    assert "csv, tsv, jsonl" in failure(ValueError, write(tmp_path / name, "x"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.tsv", ""), ("a.jsonl", ""), ("a.txt", ""), ("a.csv.gz", ""),
     ("a.csv", "id,text\n"), ("a.csv", "id,text"), ("a.csv", "\n\n")]
)  # fmt: skip
def test_an_empty_file_holds_no_texts(tmp_path, name, content):
    failure(NoTextsError, write(tmp_path / name, content))


def test_an_empty_parquet_file_holds_no_texts_and_a_damaged_one_is_named(tmp_path):
    failure(NoTextsError, write_parquet(tmp_path / "a.parquet", text=pyarrow.array([], "string")))
    for content in (b"", b"PAR1", b"id,text\n1,one\n" * 20):
        with pytest.raises(TableError, match="parquet") as caught:
            list(iter_texts(write(tmp_path / "b.parquet", content)))
        assert not isinstance(caught.value, NoTextsError)


@pytest.mark.parametrize("damage", ["cut", "body", "checksum", "none"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    rng = np.random.default_rng(0)
    text = "text\n" + "".join(f"{number}\n" for number in rng.integers(0, 1 << 60, 200))
    data = gzip.compress(text.encode())
    path = tmp_path / "a.csv.gz"
    path.write_bytes(
        {"cut": data[:-20], "body": data[:30] + bytes(20) + data[50:],
         "checksum": data[:-8] + bytes(8), "none": text.encode()}[damage]
    )  # fmt: skip
    assert "gzip" in failure(TableError, path)


def test_a_gzip_file_without_the_ending_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(gzip.compress(CONTENTS["csv"].encode()))
    assert list(iter_texts(tmp_path / "a.csv")) == TEXTS


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'onnxsim-embed\[parquet\]'"):
        list(iter_texts(tmp_path / "a.parquet"))


# Scored pairs


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("header", [True, False])
def test_scored_pairs_are_read_with_or_without_a_header(tmp_path, ending, header):
    rows = [["left", "right", "score"]] * header + [["a road", "one, two", "4.5"], ["", "b", "-1"]]
    delimiter = "\t" if ending == "tsv" else ";"
    content = "".join(delimiter.join(row) + "\n" for row in rows)
    path = write(tmp_path / f"pairs.{ending}", content, "utf-8-sig")
    assert read_scored_pairs(path) == (["a road", ""], ["one, two", "b"], [4.5, -1.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no scored pairs"),
        ("left,right,score\n", "no scored pairs"),
        ("a,b\n", "line 1: row 0"),
        ("a,b,1\nc,d,high\n", "line 2: row 1"),
        ("a,b,1\nc\n", "line 2: row 1"),
        ("a,b,1\n\nc,d,1\n", "line 2: row 1"),
        ('a,b,1\n"c,d,2\n', "line 2"),
        ("a,b,1\ncaf\xe9,d,2\n".encode("latin1"), "is not UTF-8"),
    ],
)
def test_pairs_without_texts_or_score_are_named(tmp_path, content, message):
    with pytest.raises(TableError, match=message):
        read_scored_pairs(write(tmp_path / "pairs.csv", content))
