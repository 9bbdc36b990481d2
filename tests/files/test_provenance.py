"""What made a file of vectors: written with it, read back, and never taken for another file's."""

from __future__ import annotations

import dataclasses
import json
import logging
import os

import numpy as np
import pytest

from onnxsim_embed import Embedder
from onnxsim_embed.errors import TableError
from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.provenance import (
    END_BYTES,
    Provenance,
    differences,
    parse_provenance,
    read_provenance,
    sidecar,
    vectors_match,
)
from onnxsim_embed.files.vector_directory import VectorDirectory
from onnxsim_embed.files.vectors import read_vectors, write_vectors
from onnxsim_embed.runtime.encode_to_file import encode_to_file
from onnxsim_embed.runtime.provenance import provenance_of

VECTORS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
ORIGIN = Provenance(
    model="tiny",
    model_digest="ab",
    weights_digest="cd",
    precision="fp32",
    pooling="cls+mean",
    normalize=True,
    prompt="a dog ",
    max_seq_length=48,
    dim=4,
    truncate_dim=None,
    dtype="float32",
    ranges=None,
    provider="CPUExecutionProvider",
    onnxsim_embed="1",
    onnxruntime="2",
)
LINES = ["the water of the river", "a road", "the sun"]


@pytest.fixture(params=["v.npy", "v.parquet"])
def path(request, tmp_path):
    return tmp_path / request.param


@pytest.fixture(scope="module")
def embedder(artifact):
    return Embedder(artifact, precision="fp32")


@pytest.fixture
def warned(caplog):
    """Read an origin that is to be left aside, and return what was said of it."""

    def call(path):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_provenance(path) is None
        (record,) = caplog.records
        return record.getMessage()

    return call


# what is written


def test_an_origin_comes_back_from_its_file(path):
    write_vectors(VECTORS, path, ORIGIN)
    assert read_provenance(path) == ORIGIN
    np.testing.assert_array_equal(read_vectors(path), VECTORS, strict=True)


def test_without_an_origin_the_file_says_nothing(path, caplog):
    write_vectors(VECTORS, path, ORIGIN)
    write_vectors(VECTORS, path)
    assert read_provenance(path) is None
    assert not sidecar(path).exists()
    assert not caplog.records


def test_a_job_states_all_that_vectors_depend_on(embedder, path):
    options = {"prompt_name": "query", "truncate_dim": 8, "precision": "float16"}
    encode_to_file(embedder, LINES, path, **options)
    origin = read_provenance(path)
    manifest = embedder.artifact.manifest
    assert (origin.model, origin.precision, origin.pooling) == (manifest.name, "fp32", "mean")
    assert (origin.prompt, origin.max_seq_length, origin.dim) == ("a dog ", 48, 32)
    assert (origin.truncate_dim, origin.dtype, origin.normalize) == (8, "float16", False)
    assert origin.model_digest != origin.weights_digest


def test_precisions_share_the_model_s_digest_and_not_the_weights_one(artifact, embedder):
    int8 = provenance_of(Embedder(artifact, precision="int8"))
    fp32 = provenance_of(embedder)
    assert int8.model_digest == fp32.model_digest
    assert int8.weights_digest != fp32.weights_digest
    assert vectors_match(int8, fp32)


def test_equal_jobs_give_equal_sidecars(embedder, tmp_path):
    for name in ("a.npy", "b.npy"):
        encode_to_file(embedder, LINES, tmp_path / name)
    assert sidecar(tmp_path / "a.npy").read_bytes() == sidecar(tmp_path / "b.npy").read_bytes()


def test_a_file_that_is_replaced_gets_its_own_description(embedder, tmp_path):
    path = tmp_path / "v.npy"
    write_vectors(VECTORS, path, ORIGIN)
    encode_to_file(embedder, LINES, path, force=True)
    assert read_provenance(path) == provenance_of(embedder)


def test_a_file_of_the_user_is_not_replaced_by_a_sidecar(embedder, tmp_path):
    path = tmp_path / "v.npy"
    sidecar(path).write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=r"v\.npy\.json exists.*force=True"):
        encode_to_file(embedder, LINES, path)
    assert sidecar(path).read_text() == '{"mine": 1}'
    EmbeddingCheckpoint(path).check_target(True)


def test_a_sidecar_that_lost_its_file_is_in_nobody_s_way(embedder, tmp_path):
    path = tmp_path / "v.npy"
    write_vectors(VECTORS, path, ORIGIN)
    path.unlink()
    encode_to_file(embedder, LINES, path)
    assert read_provenance(path) == provenance_of(embedder)


# what is compared


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_digest": "xy"}, ["model digest ab, not xy"]),
        (
            {"model_digest": "xy", "model": "other"},
            ["model tiny, not other", "model digest ab, not xy"],
        ),
        (
            {"model_digest": "xy", "pooling": "mean"},
            ["model digest ab, not xy", "pooling cls+mean, not mean"],
        ),
        ({"truncate_dim": 2}, ["dimension 4, not 2"]),
        ({"dim": 8}, ["dimension 4, not 8"]),
    ],
)
def test_what_differs_is_named(change, told):
    other = dataclasses.replace(ORIGIN, **change)
    assert differences(ORIGIN, other) == told
    assert not vectors_match(ORIGIN, other)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "the same under another name"},
        {"prompt": None},
        {"precision": "int8", "weights_digest": "ef"},
        {"max_seq_length": 12},
        {"onnxruntime": "3"},
        {"normalize": False},
    ],
)
def test_what_queries_and_documents_may_differ_in_does_not_count(change):
    assert vectors_match(ORIGIN, dataclasses.replace(ORIGIN, **change))


