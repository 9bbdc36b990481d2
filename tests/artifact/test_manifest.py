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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged: its sha256 differs"),
        (lambda data: data[:-1], r"is damaged: [\d,]+ bytes instead of"),
        (lambda data: b"", "is damaged: 0 bytes instead of"),
        (None, "is missing"),
    ],
    ids=["changed", "truncated", "empty", "missing"],
)
@pytest.mark.parametrize("name", [*LOADED, "1_Pooling/config.json", "onnx/model_int8.onnx"])
def test_a_damaged_file_is_named(copy, name, damage, message):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage:
        (copy / name).write_bytes(damage(content))
    message = f"copy/{name} {message}"
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(copy).check()
    if name in LOADED:
        with pytest.raises(ArtifactError, match=message):
            Embedder(copy, precision="fp32")


def test_a_file_that_the_manifest_does_not_list_is_never_read(copy):
    (copy / "stray.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"does not list 'stray.json'"):
        Artifact.open(copy).file("stray.json")


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


def test_the_manifest_survives_a_round_trip_and_holds_no_path_of_its_making(artifact, checkpoint):
    text = (artifact / MANIFEST).read_text(encoding="utf-8")
    manifest = Manifest.from_json(text, MANIFEST)
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json(), MANIFEST) == manifest
    assert str(checkpoint.parent) not in text
    assert str(artifact.parent) not in text


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 100_000, b"\xff{}"], ids=["empty", "list", "deep", "no UTF-8"]
)
def test_a_manifest_must_be_a_json_object(copy, content):
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=MANIFEST):
        Artifact.open(copy)


VERSIONS = [({"format_version": v}, f"version {v}; .* reads 1: export") for v in (0, 2, "1", None)]
REQUIRED = ("dim", "name", "files", "precisions", "pooling", "normalize")
INVALID = [
    ("files", []), ("files", {"a": 1}), ("files", {"a": {"sha256": "x", "size": 1, "mode": 7}}),
    ("precisions", "fp32"), ("precisions", {"fp32": {"file": "a"}}), ("pooling", 3), ("dense", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *VERSIONS,
        ({"colour": 1, "a": 2}, r"unknown keys \['a', 'colour'\]"),
        *(({key: ...}, rf"{MANIFEST} .*'{key}'") for key in REQUIRED),
        *(({key: value}, MANIFEST) for key, value in INVALID),
    ],
)
def test_invalid_manifests(table, changes, message):
    changed = {key: value for key, value in (table | changes).items() if value is not ...}
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(json.dumps(changed), MANIFEST)


@pytest.mark.parametrize("pooling", [["median"], "mean", []])
def test_an_unknown_pooling_is_an_artifact_error(copy, table, pooling):
    (copy / MANIFEST).write_text(json.dumps(table | {"pooling": pooling}))
    with pytest.raises(ArtifactError, match="pooling"):
        Embedder(copy, precision="fp32")


# Files


def test_files_are_listed_by_path_with_digest_and_size(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c.txt").write_bytes(b"abc")
    (tmp_path / MANIFEST).write_text("{}")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert list_files(tmp_path) == {"a/b/c.txt": FileEntry(digest, 3)}
    assert sha256(tmp_path / "a/b/c.txt") == digest
