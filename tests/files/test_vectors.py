"""Vectors in .npy and .parquet files, and their provenance."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support import provenance, write_shards

from onnxsim_embed.errors import MissingExtraError, TableError
from onnxsim_embed.files import vectors as vector_files
from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
from onnxsim_embed.files.locations import find_files
from onnxsim_embed.files.provenance import (
    END_BYTES,
    check_sidecar,
    differences,
    parse_provenance,
    sidecar,
)
from onnxsim_embed.files.texts import iter_texts
from onnxsim_embed.files.vectors import (
    NPY_HEADER,
    holds_vectors,
    npy_header,
    read_provenance,
    read_vectors,
    write_vectors,
)

VECTORS = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
DTYPES = [np.float32, np.float16, np.int8, np.uint8]


@pytest.fixture(params=["v.npy", "v.parquet"])
def path(request, tmp_path):
    return tmp_path / request.param


def as_dtype(dtype):
    return (VECTORS * 20).clip(0 if dtype is np.uint8 else -100, 100).astype(dtype)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_are_read_as_they_were_written(path, dtype, rows):
    vectors = as_dtype(dtype)[:rows]
    write_vectors(vectors, path)
    assert holds_vectors(path)
    np.testing.assert_array_equal(read_vectors(path), vectors, strict=True)


@pytest.mark.parametrize("rows", [0, 1, 99_999, 10**12])
@pytest.mark.parametrize("dim", [1, 65_536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_npy_header_has_a_fixed_size(dtype, dim, rows):
    header = npy_header(rows, dim, np.dtype(dtype))
    assert len(header) == NPY_HEADER
    assert f"({rows}, {dim})".encode() in header


def test_parquet_is_written_in_row_groups_of_a_fixed_size_list(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "GROUP_ROWS", 2)
    np.save(tmp_path / "v.npy", VECTORS)
    write_vectors(np.load(tmp_path / "v.npy", mmap_mode="r"), tmp_path / "v.parquet")
    with parquet.ParquetFile(tmp_path / "v.parquet") as table:
        assert [table.metadata.row_group(i).num_rows for i in range(3)] == [2, 2, 1]
        assert table.schema_arrow.field("vector").type == pyarrow.list_(pyarrow.float32(), 4)
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.parquet"), VECTORS)


@pytest.mark.parametrize("list_type", [pyarrow.list_, pyarrow.large_list])
@pytest.mark.parametrize("number", [pyarrow.float64(), pyarrow.int64()])
def test_lists_of_other_programs_are_read_as_float32(tmp_path, list_type, number):
    vectors = as_dtype(np.int8)
    column = pyarrow.array(vectors.tolist(), list_type(number))
    table = pyarrow.table({"text": ["a"] * 5, "emb": column})
    parquet.write_table(table, tmp_path / "v.parquet", row_group_size=2)
    assert not holds_vectors(tmp_path / "v.parquet")
    assert holds_vectors(tmp_path / "v.parquet", "emb")
    vectors = vectors.astype(np.float32)
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.parquet", "emb"), vectors, strict=True)
    with pytest.raises(ValueError, match="text, emb"):
        read_vectors(tmp_path / "v.parquet")


def test_texts_are_not_vectors(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "vector": ["b"]}), tmp_path / "t.parquet")
    for name in ("t.parquet", "t.csv", "-"):
        assert not holds_vectors(tmp_path / name)


@pytest.mark.parametrize(
    "rows",
    [[[1.0], [1.0, 2.0]], [[1.0], None], [[1.0], [None]], [["a"], ["b"]], [1.0, 2.0], ["a", "b"],
     [[1.0]] * 70_000 + [[1.0, 2.0]] * 70_000],
    ids=["ragged", "null", "null number", "texts", "numbers", "text", "ragged far into the file"]
)  # fmt: skip
def test_other_columns_of_parquet_are_rejected(tmp_path, rows):
    parquet.write_table(pyarrow.table({"vector": rows}), tmp_path / "v.parquet")
    with pytest.raises(TableError, match="does not hold vectors"):
        read_vectors(tmp_path / "v.parquet")


def npy_bytes(array, save=np.save, **options):
    stream = io.BytesIO()
    save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"\x93NUMPY", b"not numpy", b"\x80\x04K\x01.", npy_bytes(VECTORS)[:-7],
     npy_bytes(VECTORS, np.savez), npy_bytes(np.array([["a"]], object), allow_pickle=True)],
)  # fmt: skip
def test_a_damaged_file_is_named(path, content):
    path.write_bytes(content)
    for use in (read_vectors, read_provenance):
        with pytest.raises(TableError, match=rf"{path.name} is not a readable"):
            use(path)


@pytest.mark.parametrize(
    "array",
    [np.ones(3), np.ones((2, 3, 4)), np.float32(1), np.ones((2, 2), complex), np.array([["a"]])],
)
def test_another_array_is_rejected(tmp_path, array):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(TableError, match=r"not vectors of shape \(n, dim\)"):
        read_vectors(tmp_path / "v.npy")


def test_a_missing_file_and_another_ending_are_named(path, tmp_path):
    for use in (read_vectors, read_provenance):
        with pytest.raises(FileNotFoundError, match=path.name):
            use(path)
    with pytest.raises(ValueError, match=r"\.npy or \.parquet"):
        write_vectors(VECTORS, tmp_path / "v.csv")
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_vectors(VECTORS, path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (holds_vectors, lambda path: write_vectors(VECTORS, path), find_files,
                lambda path: EmbeddingCheckpoint(path).check_target(force=True),
                lambda path: list(iter_texts(path))):  # fmt: skip
        with pytest.raises(MissingExtraError, match=r"pip install .*\[parquet\]'"):
            use(path)


def test_a_directory_of_shards_is_read_like_a_file(tmp_path):
    write_shards(tmp_path / "v", VECTORS, (2, 3))
    for location in (tmp_path / "v", str(tmp_path / "v")):
        assert holds_vectors(location)
        np.testing.assert_array_equal(read_vectors(location), VECTORS, strict=True)
        assert read_provenance(location) == provenance()
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        read_vectors(tmp_path)


# Provenance


@pytest.fixture
def warning(caplog):
    """A function that reads provenance which is ignored, and returns the warning."""

    def call(path):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_provenance(path) is None
        return caplog.messages[0]

    return call


def test_provenance_is_read_as_it_was_written(path, caplog):
    write_vectors(VECTORS, path, provenance())
    assert read_provenance(path) == provenance()
    np.testing.assert_array_equal(read_vectors(path), VECTORS, strict=True)
    write_vectors(VECTORS, path)  # without
    assert read_provenance(path) is None
    assert not sidecar(path).exists()
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"model_digest": "xy"}, 1),
        ({"model_digest": "xy", "model": "other", "pooling": "mean"}, 3),
        ({"truncate_dim": 2}, 1),
        ({"dim": 8}, 1),
        ({"model": "the same under another name", "prompt": None, "precision": "int8",
          "weights_digest": "ef", "max_seq_length": 12, "onnxruntime": "3", "normalize": False}, 0)
    ]
)  # fmt: skip
def test_differences_that_forbid_a_comparison(changes, count):
    found = differences(provenance(), provenance(**changes))
    assert len(found) == count
    assert all(str(value) in " ".join(found) for value in changes.values() if count)


@pytest.mark.parametrize("other", ["first row", "last row", np.zeros((9, 1)), np.float16])
def test_a_sidecar_of_another_file_is_ignored(tmp_path, warning, other):
    path = tmp_path / "v.npy"
    vectors = np.zeros((END_BYTES, 1), np.float32)  # 256 KiB: longer than its two ends
    write_vectors(vectors, path, provenance())
    if isinstance(other, str):
        vectors[0 if other == "first row" else -1] = 1
        other = np.float32
    np.save(path, other if isinstance(other, np.ndarray) else vectors.astype(other))
    assert "describes other vectors" in warning(path)


def record(**changes):
    return provenance().to_table() | {"origin": {**dataclasses.asdict(provenance()), **changes}}


INVALID = [None, [], {}, {"format_version": 2}, {"format_version": 1, "origin": {}},
           {"format_version": 1, "origin": [1]}, record(dim="4"), record(dim=True), record(more=1),
           record(normalize=1), record(model=None)]  # fmt: skip


@pytest.mark.parametrize("table", INVALID)
def test_invalid_provenance_is_rejected_and_ignored_in_a_file(path, warning, table):
    with pytest.raises(ValueError, match=r"it |cannot be"):
        parse_provenance(table)
    write_vectors(VECTORS, path)
    content = json.dumps(table).encode()
    if path.suffix == ".npy":
        sidecar(path).write_bytes(content)
    else:
        metadata = {"onnxsim_embed": content}
        parquet.write_table(parquet.read_table(path).replace_schema_metadata(metadata), path)
    assert "ignored" in warning(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 20) + b"{}"])
def test_a_damaged_sidecar_is_ignored(tmp_path, warning, content):
    write_vectors(VECTORS, tmp_path / "v.npy")
    sidecar(tmp_path / "v.npy").write_bytes(content)
    assert "ignored" in warning(tmp_path / "v.npy")


def test_a_sidecar_that_is_a_link_out_of_the_directory_or_no_file_is_ignored(tmp_path, warning):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/v.npy"
    write_vectors(VECTORS, path, provenance())
    sidecar(path).rename(tmp_path / "outside.json")
    sidecar(path).symlink_to(tmp_path / "outside.json")
    assert "link" in warning(path)
    sidecar(path).unlink()
    os.mkfifo(sidecar(path))  # which would never end
    assert "not a regular file" in warning(path)


def test_a_file_of_the_user_is_not_replaced_by_a_sidecar(tmp_path):
    path = tmp_path / "v.npy"
    sidecar(path).write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=r"v\.npy\.json"):
        check_sidecar(path, force=False)
    check_sidecar(path, force=True)
    write_vectors(VECTORS, path, provenance())
    path.unlink()
    check_sidecar(path, force=False)  # a sidecar without its file
