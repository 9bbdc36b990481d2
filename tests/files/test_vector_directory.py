"""Vectors in a directory of parts: read as they were written, and refused where they were tampered with."""

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
from scipy import sparse

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.provenance import METADATA_KEY, Provenance, parse_provenance
from onnxsim_embed.files.vector_directory import (
    INDEX,
    JOB,
    REJECTED,
    RowDiagnostic,
    VectorDirectory,
    VectorShard,
    is_vector_directory,
    open_vectors,
    pack_shard,
    read_shard,
    shard_file,
)

DIM = 3
ORIGIN = Provenance(
    model="tiny", model_digest="0" * 16, weights_digest="1" * 16, precision="fp32",
    pooling="mean", normalize=True, prompt=None, max_seq_length=16, dim=DIM, truncate_dim=None,
    dtype="float32", ranges=None, provider="CPUExecutionProvider", onnxsim_embed="0", onnxruntime="0",
)  # fmt: skip
SIZES = (4, 0, 1, 5)
LEFT_OUT = RowDiagnostic(17, "no text (null)", encoded=False)
LONG = RowDiagnostic(18, "a text of 10,000,000 characters", encoded=True)


def vectors_of(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)


def store(directory, sizes=SIZES, ids=None, id_type="int64", remarks=()):
    """A whole directory, of parts of so many rows."""
    storage, vectors, first = Directory(directory), vectors_of(sum(sizes)), 0
    ids = list(range(len(vectors))) if ids is None else ids
    parts = []
    for number, rows in enumerate(sizes):
        own = slice(first, first + rows)
        told = [remark for part, remark in remarks if part == number]
        data, digest = pack_shard(ids[own], vectors[own], told, ORIGIN, id_type)
        storage.write(shard_file(number), data)
        parts.append(VectorShard(shard_file(number), rows, digest, tuple(told)))
        first += rows
    storage.write(JOB, b"{}")
    whole = VectorDirectory(storage, DIM, tuple(parts), ORIGIN)
    whole.write_index()
    return whole


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return store(tmp_path_factory.mktemp("store") / "vectors")


def rewrite(path, change):
    """Change what the index says."""
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


# what is read


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_vectors_are_read_as_they_were_written(tmp_path, form):
    written = store(tmp_path / "v")
    found = open_vectors(form.format(tmp_path / "v"))
    np.testing.assert_array_equal(found.read(), vectors_of(10), strict=True)
    assert found.ids() == list(range(10))
    assert (found.rows, found.dim, found.provenance) == (10, DIM, ORIGIN)
    assert found.digest == written.digest


@settings(deadline=None, database=None, max_examples=60)
@given(st.data())
def test_any_rows_are_those_of_the_whole(shared, data):
    start = data.draw(st.integers(0, shared.rows))
    stop = data.draw(st.integers(start, shared.rows))
    np.testing.assert_array_equal(shared.read(start, stop), vectors_of(10)[start:stop], strict=True)


@pytest.mark.parametrize("rows", [(-1, 3), (0, 11), (5, 4), (11, 11)])
def test_rows_that_there_are_not_are_refused(shared, rows):
    with pytest.raises(ValueError, match=f"rows {rows[0]} to {rows[1]} of 10 vectors"):
        shared.read(*rows)


@pytest.mark.parametrize(
    ("rows", "read"),
    [((4, 5), [2]), ((0, 4), [0]), ((3, 6), [0, 2, 3]), ((4, 4), []), ((6, 7), [3])],
)
def test_only_the_parts_that_hold_the_rows_are_read(shared, monkeypatch, rows, read):
    asked = []
    real = Directory.open
    monkeypatch.setattr(
        Directory, "open", lambda self, name: asked.append(name) or real(self, name)
    )
    shared.read(*rows)
    assert asked == [shard_file(number) for number in read]


def test_ids_are_read_without_the_vectors_and_the_other_way_round(shared, monkeypatch):
    asked = []
    real = parquet.ParquetFile.read
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read",
        lambda self, names, **k: asked.append(names) or real(self, names, **k),
    )
    shared.ids()
    assert asked == [["id"]] * 3
    asked.clear()
    shared.read()
    assert asked == [["vector"]] * 3


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
def test_a_directory_may_hold_no_vectors(tmp_path, sizes):
    store(tmp_path / "v", sizes)
    found = open_vectors(tmp_path / "v")
    assert found.read().shape == (0, DIM)
    assert found.read().dtype == np.float32
    assert found.ids() == []


def test_ids_may_be_texts(tmp_path):
    ids = ["007", "7", "", "naïve 漢字"]
    store(tmp_path / "v", (1, 3), ids, "string")
    assert open_vectors(tmp_path / "v").ids() == ids


def test_other_programs_read_the_parts(tmp_path):
    whole = store(tmp_path / "v")
    table = parquet.read_table([str(tmp_path / "v" / part.file) for part in whole.shards])
    assert table.schema.names == ["id", "vector"]
    assert table.schema.field("id").type == pyarrow.int64()
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), DIM)
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors_of(10))
    assert table["id"].to_pylist() == list(range(10))
    described = json.loads(
        parquet.read_schema(tmp_path / "v" / shard_file(0)).metadata[METADATA_KEY]
    )
    assert parse_provenance(described) == ORIGIN


