"""Files -> parts: every row once, in order, with numbers that never change. Needs no Ray."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from onnxsim_embed.cli import main
from onnxsim_embed.errors import TableError
from onnxsim_embed.ray import texts as ray_texts
from onnxsim_embed.ray.texts import Columns, TextFile, group_files, read_shards, survey, with_rows

TEXTS = ["a road", 'the "old" river, by the sea', "two\nlines\r\nmore", "", "  ", "007", "1.50", "naïve 漢字 🙂", "NA", "true"]  # fmt: skip
IDS = [f"{number:03}" for number in range(len(TEXTS))]
TWO = Columns("text", "id")


def as_csv(ids, texts, delimiter=",", bom=""):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows([["id", "text"], *zip(ids, texts, strict=True)])
    return (bom + stream.getvalue()).encode()


def as_jsonl(ids, texts):
    rows = [{"id": name, "text": text} for name, text in zip(ids, texts, strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(ids, texts, **options):
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": ids, "text": texts}), stream, **options)
    return stream.getvalue()


FORMATS = {
    "csv": lambda ids, texts: as_csv(ids, texts),
    "tsv": lambda ids, texts: as_csv(ids, texts, "\t", "\ufeff"),
    "csv.gz": lambda ids, texts: gzip.compress(as_csv(ids, texts)),
    "jsonl": as_jsonl,
    "ndjson.GZ": lambda ids, texts: gzip.compress(as_jsonl(ids, texts)),
    "parquet": lambda ids, texts: as_parquet(ids, texts, row_group_size=3),
}


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def write_lines(directory, sizes):
    """Files of so many lines, each line another."""
    number = 0
    for index, size in enumerate(sizes):
        lines = [f"text {number + i}\n" for i in range(size)]
        write(directory / f"{index:03}.txt", "".join(lines))
        number += size
    return [f"text {i}" for i in range(number)]


def surveyed(locations, columns=Columns()):  # noqa: B008 - it is frozen
    return with_rows([survey(str(location), columns) for location in locations])


def parts_of(files, part_rows, columns=Columns(), id_type="int64", done=()):  # noqa: B008
    groups = group_files(files, part_rows)
    reads = (read_shards(group, columns, part_rows, id_type, done) for group in groups)
    return list(chain.from_iterable(reads))


def rows_of(parts):
    return [pair for part in parts for pair in zip(part.ids, part.values, strict=True)]


# survey


@pytest.mark.parametrize("ending", FORMATS)
def test_cells_stay_the_texts_that_they_are(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}", FORMATS[ending](IDS, TEXTS))
    files, id_type = surveyed([path], TWO)
    assert (files[0].location, files[0].rows, id_type) == (path, len(TEXTS), "string")
    assert rows_of(parts_of(files, 3, TWO, id_type)) == list(zip(IDS, TEXTS, strict=True))
    files, id_type = surveyed([path])  # rows have numbers where no column of ids is named
    assert id_type == "int64"
    assert rows_of(parts_of(files, 4)) == list(enumerate(TEXTS))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_ids_may_be_numbers(tmp_path, ending):
    numbers = [-(2**63), 2**63 - 1, 0, 5]
    path = write(tmp_path / f"a.{ending}", FORMATS[ending](numbers, TEXTS[:4]))
    files, id_type = surveyed([path], TWO)
    assert id_type == "int64"
    assert [part.ids for part in parts_of(files, 3, TWO, id_type)] == [numbers[:3], numbers[3:]]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_uri_gives_the_same_rows_and_digest(tmp_path, ending):
    path = write(tmp_path / f"a b [1].{ending}", FORMATS[ending](IDS, TEXTS))
    uri = f"file://{tmp_path}/a%20b%20[1].{ending}?x=1"
    one, other = survey(path, TWO), survey(uri, TWO)
    assert (one.rows, one.digest, one.id_type) == (other.rows, other.digest, other.id_type)
    assert rows_of(parts_of([one], 4, TWO, "string")) == rows_of(
        parts_of([other], 4, TWO, "string")
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_the_digest_tells_contents_apart(tmp_path, ending):
    """In parquet too a change that keeps the size, and the smallest and largest text."""
    made = FORMATS[ending]
    contents = [(IDS, TEXTS), (IDS, ["a toad", *TEXTS[1:]]), (IDS[::-1], TEXTS), (IDS, TEXTS[::-1])]
    paths = [
        write(tmp_path / f"{i}.{ending}", made(*content)) for i, content in enumerate(contents)
    ]
    assert len({survey(path, TWO).digest for path in paths}) == len(contents)
    again = write(tmp_path / f"again.{ending}", made(IDS, TEXTS))
    assert survey(again, TWO).digest == survey(paths[0], TWO).digest


def test_all_bytes_of_a_file_are_digested(tmp_path):
    path = write(tmp_path / "a.txt", "one\n" * 100_000)
    before = survey(path, Columns())
    assert before.rows == 100_000
    write(tmp_path / "a.txt", "one\n" * 99_999 + "two\n")
    assert survey(path, Columns()).digest != before.digest


def test_what_is_no_text_is_handed_on_as_it_is(tmp_path):
    """Rows that cannot be encoded are reported one by one, by the encoder."""
    values = [None, 5, 1.5, True, ["a"], {"b": 1}, "\ud800", "good"]
    path = write(tmp_path / "a.jsonl", as_jsonl(range(8), values))
    files, id_type = surveyed([path], TWO)
    assert rows_of(parts_of(files, 3, TWO, id_type)) == list(enumerate(values))
    path = write(tmp_path / "a.parquet", as_parquet([1, 2, 3], ["a", None, "b"]))
    files, _ = surveyed([path], TWO)
    assert rows_of(parts_of(files, 2, TWO)) == [(1, "a"), (2, None), (3, "b")]


def test_the_kind_may_be_said(tmp_path):
    path = write(tmp_path / "part-0000", as_jsonl(IDS, TEXTS))
    columns = Columns("text", "id", "jsonl")
    files, id_type = surveyed([path], columns)
    assert rows_of(parts_of(files, 4, columns, id_type)) == list(zip(IDS, TEXTS, strict=True))


# what a survey refuses


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (None, "row 2 has no id (null)"),
        (1.5, "row 2 has the id 1.5; ids are 64-bit integers or texts"),
        (True, "row 2 has the id True;"),
        (2**63, "row 2 has the id 9223372036854775808;"),
        ("\ud800", r"row 2 has the id '\ud800';"),
        ([1], "row 2 has the id [1];"),
        ("7", "row 2 has the id '7' of type string, but those before are of type int64"),
    ],
)
def test_an_id_that_is_none_is_named_before_anything_is_encoded(tmp_path, name, told):
    path = write(tmp_path / "a.jsonl", as_jsonl([1, 2, name, 4], "abcd"))
    with pytest.raises(TableError) as caught:
        survey(path, TWO)
    assert str(caught.value).startswith(f"{path}: {told}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "ids",
    [
        pyarrow.array([1, None, 3]),
        pyarrow.array([1.0, 2.0, 3.0]),
        pyarrow.array([b"\xff"] * 3),
        pyarrow.array([2**64 - 1] * 3, pyarrow.uint64()),
        pyarrow.array([1, 2, 3], pyarrow.timestamp("s")),
    ],
)
def test_parquet_ids_are_whole_numbers_or_texts(tmp_path, ids):
    path = write(tmp_path / "a.parquet", as_parquet(ids, list("abc")))
    with pytest.raises(TableError, match=r"a\.parquet: row \d has .*ids are 64-bit integers"):
        survey(path, TWO)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("columns", [Columns("title"), Columns("text", "key")])
def test_a_column_that_is_not_there_is_named(tmp_path, ending, columns):
    path = write(tmp_path / f"a.{ending}", FORMATS[ending](IDS, TEXTS))
    missing = columns.id or columns.text
    with pytest.raises(ValueError, match=rf"has no column '{missing}'; it has: id, text"):
        survey(path, columns)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.csv", b'text\n"open', "not closed"),
        ("a.csv", b"id,text\n1,a,b\n", "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{', "is not JSON"),
        ("a.txt", b"\xff", "is not UTF-8"),
        ("a.txt.gz", b"hello", "is not a readable gzip file"),
        ("a.txt.gz", gzip.compress(b"hello " * 99)[:-9], "is not a readable gzip file"),
        ("a.parquet", b"", "is not a readable parquet file"),
        ("a.parquet", b"PAR1", "is not a readable parquet file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, data, told):
    path = write(tmp_path / name, data)
    with pytest.raises(TableError, match=told) as caught:
        survey(path, Columns())
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_short_row_of_csv_has_no_text(tmp_path):
    files, _ = surveyed([write(tmp_path / "a.csv", "id,text\n1,a\n2\n3,c\n")], Columns("text"))
    assert rows_of(parts_of(files, 5, Columns("text"))) == [(0, "a"), (1, None), (2, "c")]


# empty files


EMPTY = {
    "a.txt": b"",
    "a.csv": b"",
    "b.csv": b"id,text\n",
    "a.jsonl": b"",
    "a.txt.gz": gzip.compress(b""),
    "a.parquet": as_parquet(
        pyarrow.array([], pyarrow.int64()), pyarrow.array([], pyarrow.string())
    ),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("key", [None, "id"])
def test_an_empty_file_among_others_is_left_aside(tmp_path, name, key):
    """Engines write empty parts; their type of ids, which nothing shows, is no obstacle."""
    columns = Columns() if ".txt" in name else Columns("text", key)
    empty = survey(write(tmp_path / name, EMPTY[name]), columns)
    assert (empty.rows, empty.id_type) == (0, None)
    full = TextFile("z", 3, "0", "string")
    assert with_rows([empty, full, empty]) == ([full], "string")


def test_nothing_but_empty_files_is_an_error(tmp_path):
    files = [survey(write(tmp_path / f"{i}.txt", ""), Columns()) for i in range(3)]
    with pytest.raises(TableError, match=r"0\.txt holds no texts, nor do 2 others$"):
        with_rows(files)
    with pytest.raises(TableError, match=r"0\.txt holds no texts$"):
        with_rows(files[:1])


def test_ids_of_two_types_are_refused():
    files = [TextFile("a", 1, "", "int64"), TextFile("b", 1, "", "string")]
    with pytest.raises(TableError, match="b has ids of type string, and a of type int64"):
        with_rows(files)


# parts


def text_files(sizes):
    return [TextFile(f"{i}.txt", rows, "0", "int64") for i, rows in enumerate(sizes)]


@settings(deadline=None, database=None)
@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 40))
def test_groups_hold_each_file_once_and_number_parts_without_gaps(sizes, part_rows):
    files = text_files(sizes)
    groups = group_files(files, part_rows)
    assert [file for group in groups for file in group.files] == files
    assert list(chain.from_iterable(group.shards(part_rows) for group in groups)) == list(
        range(sum(-(-group.rows // part_rows) for group in groups))
    )
    first = 0
    for group in groups:
        assert group.first_row == first
        first += group.rows
    assert all(group.rows >= part_rows for group in groups[:-1])
    assert all(group.rows - group.files[-1].rows < part_rows for group in groups)  # none too many
    assert group_files(files, part_rows) == groups


@settings(deadline=None, database=None, max_examples=60)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=9), st.integers(1, 9), st.data())
def test_every_row_is_in_one_part_in_order_whatever_is_done(sizes, part_rows, data):
    with tempfile.TemporaryDirectory() as name:
        texts = write_lines(Path(name), sizes)
        if not texts:
            return
        files, _ = surveyed(sorted(Path(name).iterdir()))
        whole = parts_of(files, part_rows)
        assert rows_of(whole) == list(enumerate(texts))
        assert [part.number for part in whole] == list(range(len(whole)))
        assert all(1 <= len(part.ids) <= part_rows for part in whole)
        done = data.draw(st.sets(st.sampled_from([-1, *range(len(whole))])))
        rest = parts_of(files, part_rows, done=sorted(done))
        assert rest == [part for part in whole if part.number not in done]


def test_ids_go_with_their_texts_over_files_of_several_kinds(tmp_path):
    paths = []
    for number, (ending, made) in enumerate(FORMATS.items()):
        data = made([f"{number}-{name}" for name in IDS], TEXTS)
        paths.append(write(tmp_path / f"{number}.{ending}", data))
    files, id_type = surveyed(paths, TWO)
    expected = [
        (f"{n}-{name}", text)
        for n in range(len(paths))
        for name, text in zip(IDS, TEXTS, strict=True)
    ]
    for part_rows in (1, 7, 10, 100):
        assert rows_of(parts_of(files, part_rows, TWO, id_type)) == expected


def lines_read(monkeypatch):
    """Count what is taken from files."""
    taken = []
    real = ray_texts.iter_column

    def counted(*arguments, **options):
        for value in real(*arguments, **options):
            taken.append(value)
            yield value

    monkeypatch.setattr(ray_texts, "iter_column", counted)
    return taken


def test_reading_ends_with_the_last_part_that_is_missing(tmp_path, monkeypatch):
    write_lines(tmp_path, [100])
    files, _ = surveyed([tmp_path / "000.txt"])
    taken = lines_read(monkeypatch)
    assert [part.number for part in parts_of(files, 10, done=[0, 2, 3, 4, 5, 6, 7, 8, 9])] == [1]
    assert len(taken) == 20
    taken.clear()
    assert parts_of(files, 10, done=range(10)) == []
    assert taken == []


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl"])
def test_an_object_store_is_asked_for_much_at_a_time(tmp_path, monkeypatch, ending):
    texts = [f"{number:0200}" for number in range(1000)]
    path = write(tmp_path / f"a.{ending}", FORMATS[ending](list(map(str, range(1000))), texts))
    asked = []

    class Store(io.BytesIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

        def readinto(self, buffer):
            asked.append(len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr(ray_texts, "READ_BYTES", 100_000)
    monkeypatch.setattr(ray_texts, "open_file", lambda name: Store(Path(name).read_bytes()))
    files, id_type = surveyed([path], TWO)
    assert [part.values for part in parts_of(files, 1000, TWO, id_type)] == [texts]
    assert set(asked) == {100_000}


def test_parts_are_read_as_they_are_asked_for(tmp_path, monkeypatch):
    write_lines(tmp_path, [1000])
    files, _ = surveyed([tmp_path / "000.txt"])
    taken = lines_read(monkeypatch)
    reading = read_shards(group_files(files, 10)[0], Columns(), 10, "int64", ())
    next(reading)
    assert len(taken) == 10
    reading.close()


# files that change while they are encoded


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("rows", [0, 2, 3, 5, 9])
@pytest.mark.parametrize("part_rows", [1, 3, 4, 12, 20])
def test_a_file_of_other_rows_stops_before_a_part_is_wrong(tmp_path, which, rows, part_rows):
    """A part of the wrong rows, once written, would be taken for done by the next run."""
    write_lines(tmp_path, [4, 4, 4])
    files, _ = surveyed(sorted(tmp_path.iterdir()))
    expected = parts_of(files, part_rows)
    own = [f"text {4 * which + i}\n" for i in range(9)]
    path = write(tmp_path / f"{which:03}.txt", "".join(own[:rows]))
    right = []
    reads = (
        read_shards(group, Columns(), part_rows, "int64", ())
        for group in group_files(files, part_rows)
    )
    with pytest.raises(TableError) as caught:
        right.extend(chain.from_iterable(reads))  # which keeps what came before the error
    assert str(caught.value).startswith(f"{path} has changed while it was encoded: it had 4 rows;")
    assert right == expected[: len(right)]


@pytest.mark.parametrize(
    ("before", "after"), [([1, 2], ["1", "2"]), (["1", "2"], [1, 2]), ([1, 2], [1, None])]
)
def test_ids_that_become_others_are_refused(tmp_path, before, after):
    path = write(tmp_path / "a.jsonl", as_jsonl(before, "ab"))
    files, id_type = surveyed([path], TWO)
    write(tmp_path / "a.jsonl", as_jsonl(after, "ab"))
    with pytest.raises(TableError, match="has changed"):
        parts_of(files, 5, TWO, id_type)


def test_a_file_that_is_gone_is_named(tmp_path):
    write_lines(tmp_path, [4])
    files, _ = surveyed([tmp_path / "000.txt"])
    (tmp_path / "000.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*000\.txt"):
        parts_of(files, 2)


def test_the_message_is_short_however_many_files_there_are(tmp_path):
    write_lines(tmp_path, [1] * 50)
    files, _ = surveyed(sorted(tmp_path.iterdir()))
    write(tmp_path / "049.txt", "")
    with pytest.raises(TableError) as caught:
        parts_of(files, 50)
    assert str(caught.value).count(".txt") == 1


# where Ray is not installed


def test_neither_the_package_nor_its_command_line_imports_ray():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import onnxsim_embed, onnxsim_embed.cli, onnxsim_embed.ray, onnxsim_embed.ray.texts\n"
        "assert not [name for name in sys.modules if name.startswith(('ray.', 'pyarrow', 'pandas'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["encode", "similarity"])
def test_without_ray_the_extra_is_named(tmp_path, monkeypatch, capsys, command):
    path = write(tmp_path / "a.csv", "text\na\n")
    line = ["onnxsim-embed", command, path, "--engine", "ray", "-o", str(tmp_path / "v")]
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert told.endswith("pip install 'onnxsim-embed[ray]'\n")
    assert told.count("\n") == 1
