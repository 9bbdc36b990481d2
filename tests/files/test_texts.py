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
from support import iter_column

from onnxsim_embed.errors import NoTextsError, TableError
from onnxsim_embed.files import delimited
from onnxsim_embed.files import rows as reader
from onnxsim_embed.files.texts import ReadReport, iter_texts, read_scored_pairs

TEXTS = ["a road", 'the "old" river, by the sea', "two\nlines", "", "  spaces  ", "café 漢字 🙂",
         "line\u2028separator", "back\\slash"]  # fmt: skip
LINES = [text.replace("\n", " ") for text in TEXTS]  # what plain lines and tsv can hold


def as_csv(terminator="\n"):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=terminator, quoting=csv.QUOTE_ALL)
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
EXPECTED = CONTENTS | dict.fromkeys(CONTENTS, TEXTS) | {"tsv": LINES, "txt": LINES}


def write(path, content, encoding="utf-8"):
    data = content if isinstance(content, bytes) else content.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def read(path, column=None, **kwargs):
    """Return the texts of a file and the report on them."""
    report = ReadReport()
    return list(iter_texts(path, column, report=report, **kwargs)), report


@pytest.mark.parametrize("ending", ["", ".GZ"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_formats_encodings_and_sources(tmp_path, monkeypatch, kind, encoding, ending):
    path = write(tmp_path / f"texts.{kind}{ending}", CONTENTS[kind], encoding)
    assert list(iter_texts(path)) == EXPECTED[kind]
    for source in (path.open("rb"), io.BytesIO(path.read_bytes())):
        with source:
            name = f"s3://nowhere/a.{kind}{ending}"
            assert list(iter_column(name, source=source)) == EXPECTED[kind]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    kind = {"ndjson": "jsonl"}.get(kind, kind)
    assert list(iter_texts("-", kind=None if kind == "txt" else kind)) == EXPECTED[kind]
    assert not sys.stdin.closed


@pytest.mark.parametrize("arrow_type", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path, arrow_type):
    column = pyarrow.array(TEXTS, arrow_type)
    for values in (column, column.dictionary_encode()):
        path = write_parquet(tmp_path / "texts", id=range(len(TEXTS)), text=values)
        assert list(iter_texts(path, kind="parquet")) == TEXTS
        assert list(iter_column("a.parquet", source=io.BytesIO(path.read_bytes()))) == TEXTS


# name of the file, content, arguments, texts
READS = [
    # line ends; inside quotes they stay
    ("a.csv", as_csv("\r\n"), {}, TEXTS),
    ("a.csv", as_csv("\r"), {}, TEXTS),
    ("a.csv", 'text\r\n"one\r\ntwo"\r\n', {}, ["one\r\ntwo"]),
    ("a.txt", "one\r\n\r\ntwo", {}, ["one", "", "two"]),
    # columns
    ("a.csv", "title\nroad\n", {}, ["road"]),
    ("a.csv", "id,title_and_description\n1,road\n", {}, ["road"]),
    ("a.tsv", "id\tsentence\n1\troad\n", {}, ["road"]),
    ("a.csv", "id,title,text\n1,road,river\n", {"column": "title"}, ["road"]),
    ("a.jsonl", '"one"\n{"text": "two"}\n"\\ud83d\\ude42"\n', {}, ["one", "two", "🙂"]),
    ("a.dat", "text\nroad\n", {"kind": "csv"}, ["road"]),
    ("a.csv", "text,,\na,,\n", {"column": "text"}, ["a"]),  # columns without a name
    ("a.csv", "1,one\n2,two\n", {"column": "1", "header": False}, ["one", "two"]),
    ("a.csv", "hello world\nsecond text\n", {"header": False}, ["hello world", "second text"]),
    # delimiters
    ("a.csv", "id;text\n1;hello, world\n2;bye\n", {}, ["hello, world", "bye"]),
    ("a.csv", "sep=|\r\ntext|id\r\nhello, world|1\r\nbye|2", {}, ["hello, world", "bye"]),
    ("a.csv", "id\ttext\n1\thello, world\n2\tbye\n", {}, ["hello, world", "bye"]),
    ("a.tsv", 'id,text\n1,"hello, world"\n2,bye\n', {}, ["hello, world", "bye"]),
    ("a.csv", 'id;text\n1;"hello; world"\n2;bye\n', {}, ["hello; world", "bye"]),
    ("a.csv", '\n"id","text"\n1,"hello, world"\n2,bye\n', {}, ["hello, world", "bye"]),
    ("a.csv", "a;text,b\n1;2,c\n", {"delimiter": ";", "column": "text,b"}, ["2,c"]),
    ("a.csv", "text\na;b\nc;d\n", {}, ["a;b", "c;d"]),
    ("a.csv", "Titel; lang\none\ntwo\n", {}, ["one", "two"]),
    ("a.csv", "sep=;;;\r\nid;text;n\r\n1;a, b;4,5\r\n", {}, ["a, b"]),
    ("a.csv", "\ufeffsep=;\nid;price;text\n1;4,5;a, b\n2;3,25;c\n", {}, ["a, b", "c"]),
    ("a.csv", "id,text\r\n1,a\n2,b\r3,c", {}, ["a", "b", "c"]),
    ("a.csv", "Text,text, text\na,b,c\n", {}, ["b"]),
    ("a.csv", 'id,"a ""quoted"", name"\n1,b\n', {"column": 'a "quoted", name'}, ["b"]),
    # tsv has no quotes, unless it was written with them
    *[("a.tsv", f"id\ttext\n1\t{text}\n2\tb\n", {}, [text, "b"])
      for text in ('"said" he', '"open', 'close"', '""', '5" pipe', '"all"')],
    ("a.tsv", '"id"\t"text"\n1\t"all"\n', {}, ["all"]),
    ("a.tsv", 'id\ttext\n1\t"two\nlines\t""x"""\n', {}, ['two\nlines\t"x"']),
    ("a.tsv", 'id\ttext\n1\t"a ""b"""\n2\tc\n', {}, ['a "b"', "c"]),
    ("a.tsv", 'id\ttext\n1\t"two\nlines"\n', {}, ["two\nlines"]),
    ("a.tsv", 'id\ttext\n1\t"a\n2\tb"\n', {}, ['"a', 'b"']),  # right without quotes
    # a blank line is an empty text
    ("a.txt", "first\n\nthird\n", {}, ["first", "", "third"]),
    ("a.csv", "text\nfirst\n\nthird\n", {}, ["first", "", "third"]),
    ("a.csv", "id,text\n0,first\n\n2,third\n", {}, ["first", "", "third"]),
    ("a.csv", "id,text\n0,first\n  \n2,third\n,\n", {}, ["first", "", "third", ""]),
    ("a.jsonl", '"first"\n\n"third"\n', {}, ["first", "", "third"]),
    ("a.jsonl", '{"text": "first"}\n \n{"text": "third"}\n', {}, ["first", "", "third"]),
    # nul characters
    ("a.csv", "text\nno\0thing\n", {}, ["no\0thing"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "arguments", "texts"), READS)
def test_texts_are_read(tmp_path, name, content, arguments, texts):
    path = write(tmp_path / name, content)
    found, report = read(path, **arguments)
    assert found == texts
    assert report.rows == len(texts)
    assert report.empty == [row for row, text in enumerate(texts) if not text.strip()]


LONG = [{"id": "a"}] * reader.SAMPLE_LINES

# name of the file, content, arguments, error, what its message holds
FAILURES = [
    # columns
    ("a.csv", "id,title\n1,a\n", {}, ValueError, "id, title"),
    ("a.csv", "id,title\n1,a\n", {"column": "titel"}, ValueError, "id, title"),
    ("a.csv", "a;b\n1;2\n", {"column": "b", "delimiter": ","}, ValueError, "';'"),
    ("a.txt", "one\n", {"column": "text"}, ValueError, "'text'"),
    ("a.csv", "text,text\na,b\n", {"column": "text"}, ValueError, "two columns"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', {}, TableError, "line 2: row 1"),
    # the first line of jsonl does not decide for all
    ("a.jsonl", '{"id": "a"}\n{"id": "b", "text": "c"}\n', {}, TableError, "row 0"),
    ("a.jsonl", "\n".join(map(json.dumps, [*LONG, {"id": "b", "text": "c"}])), {}, ValueError, "id, text"),
    # rows without a text
    ("a.jsonl", '{"text": "a"}\n{"text": null}\n', {}, TableError, "line 2: row 1"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": [7]}\n', {}, TableError, "line 3: row 2"),
    ("a.jsonl", '{"text": "a"}\n\n{broken\n', {}, TableError, "line 3: row 2"),
    ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, {}, TableError, "line 2: row 1"),
    ("a.csv", "id,text\n1,one\n2\n3,three\n", {}, TableError, "line 3: row 1"),
    ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', {}, TableError, "line 2: row 1"),
    ("a.jsonl", '{"text": "a", "id": "\\ud83d"}\n', {"id_column": "id"}, TableError, "line 1: row 0"),
    # malformed csv
    ("a.csv", "id,text\n1,one\n2,two, and more\n", {}, TableError, "line 3: row 1"),
    ("a.csv", 'id,text\n1,ok\n2,"never closed\n3,x\n', {}, TableError, "line 3:"),
    ("a.csv", 'id,text\n1,ok\n2,"a"b\n3,x\n', {}, TableError, "line 3: row 1"),
    ("a.csv", 'id,text\n1,"two\nlines"\n2,ok\n3,"a"b\n', {}, TableError, "line 5: row 2"),
    ("a.csv", 'id,text\n1,"a\nb"c\n', {"on_error": "skip"}, TableError, "line 2:"),
    ("a.csv", 'id,"tex\n1,one\n', {}, TableError, "line 1:"),
    # encodings
    ("a.csv", "text\ncafé – bar\n".encode("cp1252"), {}, TableError, "iconv -f cp1252 -t utf-8 /"),
    ("a.csv.gz", "text\ncafé – bar\n".encode("cp1252"), {}, TableError, "gzip -dc"),
    ("a.txt", "a long line\n".encode("utf-16-le"), {}, TableError, "iconv -f utf-16le"),
    ("a.csv", "text\na long line\n".encode("utf-16-be"), {}, TableError, "iconv -f utf-16be"),
    ("a.txt", b"caf\xe9 \x81\n", {}, TableError, "iconv -f latin1"),
    *[("a.csv", text, {}, TableError, message) for text, message in (
        ("text\na\n".encode("utf-32"), "UTF-32"), (b"PK\3\4\x14\0\6\0", "save it as csv"),
        (b"PAR1\x15\4", "parquet"), (b"\x93NUMPY\1\0", "array"))],
    ("a.jsonl", '[{"text": "a"}, {"text": "b"}]', {}, TableError, "line 1: row 0"),
    ("a.jsonl", '{"text": "a"}\n{"Text": "b"}\n', {}, TableError, "line 2: row 1"),
    ("a.jsonl", '{\n"text": "a"\n}\n', {}, TableError, "line 1: row 0"),
    # empty, damaged and unknown files
    *[(f"a.{kind}", "", {}, NoTextsError, "holds no texts") for kind in (*CONTENTS, "csv.gz")],
    ("a.csv", "id,text\n", {"column": "text"}, NoTextsError, "holds no texts"),
    ("a.csv", "\n\n", {}, NoTextsError, "holds no texts"),
    *[("a.parquet", content, {}, TableError, "parquet") for content in (b"", b"PAR1", b"id,text\n" * 99)],
    *[(f"a{ending}", "x", {}, ValueError, "csv, tsv, jsonl") for ending in ("", ".xlsx", ".gz")],
    *[("a.csv", "text\na\n", {"delimiter": d}, ValueError, "delimiter") for d in ("", ";;", '"', "\n")],
    ("a.csv", "text\na\n", {"on_error": "ignore"}, ValueError, "fail, skip, blank"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "arguments", "error", "message"), FAILURES)
def test_errors(tmp_path, name, content, arguments, error, message):
    path = write(tmp_path / name, content)
    with pytest.raises(error) as caught:
        list(iter_texts(path, **arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if error is TableError:
        source = io.BytesIO(path.read_bytes())
        with pytest.raises(TableError, match=r"^s3://bucket/a"):
            list(iter_texts(f"s3://bucket/{name}", source=source, **arguments))


def test_parquet_errors(tmp_path):
    with pytest.raises(NoTextsError):
        read(write_parquet(tmp_path / "a.parquet", text=pyarrow.array([], "string")))
    path = write_parquet(tmp_path / "a.parquet", id=[1], title=["one"])
    for column, error, message in ((None, ValueError, "id, title"), ("x", ValueError, "id, title"),
                                   ("id", TableError, r"row 0 has no text \(1\)")):  # fmt: skip
        with pytest.raises(error, match=message):
            read(path, column)
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(ValueError, match="two columns"):
        read(path)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_missing_file_and_a_directory_are_rejected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="directory"):
        read(tmp_path / name)


@pytest.mark.parametrize("damage", ["cut", "body", "checksum", "none"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    rng = np.random.default_rng(0)
    text = "text\n" + "".join(f"{number}\n" for number in rng.integers(0, 1 << 60, 200))
    data = gzip.compress(text.encode())
    damaged = {"cut": data[:-20], "body": data[:30] + bytes(20) + data[50:],
               "checksum": data[:-8] + bytes(8), "none": text.encode()}[damage]  # fmt: skip
    (tmp_path / "a.csv.gz").write_bytes(damaged)
    with pytest.raises(TableError, match="gzip"):
        read(tmp_path / "a.csv.gz")
    (tmp_path / "a.csv").write_bytes(data)  # without the ending
    assert len(read(tmp_path / "a.csv")[0]) == 200


def test_reading_is_lazy_and_long_cells_leave_the_limit_of_the_csv_module_alone(tmp_path):
    text = "water " * 50_000
    path = write(tmp_path / "a.csv", f'text\nfirst\n"{text}"\n{text}\n"open')
    before = csv.field_size_limit()
    one, two = iter_texts(path), iter_texts(path)
    assert (next(one), next(two), next(one), next(two), next(one)) == (
        "first", "first", text, text, text,
    )  # fmt: skip
    assert csv.field_size_limit() == before


def test_an_unclosed_quote_fails_early(monkeypatch):
    monkeypatch.setattr(delimited, "MAX_CELL", 1000)
    source = io.BytesIO(b'text\none\n"open\n' + b"line\n" * 200_000)
    with pytest.raises(TableError, match="line 3"):
        list(iter_column("a.csv", source=source))
    assert source.tell() < 200_000


@pytest.mark.parametrize(
    ("name", "row"),
    [("a.jsonl", '{"text": null}'), ("a.jsonl", '{"title": "two"}'), ("a.jsonl", '{"text": 7}'),
     ("a.jsonl", "{broken"), ("a.csv", "2"), ("a.csv", "2,two,more"), ("a.csv", '2,"a"b'),
     ("a.tsv", "2"), ("a.parquet", "")],
)  # fmt: skip
def test_on_error(tmp_path, name, row, caplog):
    if name == "a.parquet":
        path = write_parquet(tmp_path / name, text=["one", None, "three"])
    elif name == "a.jsonl":
        path = write(tmp_path / name, f'{{"text": "one"}}\n{row}\n{{"text": "three"}}\n')
    else:
        content = f"id,text\n1,one\n{row}\n3,three\n"
        path = write(tmp_path / name, content.replace(",", "\t") if name == "a.tsv" else content)
    with pytest.raises(TableError, match="row 1 "):
        read(path)
    texts, report = read(path, on_error="skip")
    assert (texts, list(report.skipped), report.rows) == (["one", "three"], [1], 3)
    texts, report = read(path, on_error="blank")
    assert (texts, list(report.blanked), report.empty) == (["one", "", "three"], [1], [1])
    assert "row 1 " in report.problems()[0]
    with caplog.at_level(logging.WARNING):
        list(iter_texts(path, on_error="skip"))
    assert "row 1 " in caplog.text


def test_the_report(tmp_path):
    path = write(tmp_path / "a.csv", "id;text\n1;a\n")
    for column, reason in ((None, "by its name"), ("text", "as chosen")):
        _, report = read(path, column)
        assert (report.column, report.reason, report.delimiter) == ("text", reason, ";")
        assert report.describe() == f"column 'text' ({reason}), delimiter ';'"
    _, report = read(write(tmp_path / "a.txt", "\n" * 30))
    assert (report.column, report.describe()) == (None, "one text per line")
    assert report.problems() == [
        "30 of 30 texts are empty: rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more"
    ]
    path = write(tmp_path / "a.tsv", 'id\ttext\n1\t"a ""b"""\n')
    texts, report = read(path)
    assert (texts, len(report.warnings)) == (['a "b"'], 1)
    assert read(path, delimiter="\t")[0] == ['"a ""b"""']
    for header in ("hello world", "123"):
        _, report = read(write(tmp_path / "b.csv", f"{header}\nsecond text\n"))
        assert repr(header) in report.problems()[0]  # read as the header


# Scored pairs


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("header", [True, False])
def test_scored_pairs_are_read_with_or_without_a_header(tmp_path, ending, header):
    rows = [["left", "right", "score"]] * header + [["a road", "one, two", "4.5"], ["", "b", "-1"]]
    delimiter = "\t" if ending == "tsv" else ";"
    content = "".join(delimiter.join(row) + "\n" for row in rows)
    path = write(tmp_path / f"pairs.{ending}", content, "utf-8-sig")
    pairs = (["a road", ""], ["one, two", "b"], [4.5, -1.0])
    assert read_scored_pairs(path) == read_scored_pairs(path, delimiter=delimiter) == pairs
    if header:
        with pytest.raises(TableError, match="row 0"):
            read_scored_pairs(path, header=False)
    else:
        assert read_scored_pairs(path, header=False) == pairs


def test_scored_pairs_of_other_formats_and_without_bad_rows(tmp_path, caplog):
    rows = [{"a": "x", "b": "y", "score": 4, "more": 1}, {"a": "x", "b": None, "score": 1},
            {"a": "v", "b": "w", "score": True}, {"a": "", "b": "w", "score": "0.5"}]  # fmt: skip
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    expected = (["x", ""], ["y", "w"], [4.0, 0.5])
    assert read_scored_pairs(path, on_error="skip") == expected
    assert "2 of 4 rows without a pair are skipped: rows 1, 2" in caplog.text
    with pytest.raises(TableError, match="row 1"):
        read_scored_pairs(path)
    with pytest.raises(ValueError, match="fail or skip"):
        read_scored_pairs(path, on_error="blank")
    columns = {"a": ["x", ""], "b": ["y", "w"], "score": [4, 0.5]}
    assert read_scored_pairs(write_parquet(tmp_path / "a.parquet", **columns)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no scored pairs"), ("left,right,score\n", "no scored pairs"), ("a,b\n", "line 1: row 0"),
     ("a,b,1\nc,d,high\n", "line 2: row 1"), ("a,b,1\nc\n", "line 2: row 1"),
     ("a,b,1\n\nc,d,1\n", "line 2: row 1"), ("a,b,1\nc,d,nan\n", "line 2: row 1"), ('a,b,1\n"c,d,2\n', "line 2"), (b"\xff", "is not UTF-8")],
)  # fmt: skip
def test_pairs_without_texts_or_score_are_named(tmp_path, content, message):
    with pytest.raises(TableError, match=message):
        read_scored_pairs(write(tmp_path / "pairs.csv", content))