def test_parts_are_numbered_beyond_five_digits():
    assert [shard_file(number) for number in (0, 99_999, 100_000)] == [
        "part-00000.parquet", "part-99999.parquet", "part-100000.parquet",
    ]  # fmt: skip


def test_equal_vectors_make_equal_bytes():
    first, again = (pack_shard([1, 2], vectors_of(2), [LONG], ORIGIN, "int64") for _ in range(2))
    assert first == again
    assert first[1] != pack_shard([1, 2], vectors_of(2, seed=1), [LONG], ORIGIN, "int64")[1]


def test_vectors_of_any_layout_are_packed(tmp_path):
    wide = np.asfortranarray(vectors_of(4))[::2]
    data, digest = pack_shard([0, 1], wide, [], ORIGIN, "int64")
    assert (data, digest) == pack_shard([0, 1], wide.copy(order="C"), [], ORIGIN, "int64")
    assert digest == hashlib.sha256(wide.tobytes()).hexdigest()[:16]


def test_the_digest_tells_vectors_apart(shared):
    one, *others = shared.shards
    changed = replace(one, digest="f" * 16)
    different = [
        replace(shared, shards=(changed, *others)),
        replace(shared, shards=(*others, one)),
        replace(shared, dim=DIM + 1),
    ]
    assert len({shared.digest, *(each.digest for each in different)}) == 4


# rows that have something to be said of them


def test_remarks_are_kept_in_parts_and_in_one_file(tmp_path):
    odd = RowDiagnostic("naïve \u2028 漢字", 'no text but {"a": 1}', encoded=False)
    store(tmp_path / "v", (1, 0, 2), remarks=[(0, LONG), (1, LEFT_OUT), (2, odd)])
    lines = (tmp_path / "v" / REJECTED).read_text().split("\n")
    assert lines.pop() == ""
    assert [RowDiagnostic(**json.loads(line)) for line in lines] == [LONG, LEFT_OUT, odd]
    assert json.loads((tmp_path / "v" / INDEX).read_text())["without_vector"] == 2
    part = read_shard(Directory(tmp_path / "v"), 1)
    assert (part.rows, part.diagnostics) == (0, (LEFT_OUT,))


def test_without_remarks_there_is_no_file_of_them(shared):
    assert REJECTED not in shared.directory.names()


def test_a_part_says_of_itself_what_the_index_says(shared):
    assert [read_shard(shared.directory, number) for number in range(4)] == list(shared.shards)


# what is refused


