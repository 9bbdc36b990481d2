"""Vectors in a directory of shards: read as they were written, and rejected where they were changed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support import change_json, provenance, read_json, write_shards

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.provenance import METADATA_KEY, parse_provenance
from onnxsim_embed.files.vector_directory import (
    INDEX,
    JOB,
    REJECTED,
    RowDiagnostic,
    is_vector_directory,
    open_vectors,
    pack_shard,
    read_shard,
    shard_file,
)

SIZES = (4, 0, 1, 5)
SKIPPED = RowDiagnostic(17, "no text (null)", encoded=False)
LONG = RowDiagnostic(18, "a text of 10,000,000 characters", encoded=True)


def random(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)


def store(directory, sizes=SIZES, **options):
    return write_shards(directory, random(sum(sizes)), sizes, **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return store(tmp_path_factory.mktemp("store") / "vectors")


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_vectors_are_read_as_they_were_written(tmp_path, form):
    written = store(tmp_path / "v")
    stored = open_vectors(form.format(tmp_path / "v"))
    np.testing.assert_array_equal(stored.read(), random(10), strict=True)
    assert stored.ids() == list(range(10))
    assert (stored.rows, stored.dim, stored.provenance) == (10, 4, provenance())
    assert stored.digest == written.digest
    earlier = (stored.storage, stored.parts, stored.origin)
    assert earlier == (stored.directory, stored.shards, stored.provenance)


@settings(deadline=None, database=None, max_examples=40)
@given(st.data())
def test_any_range_of_rows(shared, data):
    start, stop = (data.draw(st.integers(-1, shared.rows + 1)) for _ in range(2))
    if 0 <= start <= stop <= shared.rows:
        np.testing.assert_array_equal(shared.read(start, stop), random(10)[start:stop], strict=True)
    else:
        with pytest.raises(ValueError, match=f"rows {start} to {stop} of 10"):
            shared.read(start, stop)


def test_only_the_shards_and_columns_in_question_are_read(shared, monkeypatch):
    opened, columns = [], []
    real_open, real_read = Directory.open, parquet.ParquetFile.read
    monkeypatch.setattr(Directory, "open", lambda self, n: opened.append(n) or real_open(self, n))
    read = lambda self, names, **more: columns.append(names) or real_read(self, names, **more)  # noqa: E731
    monkeypatch.setattr(parquet.ParquetFile, "read", read)
    for rows, numbers in (((4, 5), [2]), ((3, 6), [0, 2, 3]), ((4, 4), [])):
        opened.clear()
        shared.read(*rows)
        assert opened == [shard_file(number) for number in numbers]
    shared.ids()
    assert columns == [["vector"]] * 4 + [["id"]] * 3


@pytest.mark.parametrize(
    ("sizes", "ids"), [((), []), ((0, 0), []), ((1, 3), ["007", "7", "", "naïve 漢字"])]
)
def test_ids_may_be_texts_and_there_may_be_no_vectors(tmp_path, sizes, ids):
    store(tmp_path / "v", sizes, ids=ids, id_type="string")
    vectors = open_vectors(tmp_path / "v").read()
    assert (vectors.shape, vectors.dtype) == ((len(ids), 4), np.float32)
    assert open_vectors(tmp_path / "v").ids() == ids


def test_other_programs_read_the_shards(tmp_path):
    stored = store(tmp_path / "v")
    table = parquet.read_table([str(tmp_path / "v" / shard.file) for shard in stored.shards])
    assert table.schema.field("id").type == pyarrow.int64()
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), 4)
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), random(10))
    metadata = parquet.read_schema(tmp_path / "v" / shard_file(0)).metadata
    assert parse_provenance(json.loads(metadata[METADATA_KEY])) == provenance()
    assert [shard_file(n) for n in (0, 100_000)] == ["part-00000.parquet", "part-100000.parquet"]


def test_equal_vectors_of_any_layout_make_equal_bytes():
    wide = np.asfortranarray(random(4))[::2]
    first = pack_shard([1, 2], wide, [LONG], provenance(), "int64")
    assert first == pack_shard([1, 2], wide.copy(order="C"), [LONG], provenance(), "int64")
    assert first[1] == hashlib.sha256(wide.tobytes()).hexdigest()[:16]
    assert first[1] != pack_shard([1, 2], random(2, 1), [LONG], provenance(), "int64")[1]


def test_the_digest_depends_on_all_shards(shared):
    first, *others = shared.shards
    different = [
        replace(shared, shards=(replace(first, digest="f" * 16), *others)),
        replace(shared, shards=(*others, first)),
        replace(shared, dim=5),
    ]
    assert len({shared.digest, *(each.digest for each in different)}) == 4


def test_diagnostics_are_kept_in_shards_and_in_one_file(tmp_path, shared):
    odd = RowDiagnostic("naïve \u2028 漢字", 'no text but {"a": 1}', encoded=False)
    store(tmp_path / "v", (1, 0, 2), diagnostics=[(0, LONG), (1, SKIPPED), (2, odd)])
    lines = (tmp_path / "v" / REJECTED).read_text().split("\n")[:-1]
    assert [RowDiagnostic(**json.loads(line)) for line in lines] == [LONG, SKIPPED, odd]
    assert json.loads((tmp_path / "v" / INDEX).read_text())["without_vector"] == 2
    shard = read_shard(Directory(tmp_path / "v"), 1)
    assert (shard.rows, shard.diagnostics) == (0, (SKIPPED,))
    assert REJECTED not in shared.directory.names()
    assert [read_shard(shared.directory, number) for number in range(4)] == list(shared.shards)


# Damage


def flip(data):
    """Change a bit of the vectors themselves."""
    at = data.index(random(4)[1].tobytes())
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {"cut": lambda data: data[: len(data) // 2], "text": lambda _: b"hello " * 99, "bit": flip}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_missing_shard_is_named(tmp_path, damage):
    stored = store(tmp_path / "v")
    path = tmp_path / "v" / shard_file(0)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(TableError, match=r"part-00000\.parquet"):
        stored.read()
    np.testing.assert_array_equal(stored.read(4, 10), random(10)[4:])
    if damage != "bit":  # which leaves the metadata alone
        assert read_shard(stored.directory, 0) is None
    path.unlink()
    for use in (stored.read, stored.ids):
        with pytest.raises(TableError, match=r"lacks part-00000\.parquet"):
            use()
    assert read_shard(stored.directory, 0) is None


@pytest.mark.parametrize("vectors", [random(4, seed=9), random(3)])
def test_another_shard_is_rejected(tmp_path, vectors):
    stored = store(tmp_path / "v")
    data, _ = pack_shard(list(range(len(vectors))), vectors, [], provenance(), "int64")
    (tmp_path / "v" / shard_file(0)).write_bytes(data)
    for use in (stored.read, stored.ids):
        with pytest.raises(TableError, match=r"part-00000\.parquet does not match"):
            use()


@pytest.mark.parametrize(
    "metadata",
    [b"{}", b"[]", b"{", b'{"rows": 4, "digest": "", "remarks": [{}]}', b'{"rows": "4"}',
     b'{"rows": 5, "digest": "", "remarks": []}', None]
)  # fmt: skip
def test_invalid_metadata_of_a_shard(tmp_path, metadata):
    stored = store(tmp_path / "v")
    path = tmp_path / "v" / shard_file(0)
    metadata = {} if metadata is None else {b"onnxsim_embed_part": metadata}
    parquet.write_table(parquet.read_table(path).replace_schema_metadata(metadata), path)
    assert read_shard(stored.directory, 0) is None
    with pytest.raises(TableError, match=r"part-00000\.parquet"):
        stored.read()


def change_first_shard(index, *entry):
    change_json(index, parts=[entry, *read_json(index)["parts"][1:]])


@pytest.mark.parametrize(
    "change",
    [{"format_version": 2}, {"dim": 0}, {"dim": True}, {"parts": {"a": 1}}, {"made_by": [1]}, None,
     ["../part-00000.parquet", 4, "x"], ["part-00001.parquet", 4, "x"], ["part-00000.parquet", 4],
     ["part-00000.parquet", -4, "x"], ["part-00000.parquet", True, "x"], ["part-00000.parquet", 4, 5],
     b"", b"\xff", b"[" * 100_000, b"null", b"[1]"],
)  # fmt: skip
def test_a_changed_index_is_rejected(tmp_path, change):
    """Fields that change; no version; an entry of the first shard; other content."""
    store(tmp_path / "v")
    if isinstance(change, bytes):
        (tmp_path / "v" / INDEX).write_bytes(change)
    elif isinstance(change, list):
        change_first_shard(tmp_path / "v" / INDEX, *change)
    else:
        change_json(tmp_path / "v" / INDEX, **(change or {"format_version": None}))
    with pytest.raises(TableError, match=r"index\.json is damaged or of another version"):
        open_vectors(tmp_path / "v")


def test_rows_and_dim_of_the_index_must_be_those_of_the_shards(tmp_path):
    stored = store(tmp_path / "v")
    change_first_shard(tmp_path / "v" / INDEX, shard_file(0), 5, stored.shards[0].digest)
    opened = open_vectors(tmp_path / "v")
    for use in (opened.read, opened.ids):
        with pytest.raises(TableError, match=r"part-00000\.parquet does not match"):
            use()
    change_json(tmp_path / "v" / INDEX, dim=5)
    with pytest.raises(TableError, match=r"part-00002\.parquet does not match"):
        open_vectors(tmp_path / "v").read(5, 6)


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_other_directories_are_rejected(tmp_path, form):
    store(tmp_path / "v")
    (tmp_path / "v" / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        open_vectors(form.format(tmp_path / "v"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.npy").touch()
    for name in ("nowhere", "empty", "file.npy"):
        with pytest.raises(FileNotFoundError, match=rf"{name} is not a directory of vectors"):
            open_vectors(form.format(tmp_path / name))


def test_info_reads_the_index_only(tmp_path, run):
    store(tmp_path / "v", ())
    change_json(tmp_path / "v" / INDEX, parts=[[shard_file(0), 10, "x"]])
    code, out, _ = run("info", f"file://{tmp_path}/v")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()[1:3]] == ["10", "4"]


def test_a_directory_of_vectors_is_told_from_others(tmp_path):
    store(tmp_path / "v")
    assert is_vector_directory(tmp_path / "v")
    (tmp_path / "v" / INDEX).unlink()
    assert is_vector_directory(str(tmp_path / "v"))  # of an unfinished run
    (tmp_path / "graph").mkdir()
    for name in (INDEX, JOB, "part-00000.npz"):
        (tmp_path / "graph" / name).touch()
    for name in ("graph", "", "nowhere"):
        assert not is_vector_directory(tmp_path / name)
