"""The cache: a model is exported once per content of its checkpoint, listed and cleared."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import bert_config, bert_tensors, write_checkpoint

from onnxsim_embed import Embedder, export
from onnxsim_embed.artifact import cache
from onnxsim_embed.artifact.cache import cache_directory, clear_cache, list_cached, locate_artifact
from onnxsim_embed.artifact.manifest import MANIFEST, is_artifact
from onnxsim_embed.errors import ArtifactError, CheckpointError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """The cache directory of a test."""
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def exports(few_texts, monkeypatch) -> list[Path]:
    """The targets of exports, as they happen: fp32 only, verified by the numpy reference."""
    targets, export_model = [], export.export_model

    def record(model, target, **options):
        targets.append(Path(target))
        return export_model(model, target, **{"precisions": ["fp32"], **options})

    monkeypatch.setattr(export, "export_model", record)
    monkeypatch.setitem(sys.modules, "transformers", None)
    return targets


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def directories(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


# One export per content


def test_a_checkpoint_is_exported_once_and_logged(tiny, root, exports, caplog):
    with caplog.at_level(logging.WARNING, "onnxsim_embed"):
        first = Embedder.from_pretrained(tiny).encode("water")
    assert [target.parent for target in exports] == [root]
    assert str(exports[0]) in caplog.text
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "onnxsim_embed"):
        second = Embedder.from_pretrained(tiny).encode("water")
    assert len(exports) == 1
    assert caplog.text == ""
    np.testing.assert_array_equal(first, second)


def test_a_cached_artifact_loads_without_the_export_packages(tiny):
    locate_artifact(tiny)
    code = (
        "import sys; from onnxsim_embed import Embedder\n"
        "Embedder.from_pretrained(sys.argv[1]).encode('water')\n"
        "bad = {'onnx', 'torch', 'transformers', 'onnxsim_embed.export'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny)], check=True)


def test_the_key_is_the_content_not_the_path(tiny, tmp_path, exports, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    shutil.copytree(tiny, "moved/tiny")  # other times, the same bytes
    names = (tiny, str(tiny), "tiny", "./tiny/", "moved/tiny")
    assert len({locate_artifact(name).directory for name in names}) == len(exports) == 1


def test_a_changed_checkpoint_of_the_same_size_and_time_is_exported_again(tiny, root, exports):
    before = Embedder.from_pretrained(tiny).encode("water")
    weights = tiny / "model.safetensors"
    stat = weights.stat()
    save_file(bert_tensors(bert_config(), seed=1), weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_size == stat.st_size
    after = Embedder.from_pretrained(tiny).encode("water")
    assert len(set(exports)) == len(directories(root)) == 2
    assert not np.allclose(before, after)


def test_a_warm_start_hashes_no_file(tiny, monkeypatch):
    locate_artifact(tiny)
    monkeypatch.setattr(cache, "sha256", lambda path: pytest.fail(f"hashes {path}"))
    (tiny / "README.md").write_text("not part of the model")
    locate_artifact(tiny)


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_a_damaged_index_of_digests_is_written_again(tiny, root, exports, text):
    locate_artifact(tiny)
    (root / cache.DIGESTS).write_text(text)
    locate_artifact(tiny)
    assert len(exports) == 1
    assert str(tiny / "config.json") in json.loads((root / cache.DIGESTS).read_text())


def test_pooling_is_part_of_the_key(tmp_path, exports):
    plain = write_checkpoint(tmp_path / "plain", pooling=None)
    models = [locate_artifact(plain, pooling=pooling) for pooling in ("cls", "mean", "cls")]
    assert [model.manifest.pooling for model in models] == [("cls",), ("mean",), ("cls",)]
    assert len(set(exports)) == len(exports) == 2


def test_an_artifact_is_opened_where_it_is(artifact, root):
    assert locate_artifact(str(artifact)).directory == artifact
    assert not root.exists()
    with pytest.raises(ValueError, match="pooling"):
        locate_artifact(artifact, pooling="cls")


ENCODE = """
import logging, sys
sys.modules["transformers"] = None
logging.basicConfig(level=logging.WARNING)
from onnxsim_embed import Embedder, export
export_model = export.export_model
export.export_model = lambda *args, **kw: export_model(*args, precisions=["fp32"], **kw)
print(Embedder.from_pretrained(sys.argv[1]).encode("water").tobytes().hex())
"""


def test_two_processes_that_start_together_export_once(tiny, root):
    command = [sys.executable, "-c", ENCODE, str(tiny)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert ended[0][0] == ended[1][0] != ""
    assert sum(err.count("exporting") for _, err in ended) == 1
    assert len(directories(root)) == 1


# Failures and damage


def test_a_failed_export_is_tried_again(tiny, root, exports):
    config = (tiny / "config.json").read_text()
    (tiny / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError):
            locate_artifact(tiny)
    assert directories(root) == []
    (tiny / "config.json").write_text(config)
    assert is_artifact(locate_artifact(tiny).directory)


@pytest.mark.parametrize("name", [MANIFEST, "onnx/model.onnx", "tokenizer.json"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_file_causes_a_new_export(tiny, exports, caplog, name, how):
    before = Embedder.from_pretrained(tiny).encode("water")
    path = locate_artifact(tiny).directory / name
    content = path.read_bytes()
    path.unlink()
    if how == "changed":
        path.write_bytes(b"{" if name == MANIFEST else content[:-1] + bytes([content[-1] ^ 1]))
    model = Embedder.from_pretrained(tiny)
    np.testing.assert_array_equal(model.encode("water"), before)
    model.artifact.check()
    assert len(exports) == 2
    assert str(path) in caplog.text or (name, how) == (MANIFEST, "missing")
    Embedder.from_pretrained(tiny)
    assert len(exports) == 2


def test_a_damaged_artifact_outside_the_cache_is_left_alone(tiny, tmp_path, exports):
    directory = tmp_path / "own"
    export.export_model(tiny, directory)
    (directory / "onnx/model.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        Embedder.from_pretrained(directory)
    assert exports == [directory]


def test_an_unfaithful_int8_is_skipped_once_and_the_reason_kept(tiny, monkeypatch, exports):
    from onnxsim_embed.export import build

    record, assemble = export.export_model, build.assemble

    def corrupt(*arguments):
        made = assemble(*arguments)
        return replace(made, norm=replace(made.norm, bias=made.norm.bias + np.float32(3)))

    monkeypatch.setattr(build, "assemble", corrupt)
    monkeypatch.setattr(export, "export_model", partial(record, precisions=["fp32", "int8"]))
    for _ in range(2):
        model = Embedder.from_pretrained(tiny)
        assert model.precision == "fp32"
    assert list(model.artifact.manifest.precisions) == ["fp32"]
    model.artifact.check()
    with pytest.raises(ValueError, match="not faithful"):
        Embedder.from_pretrained(tiny, precision="int8")
    assert len(exports) == 1


# The directory


@pytest.mark.parametrize("value", ["~/cache", None, ""])
def test_the_directory_is_the_variable_or_the_users_cache(monkeypatch, tmp_path, value):
    from platformdirs import user_cache_path

    assert cache_directory() == tmp_path / "cache"
    if value is None:
        monkeypatch.delenv("ONNXSIM_EMBED_CACHE")
    else:
        monkeypatch.setenv("ONNXSIM_EMBED_CACHE", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / "cache" if value else user_cache_path("onnxsim-embed", appauthor=False)
    assert cache_directory() == expected


def test_an_unwritable_cache_is_an_error_that_names_it(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match="file/cache"):
        locate_artifact(tiny)


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """The directories of two models in the cache, the one used last first."""
    second = write_checkpoint(tmp_path / "second", seed=3)
    paths = [locate_artifact(path).directory for path in (second, write_checkpoint(tmp_path / "b"))]
    os.utime(paths[1], (1e9, 1e9))
    return paths


def test_cached_models_are_listed_by_last_use(two, tmp_path, root):
    assert [model.path for model in list_cached()] == two
    locate_artifact(tmp_path / "b")
    first, other = list_cached()
    assert (first.path, other.path) == (two[1], two[0])
    assert (first.name, first.version) == ("b", cache.__version__)
    assert first.size == sum(p.stat().st_size for p in two[1].rglob("*") if p.is_file())
    shutil.copytree(two[0], root / "ray/second-0123")  # what a node of a Ray cluster keeps
    (root / "notes-of-mine").mkdir()
    assert len(list_cached()) == 3


def test_a_model_is_removed_by_name_source_or_directory(two, exports, tmp_path):
    with pytest.raises(ValueError, match=r"'nothing' is not among .*: b, second"):
        clear_cache(["b", "nothing"])
    assert [model.path for model in clear_cache(["second"])] == two[:1]
    assert [model.path for model in clear_cache([two[1].name])] == two[1:]
    assert list_cached() == []
    locate_artifact(tmp_path / "b")
    assert len(exports) == 3


def test_clearing_removes_everything_of_ours_and_nothing_else(two, root):
    (root / "notes-of-mine").mkdir()
    (root / ".b-0123.x.partial").mkdir()
    assert {model.path for model in clear_cache()} == set(two)
    assert [path.name for path in root.iterdir()] == ["notes-of-mine"]
    assert clear_cache() == []


def test_exports_of_other_versions_are_removed_when_unused_for_long(two, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "__version__", "99.0")
    made = locate_artifact(write_checkpoint(tmp_path / "third", seed=4)).directory
    assert {model.path for model in list_cached()} == {two[0], made}
