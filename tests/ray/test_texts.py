"""Files -> shards: every row once, in order, with numbers that never change. Needs no Ray."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.ray import texts as ray_texts
from onnxsim_embed.ray.texts import (
    Columns,
    group_files,
    read_shards,
    survey,
    with_rows,
)

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


def as_parquet(ids, texts):
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": ids, "text": texts}), stream, row_group_size=3)
    return stream.getvalue()


FORMATS = {
    "csv": as_csv,
    "tsv": lambda ids, texts: as_csv(ids, texts, "\t", "\ufeff"),
    "csv.gz": lambda ids, texts: gzip.compress(as_csv(ids, texts), mtime=0),
    "jsonl": as_jsonl,
    "parquet": as_parquet,
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_lines(directory, sizes):
    """Write a file of lines for each size; return all lines."""
    texts = [f"text {number}" for number in range(sum(sizes))]
    first = 0
    for index, size in enumerate(sizes):
        write(directory / f"{index:03}.txt", "".join(f"{t}\n" for t in texts[first : first + size]))
        first += size
    return texts


def surveyed(locations, columns=Columns()):  # noqa: B008 - it is frozen
    return with_rows([survey(str(location), columns) for location in locations])


def read_all(files, shard_rows, columns=Columns(), finished=()):  # noqa: B008
    for group in group_files(files, shard_rows):
        yield from read_shards(group, columns, shard_rows, finished)


def shards_of(*arguments, **options):
    return list(read_all(*arguments, **options))


def rows_of(shards):
    return [pair for shard in shards for pair in zip(shard.ids, shard.texts, strict=True)]


# survey


@pytest.mark.parametrize("ending", FORMATS)
def test_cells_stay_the_texts_that_they_are(tmp_path, ending):
    path = write(tmp_path / f"a b [1].{ending}", FORMATS[ending](IDS, TEXTS))
    files, id_type = surveyed([path], TWO)
    assert (files[0].location, files[0].rows, id_type) == (path, len(TEXTS), "string")
    assert rows_of(shards_of(files, 3, TWO)) == list(zip(IDS, TEXTS, strict=True))
    numbered, id_type = surveyed([path])  # without a column of ids, rows have numbers
    assert id_type == "int64"
    assert rows_of(shards_of(numbered, 4)) == list(enumerate(TEXTS))
    by_uri = survey(f"file://{tmp_path}/a%20b%20[1].{ending}?x=1", TWO)
    assert (by_uri.rows, by_uri.digest, by_uri.id_type) == (len(TEXTS), files[0].digest, "string")
    assert rows_of(shards_of([by_uri], 4, TWO)) == list(zip(IDS, TEXTS, strict=True))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_ids_may_be_numbers(tmp_path, ending):
    numbers = [-(2**63), 2**63 - 1, 0, 5]
    path = write(tmp_path / f"a.{ending}", FORMATS[ending](numbers, TEXTS[:4]))
    files, id_type = surveyed([path], TWO)
    assert id_type == "int64"
    assert [s.ids for s in shards_of(files, 3, TWO)] == [numbers[:3], numbers[3:]]


@pytest.mark.parametrize("ending", FORMATS)
def test_the_digest_tells_contents_apart(tmp_path, ending):
    """For parquet also a change that keeps the size, and the smallest and largest text."""
    contents = [(IDS, TEXTS), (IDS, ["a toad", *TEXTS[1:]]), (IDS[::-1], TEXTS), (IDS, TEXTS[::-1])]
    digests = [
        survey(write(tmp_path / f"{i}.{ending}", FORMATS[ending](*content)), TWO).digest
        for i, content in enumerate([*contents, contents[0]])
    ]
    assert len(set(digests)) == len(contents)
    assert digests[-1] == digests[0]


def test_rows_without_a_text_are_handed_on_with_the_reason(tmp_path):
    values = [None, 5, ["a"], "\ud800", "good", ""]
    path = write(tmp_path / "part-0000", as_jsonl(range(6), values))
    columns = Columns("text", "id", "jsonl")
    files, _ = surveyed([path], columns)
    shards = shards_of(files, 4, columns)
    assert rows_of(shards) == [*((row, "") for row in range(4)), (4, "good"), (5, "")]
    reasons = [f"has no text ({held})" for held in ("null", "5", "['a']")]
    reasons.append("has no valid Unicode text ('\\ud800')")
    assert [shard.problems for shard in shards] == [dict(enumerate(reasons)), {}]
    assert files[0].report.empty == [5]
    with pytest.raises(TableError) as one_process:
        list(iter_texts(path, "text", kind="jsonl"))
    with pytest.raises(TableError) as caught:
        survey(path, replace(columns, on_error="fail"))
    assert str(caught.value) == str(one_process.value)


def test_a_malformed_row_is_skipped_with_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"id": 1, "text": "a"}\n{"id"\n{"id": 3, "text": "c"}\n')
    files, _ = surveyed([path], TWO)
    [shard] = shards_of(files, 9, TWO)
    assert shard.ids == [1, f"{path}: row 1", 3]
    assert shard.problems[1].startswith("is not JSON")
    with pytest.raises(TableError, match="row 1 has no id"):
        survey(path, replace(TWO, on_error="blank"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [(None, "None"), (1.5, "1.5"), (True, "True"), (2**63, "9223372036854775808"), ("\ud800", r"'\ud800'"),
     ([1], "[1]"), ("7", "of type int64"), ("", "''")],
)  # fmt: skip
def test_an_invalid_id_is_named_before_anything_is_encoded(tmp_path, name, reason):
    path = write(tmp_path / "a.jsonl", as_jsonl([1, 2, name, 4], "abcd"))
    with pytest.raises(TableError) as caught:
        survey(path, TWO)
    assert "row 2 has " in str(caught.value)
    assert str(caught.value).startswith(path)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_missing_column_and_a_damaged_file_are_named(tmp_path):
    path = write(tmp_path / "a.csv", as_csv(IDS, TEXTS))
    for columns in (Columns("title"), Columns("text", "key")):
        with pytest.raises(ValueError, match=r"it has: id, text"):
            survey(path, columns)
    for name in ("a.txt.gz", "a.parquet"):
        with pytest.raises(TableError, match=name):
            survey(write(tmp_path / name, b"hello"), Columns())


# empty files


EMPTY = {
    "a.txt": b"",
    "a.csv": b"",
    "b.csv": b"id,text\n",
    "a.jsonl": b"",
    "a.txt.gz": gzip.compress(b"", mtime=0),
    "a.parquet": as_parquet(
        pyarrow.array([], pyarrow.int64()), pyarrow.array([], pyarrow.string())
    ),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("key", [None, "id"])
def test_an_empty_file_among_others_is_skipped(tmp_path, name, key):
    """Engines write empty files; their type of ids, which nothing shows, is no obstacle."""
    columns = Columns() if ".txt" in name else Columns("text", key)
    empty = survey(write(tmp_path / name, EMPTY[name]), columns)
    assert (empty.rows, empty.id_type) == (0, None)
    full, other = replace(empty, rows=3, id_type="string"), replace(empty, rows=1, id_type="int64")
    assert with_rows([empty, full, empty]) == ([full], "string")
    with pytest.raises(TableError, match="no texts"):
        with_rows([empty, empty])
    with pytest.raises(TableError, match=f"{name} has ids of type int64"):
        with_rows([full, other])


# shards


@settings(deadline=None, database=None, max_examples=60)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=9), st.integers(1, 9), st.data())
def test_every_row_is_in_one_shard_in_order_whatever_is_finished(sizes, shard_rows, data):
    with tempfile.TemporaryDirectory() as name:
        texts = write_lines(Path(name), sizes)
        if not texts:
            return
        files, _ = surveyed(sorted(Path(name).iterdir()))
        groups = group_files(files, shard_rows)
        assert [file for group in groups for file in group.files] == files
        assert all(group.rows >= shard_rows for group in groups[:-1])
        assert all(group.rows - group.files[-1].rows < shard_rows for group in groups)
        shards = shards_of(files, shard_rows)
        assert rows_of(shards) == list(enumerate(texts))
        assert [shard.number for shard in shards] == list(range(len(shards)))
        assert all(1 <= len(shard.ids) <= shard_rows for shard in shards)
        finished = data.draw(st.sets(st.sampled_from(range(len(shards)))))
        rest = shards_of(files, shard_rows, finished=sorted(finished))
        assert rest == [shard for shard in shards if shard.number not in finished]


def test_reading_is_lazy_and_ends_with_the_last_missing_shard(tmp_path, monkeypatch):
    taken, read = [], ray_texts.iter_rows

    def counted(*arguments, **options):
        for value in read(*arguments, **options):
            taken.append(value)
            yield value

    write_lines(tmp_path, [100])
    files, _ = surveyed([tmp_path / "000.txt"])
    monkeypatch.setattr(ray_texts, "iter_rows", counted)
    finished = [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [shard.number for shard in shards_of(files, 10, finished=finished)] == [1]
    assert len(taken) == 20
    assert shards_of(files, 10, finished=range(10)) == []
    assert len(taken) == 20
    reading = read_all(files, 10)
    next(reading)
    assert len(taken) == 30
    reading.close()


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
    files, _ = surveyed([path], TWO)
    assert [shard.texts for shard in shards_of(files, 1000, TWO)] == [texts]
    assert set(asked) == {100_000}


# files that change while they are encoded


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("rows", [0, 3, 5])
@pytest.mark.parametrize("shard_rows", [1, 3, 12, 20])
def test_a_file_with_other_rows_stops_before_a_shard_is_wrong(tmp_path, which, rows, shard_rows):
    """The next run would take a shard of wrong rows for finished."""
    write_lines(tmp_path, [4, 4, 4])
    files, _ = surveyed(sorted(tmp_path.iterdir()))
    expected = shards_of(files, shard_rows)
    lines = [f"text {4 * which + i}\n" for i in range(9)]
    path = write(tmp_path / f"{which:03}.txt", "".join(lines[:rows]))
    shards = []
    with pytest.raises(TableError, match="changed") as caught:
        shards.extend(read_all(files, shard_rows))  # keeps what came before the error
    assert str(caught.value).startswith(path)
    assert shards == expected[: len(shards)]


def test_a_file_that_was_written_since_the_survey_is_not_read(tmp_path):
    """Although it has as many rows."""
    write_lines(tmp_path, [4])
    files, _ = surveyed(tmp_path.iterdir())
    time.sleep(0.01)
    write(tmp_path / "000.txt", "other text\n" * 4)
    with pytest.raises(TableError, match="changed"):
        shards_of(files, 2)


# where Ray is not installed


@pytest.mark.parametrize("command", ["encode", "similarity"])
def test_without_ray_the_extra_is_named(tmp_path, monkeypatch, reject, command):
    path = write(tmp_path / "a.csv", "text\na\n")
    monkeypatch.setitem(sys.modules, "ray", None)
    message = reject(command, path, "--engine", "ray", "-o", tmp_path / "v", code=1)
    assert "pip install" in message
    assert "[ray]" in message
