"""The artifact: its manifest and its integrity."""

import json
import shutil
from pathlib import Path

import pytest

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    check_target,
    is_artifact,
    list_files,
    sha256,
)
from onnxsim_embed.errors import ArtifactError


@pytest.fixture
def copy(artifact, tmp_path) -> Path:
    """An artifact that may be damaged."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def table(artifact) -> dict:
    return json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))


# Integrity

LOADED = ["tokenizer.json", "onnx/model.onnx", "onnx/encoder.onnx"]
OTHER = ["config.json", "1_Pooling/config.json", "vocab.txt", "README.md", "onnx/model_int8.onnx"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [
    pytest.param(flip, "is damaged: its sha256 differs", id="changed"),
    pytest.param(truncate, r"is damaged: [\d,]+ bytes instead of", id="truncated"),
    pytest.param(empty, "is damaged: 0 bytes instead of", id="empty"),
    pytest.param(Path.unlink, "is missing", id="missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.parametrize("name", LOADED + OTHER)
def test_a_damaged_file_is_named(copy, name, damage, message):
    damage(copy / name)
    message = f"copy/{name} {message}"
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(copy).check()
    if name in LOADED:
        with pytest.raises(ArtifactError, match=message):
            Embedder(copy, precision="fp32")


def test_a_file_the_manifest_does_not_list_is_never_read(copy):
    (copy / "stray.json").write_text("{}")
    opened = Artifact.open(copy)
    opened.check()
    with pytest.raises(ArtifactError, match=r"does not list 'stray.json'"):
        opened.file("stray.json")


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_other_targets_are_not_artifacts(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "empty":
        target.mkdir()
    elif kind == "file":
        target.write_text("x")
    with pytest.raises(ArtifactError, match="target"):
        Artifact.open(target)
    assert not is_artifact(target)


# The manifest


def test_the_manifest_survives_a_round_trip(artifact):
    text = (artifact / MANIFEST).read_text(encoding="utf-8")
    manifest = Manifest.from_json(text, MANIFEST)
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json(), MANIFEST) == manifest


def test_the_manifest_holds_no_time_and_no_path_of_its_making(artifact, checkpoint):
    text = (artifact / MANIFEST).read_text(encoding="utf-8")
    assert str(checkpoint.parent) not in text
    assert str(artifact.parent) not in text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '"x"', "\x00", "[" * 100_000],
    ids=["empty", "cut", "list", "null", "number", "text", "binary", "deep"],
)
def test_a_manifest_must_be_a_json_object(copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=MANIFEST):
        Artifact.open(copy)


def test_a_manifest_must_be_utf8(copy):
    (copy / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactError, match=MANIFEST):
        Artifact.open(copy)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_says_what_to_do(table, version):
    text = json.dumps(table | {"format_version": version})
    with pytest.raises(ArtifactError, match=rf"format version {version}; .* reads 1: export"):
        Manifest.from_json(text, MANIFEST)


def test_unknown_keys_are_named(table):
    with pytest.raises(ArtifactError, match=r"unknown keys \['a', 'colour'\]"):
        Manifest.from_json(json.dumps(table | {"colour": 1, "a": 2}), MANIFEST)


@pytest.mark.parametrize("key", ["dim", "name", "files", "precisions", "pooling", "normalize"])
def test_a_missing_key_is_named(table, key):
    del table[key]
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} .*'{key}'"):
        Manifest.from_json(json.dumps(table), MANIFEST)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", []),
        ("files", {"a": 1}),
        ("files", {"a": {"sha256": "x", "size": 1, "mode": 7}}),
        ("precisions", "fp32"),
        ("precisions", {"fp32": {"file": "a"}}),
        ("pooling", 3),
        ("dense", None),
    ],
)
def test_values_of_another_form_are_an_artifact_error(table, key, value):
    with pytest.raises(ArtifactError, match=MANIFEST):
        Manifest.from_json(json.dumps(table | {key: value}), MANIFEST)


@pytest.mark.parametrize("pooling", [["median"], "mean", []])
def test_an_unknown_pooling_is_an_artifact_error(copy, table, pooling):
    (copy / MANIFEST).write_text(json.dumps(table | {"pooling": pooling}))
    with pytest.raises(ArtifactError, match="pooling"):
        Embedder(copy, precision="fp32")


# Files and targets


def test_files_are_listed_by_path_with_digest_and_size(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c.txt").write_bytes(b"abc")
    (tmp_path / MANIFEST).write_text("{}")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert list_files(tmp_path) == {"a/b/c.txt": FileEntry(digest, 3)}
    assert sha256(tmp_path / "a/b/c.txt") == digest


def test_a_free_target_needs_no_force(tmp_path):
    check_target(tmp_path / "new", force=False)
    check_target(tmp_path, force=False)  # empty


def test_a_nonempty_target_is_an_error(tmp_path, copy):
    with pytest.raises(FileExistsError, match="force=True"):
        check_target(copy, force=False)
    check_target(copy, force=True)
    (tmp_path / "file").write_text("x")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="not an artifact; choose another directory"):
            check_target(target, force=True)
