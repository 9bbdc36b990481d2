"""Vectors out and in: .npy and .parquet, and one clear line for each way to be broken."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_provenance import ORIGIN

from onnxsim_embed.errors import MissingExtraError, TableError
from onnxsim_embed.files import vectors as vector_files
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.vector_directory import (
    VectorDirectory,
    VectorShard,
    pack_shard,
    shard_file,
)
from onnxsim_embed.files.vectors import (
    NPY_HEADER,
    holds_vectors,
    npy_header,
    read_vectors,
    write_vectors,
)

VECTORS = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
FORMATS = [np.float32, np.float16, np.int8, np.uint8]


def write_parts(directory, sizes):
    storage, parts, first = Directory(directory), [], 0
    for number, rows in enumerate(sizes):
        own = slice(first, first + rows)
        data, digest = pack_shard(list(range(5))[own], VECTORS[own], [], ORIGIN, "int64")
        storage.write(shard_file(number), data)
        parts.append(VectorShard(shard_file(number), rows, digest))
        first += rows
    VectorDirectory(storage, 4, parts, ORIGIN).write_index()


def of_format(dtype, vectors=VECTORS):
    return (vectors * 20).clip(0 if dtype is np.uint8 else -100, 100).astype(dtype)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_vectors_are_read_as_they_were_written(tmp_path, ending, dtype, rows):
    vectors = of_format(dtype)[:rows]
    path = tmp_path / f"v{ending}"
    write_vectors(vectors, path)
    assert holds_vectors(path)
    read = read_vectors(path)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, vectors, strict=True)


@pytest.mark.parametrize("rows", [0, 1, 9, 10, 99_999, 10**12])
@pytest.mark.parametrize("width", [1, 384, 65_536])
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_npy_header_is_that_of_numpy(tmp_path, dtype, width, rows):
    path = tmp_path / "v.npy"
    with path.open("wb") as stream:
        shape = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(stream, shape)
    header = npy_header(rows, width, np.dtype(dtype))
    assert header == path.read_bytes()
    assert len(header) == NPY_HEADER


def test_parquet_is_written_in_groups_and_the_column_is_a_fixed_size_list(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "GROUP_ROWS", 2)
    np.save(tmp_path / "v.npy", VECTORS)
    write_vectors(np.load(tmp_path / "v.npy", mmap_mode="r"), tmp_path / "v.parquet")
    with parquet.ParquetFile(tmp_path / "v.parquet") as table:
        assert [table.metadata.row_group(i).num_rows for i in range(3)] == [2, 2, 1]
        assert table.schema_arrow.names == ["vector"]
        assert table.schema_arrow.field("vector").type == pyarrow.list_(pyarrow.float32(), 4)
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.parquet"), VECTORS)


@pytest.mark.parametrize("kind", [pyarrow.list_, pyarrow.large_list])
@pytest.mark.parametrize("number", [pyarrow.float64(), pyarrow.int64()])
def test_lists_that_others_wrote_are_read_as_float32(tmp_path, kind, number):
    vectors = of_format(np.int8)
    column = pyarrow.array(vectors.tolist(), kind(number))
    path = tmp_path / "v.parquet"
    parquet.write_table(pyarrow.table({"vector": column}), path, row_group_size=2)
    assert holds_vectors(path)
    np.testing.assert_array_equal(read_vectors(path), vectors.astype(np.float32), strict=True)


def test_vectors_of_another_column_are_read(tmp_path):
    path = tmp_path / "v.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 5, "emb": VECTORS.tolist()}), path)
    assert not holds_vectors(path)
    assert holds_vectors(path, "emb")
    np.testing.assert_array_equal(read_vectors(path, "emb"), VECTORS)


def test_texts_are_no_vectors(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "vector": ["b"]}), tmp_path / "t.parquet")
    assert not holds_vectors(tmp_path / "t.parquet")
    assert not holds_vectors(tmp_path / "t.csv")
    assert not holds_vectors("-")


@pytest.mark.parametrize(
    "rows",
    [[[1.0], [1.0, 2.0]], [[1.0], None], [[1.0], [None]], [["a"], ["b"]], [1.0, 2.0], ["a", "b"]],
)
def test_parquet_rows_that_are_no_vectors_are_refused(tmp_path, rows):
    path = tmp_path / "v.parquet"
    parquet.write_table(pyarrow.table({"vector": rows}), path)
    with pytest.raises(TableError, match="column 'vector' does not hold vectors"):
        read_vectors(path)


def test_lengths_that_change_far_into_a_file_are_refused(tmp_path):
    rows = [[1.0]] * 70_000 + [[1.0, 2.0]] * 70_000
    parquet.write_table(pyarrow.table({"vector": rows}), tmp_path / "v.parquet")
    with pytest.raises(TableError, match="lengths differ"):
        read_vectors(tmp_path / "v.parquet")


def test_a_column_that_is_not_there_lists_those_there_are(tmp_path):
    write_vectors(VECTORS, tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="no column 'emb'; it has: vector"):
        read_vectors(tmp_path / "v.parquet", "emb")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"id,text\n1,one\n" * 20])
def test_garbage_is_no_parquet(tmp_path, content):
    (tmp_path / "v.parquet").write_bytes(content)
    for use in (holds_vectors, read_vectors):
        with pytest.raises(TableError, match="is not a readable parquet file"):
            use(tmp_path / "v.parquet")


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    for use in (lambda: holds_vectors(path), lambda: write_vectors(VECTORS, path)):
        with pytest.raises(MissingExtraError, match=r"pip install 'onnxsim-embed\[parquet\]'"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"written as .npy or .parquet"):
        write_vectors(VECTORS, tmp_path / "v.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not numpy at all", b"\x80\x04K\x01."])
def test_garbage_is_no_npy(tmp_path, content):
    (tmp_path / "v.npy").write_bytes(content)
    with pytest.raises(TableError, match=r"v\.npy is not a readable \.npy file") as caught:
        read_vectors(tmp_path / "v.npy")
    assert "allow_pickle" not in str(caught.value)  # advice that nobody should follow


def test_a_truncated_npy_is_named(tmp_path):
    write_vectors(VECTORS, tmp_path / "v.npy")
    (tmp_path / "v.npy").write_bytes((tmp_path / "v.npy").read_bytes()[:-7])
    with pytest.raises(TableError, match=r"v\.npy is not a readable"):
        read_vectors(tmp_path / "v.npy")


def test_pickled_objects_are_never_loaded(tmp_path):
    np.save(tmp_path / "v.npy", np.array([["a", 1]], object), allow_pickle=True)
    with pytest.raises(TableError, match=r"v\.npy is not a readable"):
        read_vectors(tmp_path / "v.npy")


@pytest.mark.parametrize(
    "array",
    [np.ones(3), np.ones((2, 3, 4)), np.float32(1), np.ones((2, 2), complex), np.array([["a"]])],
)
def test_an_array_that_is_no_table_of_numbers_is_refused(tmp_path, array):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(TableError, match=r"not vectors of shape \(n, dim\)"):
        read_vectors(tmp_path / "v.npy")


def test_an_archive_of_arrays_is_refused(tmp_path):
    with (tmp_path / "v.npy").open("wb") as stream:
        np.savez(stream, VECTORS)
    with pytest.raises(TableError, match=r"v\.npy "):
        read_vectors(tmp_path / "v.npy")


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_a_missing_file_of_vectors_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_vectors(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_vectors(VECTORS, tmp_path / "v.npy")
    with pytest.raises(ValueError, match="allow_pickle"):
        write_vectors(np.array([[None]], object), tmp_path / "v.npy")
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.npy"), VECTORS)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


# directories of parts


def test_a_directory_of_parts_is_read_like_a_file(tmp_path):
    write_parts(tmp_path / "v", (2, 3))
    for path in (tmp_path / "v", str(tmp_path / "v")):
        assert holds_vectors(path)
        np.testing.assert_array_equal(read_vectors(path), VECTORS, strict=True)


def test_another_directory_says_what_it_lacks(tmp_path):
    assert holds_vectors(tmp_path)  # no texts, as the error then says
    with pytest.raises(FileNotFoundError, match=r"not a directory of vectors.*index\.json"):
        read_vectors(tmp_path)


def test_a_damaged_directory_names_the_part(tmp_path):
    write_parts(tmp_path / "v", (2, 3))
    (tmp_path / "v" / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(TableError, match=r"part-00001\.parquet is damaged"):
        read_vectors(tmp_path / "v")