# what is left aside


@pytest.mark.parametrize("place", [0, -1])
def test_a_file_of_the_same_shape_that_came_to_its_place_is_seen(tmp_path, warned, place):
    path = tmp_path / "v.npy"
    vectors = np.zeros((END_BYTES, 1), np.float32)  # 256 KiB: longer than its two ends
    write_vectors(vectors, path, ORIGIN)
    vectors[place] = 1
    np.save(path, vectors)
    assert "describes other vectors" in warned(path)


@pytest.mark.parametrize("other", [VECTORS[:5], VECTORS[:, :3], VECTORS.astype(np.float16)])
def test_a_file_of_another_shape_or_format_is_seen(tmp_path, warned, other):
    path = tmp_path / "v.npy"
    write_vectors(VECTORS, path, ORIGIN)
    np.save(path, other)
    assert "describes other vectors" in warned(path)


DAMAGED = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"{}",
    b'{"format_version": 2}',
    b'{"format_version": 1, "origin": {}}',
    b"[" * 100_000,
    b" " * (1 << 20) + b"{}",
    json.dumps(ORIGIN.to_table() | {"origin": {**vars(ORIGIN), "dim": "4"}}).encode(),
    json.dumps(ORIGIN.to_table() | {"origin": {**vars(ORIGIN), "dim": True}}).encode(),
    json.dumps(ORIGIN.to_table() | {"origin": {**vars(ORIGIN), "more": 1}}).encode(),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_description_is_left_aside_with_a_warning(tmp_path, warned, content):
    path = tmp_path / "v.npy"
    write_vectors(VECTORS, path)
    sidecar(path).write_bytes(content)
    assert "ignored" in warned(path)


def test_damaged_metadata_is_left_aside_with_a_warning(tmp_path, warned):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array(VECTORS.tolist(), pyarrow.list_(pyarrow.float32(), 4))
    table = pyarrow.table({"vector": column}).replace_schema_metadata({"onnxsim_embed": "{"})
    parquet.write_table(table, tmp_path / "v.parquet")
    assert "ignored" in warned(tmp_path / "v.parquet")


def test_a_link_out_of_the_directory_is_not_followed(tmp_path, warned):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/v.npy"
    write_vectors(VECTORS, path, ORIGIN)
    sidecar(path).rename(tmp_path / "outside.json")
    sidecar(path).symlink_to(tmp_path / "outside.json")
    assert "link out of its directory" in warned(path)
    sidecar(path).unlink()
    sidecar(path).mkdir()
    assert "not a regular file" in warned(path)
    if hasattr(os, "mkfifo"):  # which would never end
        sidecar(path).rmdir()
        os.mkfifo(sidecar(path))
        assert "not a regular file" in warned(path)


def test_a_file_that_is_not_there_or_no_vectors_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_provenance(tmp_path / "v.npy")
    write_vectors(VECTORS, tmp_path / "v.npy", ORIGIN)
    for name in ("v.npy", "v.parquet"):
        (tmp_path / name).write_bytes(b"no vectors")
        with pytest.raises(TableError, match="not a readable"):
            read_provenance(tmp_path / name)


# in an index


def test_an_origin_is_parsed_as_it_was_stated():
    assert parse_provenance(json.loads(json.dumps(ORIGIN.to_table()))) == ORIGIN


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (None, "not a provenance record"),
        ([], "not a provenance record"),
        ({}, "not a provenance record"),
        ({**ORIGIN.to_table(), "format_version": 0}, "another version"),
        ({**ORIGIN.to_table(), "origin": {"model": "tiny"}}, "must have the fields"),
        ({**ORIGIN.to_table(), "origin": [1]}, "must have the fields"),
        ({**ORIGIN.to_table(), "origin": {**dataclasses.asdict(ORIGIN), "dim": "4"}}, "dim cannot be '4'"),
        ({**ORIGIN.to_table(), "origin": {**dataclasses.asdict(ORIGIN), "normalize": 1}}, "normalize cannot be 1"),
    ],
)  # fmt: skip
def test_what_is_no_origin_is_refused(table, told):
    with pytest.raises(ValueError, match=told):
        parse_provenance(table)


def test_a_directory_of_parts_has_an_origin(tmp_path):
    VectorDirectory(Directory(tmp_path / "v"), 4, (), ORIGIN).write_index()
    assert read_provenance(tmp_path / "v") == ORIGIN
    assert read_provenance(str(tmp_path / "v")) == ORIGIN
    with pytest.raises(FileNotFoundError, match="not a directory of vectors"):
        read_provenance(tmp_path)


# the command line


def test_info_prints_what_made_vectors(run, tmp_path, path):
    write_vectors(VECTORS, path, dataclasses.replace(ORIGIN, model="ti\x1bny", truncate_dim=2))
    code, out, err = run("info", path)
    assert (code, err) == (0, "")
    told = dict(line.split("  ", 1) for line in out.splitlines())
    told = {name.strip(): value.strip() for name, value in told.items()}
    assert told["rows"] == "6"
    assert told["precision"] == "fp32 cd, on CPUExecutionProvider"
    assert told["prompt"] == "'a dog '"
    assert told["dimensions"] == "4, cut to 2; as float32"
    assert "\x1b" not in out


def test_info_says_where_nothing_is_known(run, refuse, path):
    write_vectors(VECTORS, path)
    assert "unknown: the file does not say" in run("info", path)[1]
    path.unlink()
    assert f"there is no file {path}" in refuse("info", path, code=1)