def half(data):
    return data[: len(data) // 2]


def flipped(data):
    """A bit of the vectors themselves."""
    place = data.index(vectors_of(4)[1].tobytes())
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "cut": half,
    "empty": lambda data: b"",
    "text": lambda data: b"hello " * 100,
    "flipped": flipped,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_named(tmp_path, damage):
    whole = store(tmp_path / "v")
    path = tmp_path / "v" / shard_file(0)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(TableError, match=r"part-00000\.parquet is damaged: "):
        whole.read()
    np.testing.assert_array_equal(whole.read(4, 10), vectors_of(10)[4:])
    if damage != "flipped":  # of which the end is whole
        assert read_shard(whole.directory, 0) is None


def test_a_missing_part_is_named(tmp_path):
    whole = store(tmp_path / "v")
    (tmp_path / "v" / shard_file(3)).unlink()
    for use in (whole.read, whole.ids):
        with pytest.raises(TableError, match=r"lacks part-00003\.parquet; encode again"):
            use()
    assert read_shard(whole.directory, 3) is None


def other_table(**columns):
    return lambda: pyarrow.table({"id": list(range(4)), **columns})


OTHERS = {
    "of as many rows": lambda: pack_shard(list(range(4)), vectors_of(4, 9), [], ORIGIN, "int64")[0],
    "of fewer rows": lambda: pack_shard(list(range(3)), vectors_of(3), [], ORIGIN, "int64")[0],
    "wider": lambda: pack_shard(list(range(4)), np.ones((4, 5), np.float32), [], ORIGIN, "int64")[
        0
    ],
    "of texts": other_table(vector=list("abcd")),
    "of lists": other_table(vector=vectors_of(4).tolist()),
    "without vectors": other_table(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_part_of_another_set_is_refused(tmp_path, other):
    whole = store(tmp_path / "v")
    data = OTHERS[other]()
    path = tmp_path / "v" / shard_file(0)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        parquet.write_table(data, path)
        assert read_shard(whole.directory, 0) is None
    for use in (whole.read, whole.ids):
        with pytest.raises(TableError, match=r"part-00000\.parquet (does not match|is damaged)"):
            use()


@pytest.mark.parametrize("told", [b"{}", b"[]", b"1", b"{", b'{"rows": 4, "digest": "", "remarks": [{}]}',
                                  b'{"rows": 5, "digest": "", "remarks": []}', b'{"rows": "4"}', None])  # fmt: skip
def test_a_part_that_says_nothing_of_itself_is_encoded_again(tmp_path, told):
    whole = store(tmp_path / "v")
    path = tmp_path / "v" / shard_file(0)
    table = parquet.read_table(path)
    metadata = {} if told is None else {b"onnxsim_embed_part": told}
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    assert read_shard(whole.directory, 0) is None
    with pytest.raises(TableError, match=r"part-00000\.parquet (is|does)"):
        whole.read()


def part_entry(number, entry):
    def change(table):
        table["parts"][number] = entry

    return change


CHANGES = {
    "another version": lambda t: t.update(format_version=2),
    "no version": lambda t: t.pop("format_version"),
    "no dim": lambda t: t.pop("dim"),
    "dim of none": lambda t: t.update(dim=0),
    "dim as text": lambda t: t.update(dim="3"),
    "dim as truth": lambda t: t.update(dim=True),
    "no parts": lambda t: t.pop("parts"),
    "parts of another kind": lambda t: t.update(parts={"a": 1}),
    "a path": part_entry(0, ["../part-00000.parquet", 4, "x"]),
    "an absolute path": part_entry(0, ["/etc/passwd", 4, "x"]),
    "another part's name": part_entry(0, ["part-00001.parquet", 4, "x"]),
    "negative rows": part_entry(0, ["part-00000.parquet", -4, "x"]),
    "rows as text": part_entry(0, ["part-00000.parquet", "4", "x"]),
    "rows as truth": part_entry(0, ["part-00000.parquet", True, "x"]),
    "digest as number": part_entry(0, ["part-00000.parquet", 4, 5]),
    "too little": part_entry(0, ["part-00000.parquet", 4]),
    "a part as text": part_entry(0, "part"),
    "no origin": lambda t: t.pop("made_by"),
    "origin of another kind": lambda t: t.update(made_by=[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_was_tampered_with_is_refused(tmp_path, change):
    store(tmp_path / "v")
    rewrite(tmp_path / "v" / INDEX, CHANGES[change])
    with pytest.raises(
        TableError, match=r"index\.json is damaged, or of another version"
    ) as caught:
        open_vectors(tmp_path / "v")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b"null", b"5", b"[1]"])
def test_an_index_that_is_no_json_is_refused(tmp_path, data):
    store(tmp_path / "v")
    (tmp_path / "v" / INDEX).write_bytes(data)
    with pytest.raises(TableError, match=r"index\.json is damaged"):
        open_vectors(tmp_path / "v")


def test_more_rows_than_a_part_has_are_refused(tmp_path):
    whole = store(tmp_path / "v")
    entry = [shard_file(0), 5, whole.shards[0].digest]
    rewrite(tmp_path / "v" / INDEX, part_entry(0, entry))
    found = open_vectors(tmp_path / "v")
    for use in (found.read, found.ids):
        with pytest.raises(TableError, match=r"part-00000\.parquet does not match index\.json"):
            use()
    rewrite(tmp_path / "v" / INDEX, lambda t: t.update(dim=DIM + 1))
    with pytest.raises(TableError, match=r"part-00002\.parquet does not match"):
        open_vectors(tmp_path / "v").read(5, 6)


def test_vectors_of_an_unfinished_job_say_what_to_do(tmp_path):
    store(tmp_path / "v")
    (tmp_path / "v" / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        open_vectors(tmp_path / "v")


@pytest.mark.parametrize("form", ["{}", "file://{}"])
@pytest.mark.parametrize("what", ["nowhere", "empty", "file.npy"])
def test_what_is_no_directory_of_vectors_says_so(tmp_path, what, form):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.npy").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=rf"{what} is not a directory of vectors"):
        open_vectors(form.format(tmp_path / what))


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_commands_read_a_directory_of_vectors(tmp_path, run, form):
    store(tmp_path / "v")
    where = form.format(tmp_path / "v")
    code, out, _ = run("info", where)
    assert code == 0
    assert out.splitlines()[0].split() == ["vectors", where]
    assert out.splitlines()[1].split() == ["rows", "10"]
    assert out.splitlines()[2].split() == ["components", "3", "float32"]
    code, out, err = run("similarity", where, "-o", tmp_path / "s.npz", "-q")
    assert (code, err) == (0, "")
    assert sparse.load_npz(tmp_path / "s.npz").shape == (10, 10)


def test_info_looks_into_no_part(tmp_path, run):
    store(tmp_path / "v")
    _, whole, _ = run("info", tmp_path / "v")
    for part in (tmp_path / "v").glob("part-*"):
        part.unlink()
    assert run("info", tmp_path / "v") == (0, whole, "")


def test_a_directory_of_vectors_is_told_from_others(tmp_path):
    store(tmp_path / "v")
    assert is_vector_directory(tmp_path / "v")
    (tmp_path / "v" / INDEX).unlink()
    assert is_vector_directory(str(tmp_path / "v"))  # of an unfinished job
    (tmp_path / "graph").mkdir()
    for name in (INDEX, JOB, "part-00000.npz"):
        (tmp_path / "graph" / name).touch()
    assert not is_vector_directory(tmp_path / "graph")
    assert not is_vector_directory(tmp_path)
    assert not is_vector_directory(tmp_path / "nowhere")
