"""A checkpoint becomes an artifact: whole, faithful and readable by others, or not at all."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from support import (
    TEXTS,
    VOCABULARY,
    bert_config,
    bert_tensors,
    tokenizer_json,
    write_checkpoint,
    write_json,
)

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import MANIFEST, MODEL_FILES, PRECISIONS, Artifact
from onnxsim_embed.artifact.recipes import find_recipe
from onnxsim_embed.errors import CheckpointError, MissingExtraError, VerificationError
from onnxsim_embed.export import build, export_model, verify, verify_artifact, verify_recipe

FILES = {
    "onnx/model.onnx",
    "onnx/encoder.onnx",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "README.md",
    MANIFEST,
}
FP32 = ["fp32"]

pytestmark = pytest.mark.usefixtures("few_texts")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def exported(few_texts, checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint's artifact, fp32 only. Read-only."""
    target = tmp_path_factory.mktemp("exported") / "tiny"
    export_model(checkpoint, target, precisions=FP32)
    return target


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """An artifact that may be replaced, alone in its directory."""
    return Path(shutil.copytree(exported, tmp_path / "alone" / "artifact"))


# What is written


def test_the_directory_holds_what_the_design_lists(exported):
    assert set(contents(exported)) == FILES
    assert (exported / "2_Normalize").is_dir()


def test_the_manifest_names_every_file_and_its_facts(exported, checkpoint):
    manifest = Artifact.open(exported).manifest
    assert set(manifest.files) == FILES - {MANIFEST}
    assert manifest.name == manifest.source == checkpoint.name
    assert manifest.architecture == "bert"
    assert (manifest.dim, manifest.hidden_size, manifest.layers) == (32, 32, 2)
    assert manifest.max_seq_length == 48
    assert manifest.pooling == ("mean",)
    assert manifest.normalize
    assert manifest.prompts == {"query": "a dog "}
    assert manifest.verification["fp32"]["problems"] == []
    assert manifest.verification["fp32"]["min_cosine"] > 0.99999
    Artifact.open(exported).check()


def test_both_precisions_are_there_and_close(artifact):
    opened = Artifact.open(artifact)
    assert set(opened.manifest.precisions) == set(PRECISIONS)
    assert (artifact / MODEL_FILES["int8"]).is_file()
    opened.check()
    fp32, int8 = (Embedder(opened, precision=p).encode(TEXTS) for p in ("fp32", "int8"))
    assert np.einsum("ij,ij->i", fp32, int8).min() > 0.9


@pytest.mark.parametrize("precisions", [[], ["fp32"], ["fp32", "fp32"]])
def test_fp32_is_always_written(checkpoint, tmp_path, precisions):
    artifact = export_model(checkpoint, tmp_path / "a", precisions=precisions)
    assert list(artifact.manifest.precisions) == ["fp32"]


@pytest.mark.parametrize("precisions", [["fp8"], ["int4", "fp32"], "int8"])
def test_an_unknown_precision_names_those_there_are(checkpoint, tmp_path, precisions):
    with pytest.raises(ValueError, match=r"precision.* fp32, int8"):
        export_model(checkpoint, tmp_path / "a", precisions=precisions)
    assert names(tmp_path) == []


def test_the_tokenizer_ships_without_baked_in_lengths(exported):
    tokenizer = read(exported / "tokenizer.json")
    assert tokenizer["truncation"] is None
    assert tokenizer["padding"] is None
    config = read(exported / "tokenizer_config.json")
    assert config["model_max_length"] == 48
    assert "max_length" not in config
    assert config["pad_token"] == "[PAD]"
    assert config["tokenizer_class"] == "BertTokenizer"


def test_special_tokens_and_vocabulary_ship_too(exported):
    assert read(exported / "special_tokens_map.json") == {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    assert (exported / "vocab.txt").read_text().splitlines() == VOCABULARY


def test_special_tokens_given_as_objects_become_texts(tmp_path):
    directory = write_checkpoint(tmp_path / "c")
    config = read(directory / "tokenizer_config.json")
    config["pad_token"] = {"content": "[PAD]", "special": True}
    config["mask_token"] = None
    write_json(directory / "tokenizer_config.json", config)
    export_model(directory, tmp_path / "a", precisions=FP32)
    shipped = read(tmp_path / "a/special_tokens_map.json")
    assert (shipped["pad_token"], shipped["mask_token"]) == ("[PAD]", "[MASK]")


@pytest.mark.parametrize("schema", ["legacy", "new"])
def test_configs_are_written_in_the_legacy_schema(tmp_path, schema):
    directory = write_checkpoint(tmp_path / "c", pooling="cls", dense=True, schema=schema)
    export_model(directory, tmp_path / "a", precisions=FP32)
    assert read(tmp_path / "a/1_Pooling/config.json") == {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }
    assert read(tmp_path / "a/sentence_bert_config.json") == {
        "max_seq_length": 48,
        "do_lower_case": False,
    }
    modules = read(tmp_path / "a/modules.json")
    assert [(m["idx"], m["path"], m["type"].rsplit(".", 1)[1]) for m in modules] == [
        (0, "", "Transformer"),
        (1, "1_Pooling", "Pooling"),
        (2, "2_Dense", "Dense"),
        (3, "3_Normalize", "Normalize"),
    ]
    assert {m["type"].rsplit(".", 1)[0] for m in modules} == {"sentence_transformers.models"}
    assert read(tmp_path / "a/2_Dense/config.json")["out_features"] == 16
    assert (tmp_path / "a/2_Dense/model.safetensors").is_file()


def test_the_model_configuration_is_the_checkpoint_s_own(exported, checkpoint):
    assert read(exported / "config.json") == read(checkpoint / "config.json")


def test_prompts_are_written(exported):
    assert read(exported / "config_sentence_transformers.json") == {
        "prompts": {"query": "a dog "},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


def test_the_card_says_what_it_is_and_how_faithful(exported, checkpoint):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\n")
    for fact in (checkpoint.name, "32 dimensions", "mean pooling", "at most 48 tokens", "PyTorch"):
        assert fact in card


def test_two_exports_of_one_checkpoint_are_equal_to_the_byte(checkpoint, exported, tmp_path):
    export_model(checkpoint, tmp_path / "again", precisions=FP32)
    assert contents(tmp_path / "again") == contents(exported)


# What the checkpoint holds reaches the vectors


def reference_vectors(directory: Path, texts: list[str], **options) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    return model.encode(texts, **options)


@pytest.mark.parametrize(
    "options",
    [
        *({"pooling": mode} for mode in ("mean", "cls", "max", "weightedmean", "lasttoken")),
        {"pooling": "mean_sqrt_len_tokens", "normalize": False},
        {"pooling": "mean+cls+max", "schema": "legacy"},
        {"pooling": "mean+cls+max", "schema": "new"},
        {"dense": True},
        {"dense": True, "normalize": False, "schema": "new", "pooling": "cls+mean"},
        {"config": bert_config(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                               num_hidden_layers=1), "pooling": "cls"},
    ],
    ids=lambda options: "-".join(str(v) if k != "config" else "bge" for k, v in options.items()),
)  # fmt: skip
def test_vectors_equal_those_of_sentence_transformers(tmp_path, options):
    directory = write_checkpoint(tmp_path / "c", **options)
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    vectors = Embedder(artifact).encode(TEXTS)
    expected = reference_vectors(directory, TEXTS)
    assert vectors.shape == expected.shape
    assert np.abs(vectors - expected).max() < 1e-5
    if "+" in options.get("pooling", ""):  # an order of concatenation that booleans may not say
        shutil.copyfile(directory / "model.safetensors", tmp_path / "a/model.safetensors")
        assert np.abs(reference_vectors(tmp_path / "a", TEXTS) - expected).max() < 1e-6


@pytest.mark.parametrize("dense", [False, True])
def test_what_the_installed_sentence_transformers_saves_is_exported(tmp_path, dense):
    from sentence_transformers import SentenceTransformer

    directory = write_checkpoint(tmp_path / "c", dense=dense, prompts={"query": "a dog "})
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    model.max_seq_length = 20  # an override, as users make them before they save
    model.save_pretrained(str(tmp_path / "saved"))
    artifact = export_model(tmp_path / "saved", tmp_path / "a", precisions=FP32)
    assert artifact.manifest.max_seq_length == 20
    assert artifact.manifest.prompts["query"] == "a dog "
    assert np.abs(Embedder(artifact).encode(TEXTS) - model.encode(TEXTS)).max() < 1e-5


def test_a_transformer_in_a_subfolder_is_exported(tmp_path, exported):
    directory = write_checkpoint(tmp_path / "c", prompts={"query": "a dog "})
    inside = directory / "0_Transformer"
    inside.mkdir()
    for path in list(directory.iterdir()):
        if path.is_file() and "modules" not in path.name and "transformers" not in path.name:
            path.rename(inside / path.name)
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write_json(directory / "modules.json", modules)
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    assert np.array_equal(Embedder(artifact).encode(TEXTS), Embedder(exported).encode(TEXTS))


def test_pooling_given_by_the_caller_is_written(tmp_path):
    directory = write_checkpoint(tmp_path / "c", pooling=None)
    artifact = export_model(directory, tmp_path / "a", precisions=FP32, pooling="cls")
    assert artifact.manifest.pooling == ("cls",)
    assert not artifact.manifest.normalize
    assert read(tmp_path / "a/1_Pooling/config.json")["pooling_mode_cls_token"] is True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_export(tmp_path, dtype):
    import torch
    from safetensors.torch import save_file

    config = bert_config(torch_dtype=dtype, dtype=dtype)
    directory = write_checkpoint(tmp_path / "c", config=config)
    tensors = {k: torch.from_numpy(v) for k, v in bert_tensors(config).items()}
    save_file(
        {k: v.to(getattr(torch, dtype)) for k, v in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    assert artifact.manifest.verification["fp32"]["min_cosine"] > 0.99999


def test_a_default_prompt_does_not_disturb_verification(tmp_path):
    directory = write_checkpoint(tmp_path / "c", prompts={"query": "the river of "})
    path = directory / "config_sentence_transformers.json"
    write_json(path, read(path) | {"default_prompt_name": "query"})
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    expected = reference_vectors(directory, TEXTS)
    assert np.abs(Embedder(artifact).encode(TEXTS) - expected).max() < 1e-5


def test_without_pytorch_the_reference_is_numpy(checkpoint, exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    artifact = export_model(checkpoint, tmp_path / "a", precisions=FP32)
    report = artifact.manifest.verification["fp32"]
    assert "numpy" in report["reference"]
    assert report["min_cosine"] > 0.99999
    model = "onnx/model.onnx"
    assert (tmp_path / "a" / model).read_bytes() == (exported / model).read_bytes()


# Tokenizers


def test_a_vocabulary_alone_gives_the_same_ids(tmp_path, exported):
    directory = write_checkpoint(tmp_path / "c")
    (directory / "tokenizer.json").unlink()
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    texts = [*TEXTS, "[CLS] water [SEP] [MASK] river", "Üñï WATER\tsolar\u200b  energy…", "(a-b)"]
    ours, expected = Embedder(artifact).token_ids(texts), Embedder(exported).token_ids(texts)
    assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_tokenizer_alone_gives_the_vocabulary(tmp_path):
    directory = write_checkpoint(tmp_path / "c")
    (directory / "vocab.txt").unlink()
    export_model(directory, tmp_path / "a", precisions=FP32)
    assert (tmp_path / "a/vocab.txt").read_text().splitlines() == VOCABULARY


def test_a_cased_vocabulary_stays_cased(tmp_path):
    directory = write_checkpoint(tmp_path / "c")
    (directory / "tokenizer.json").unlink()
    config = read(directory / "tokenizer_config.json")
    write_json(directory / "tokenizer_config.json", config | {"do_lower_case": False})
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    upper, lower = Embedder(artifact).token_ids(["WATER", "water"])
    assert VOCABULARY.index("[UNK]") in upper
    assert VOCABULARY.index("water") in lower


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "Bark", "vocab": {}}}'),
        ("vocab.txt", ""),
        ("vocab.txt", "water\nriver\n"),
        ("vocab.txt", "\xff\xfe"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_an_unusable_tokenizer_names_its_file_in_the_checkpoint(tmp_path, name, text):
    directory = write_checkpoint(tmp_path / "c")
    if name == "vocab.txt":
        (directory / "tokenizer.json").unlink()
    (directory / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=re.escape(str(directory / name))):
        export_model(directory, tmp_path / "a", precisions=FP32)
    assert names(tmp_path) == ["c"]


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path):
    directory = write_checkpoint(tmp_path / "c")
    more = [*VOCABULARY, "new", "words"]
    write_json(directory / "tokenizer.json", tokenizer_json(more))
    with pytest.raises(CheckpointError, match=rf"{len(more)}.* vocab_size {len(VOCABULARY)}"):
        export_model(directory, tmp_path / "a", precisions=FP32)


DENSE = {"linear.weight": (16, 32), "linear.bias": (16,)}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_dense_module_that_is_not_finite_names_the_tensor(tmp_path, name, value):
    directory = write_checkpoint(tmp_path / "c", dense=True)
    tensors = {key: np.ones(shape, np.float32) for key, shape in DENSE.items()}
    tensors[name].flat[0] = value
    save_file(tensors, directory / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}' in .*2_Dense.* holds NaN or infinite"):
        export_model(directory, tmp_path / "a", precisions=FP32)


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_module_of_another_shape_is_refused(tmp_path, name):
    directory = write_checkpoint(tmp_path / "c", dense=True)
    tensors = {key: np.ones(shape, np.float32) for key, shape in DENSE.items()}
    save_file(tensors | {name: np.ones(7, np.float32)}, directory / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match="2_Dense"):
        export_model(directory, tmp_path / "a", precisions=FP32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "torch.nn.Mish"}, "activation 'torch.nn.Mish' is not one of"),
        ({"use_residual": True}, "residual is not supported"),
    ],
)
def test_a_dense_module_that_cannot_be_exported_says_why(tmp_path, change, message):
    directory = write_checkpoint(tmp_path / "c", dense=True)
    write_json(directory / "2_Dense/config.json", read(directory / "2_Dense/config.json") | change)
    with pytest.raises(CheckpointError, match=f"2_Dense.*{message}"):
        export_model(directory, tmp_path / "a", precisions=FP32)


def test_a_dense_module_of_another_width_says_both(tmp_path):
    directory = write_checkpoint(tmp_path / "c", dense=True, pooling="cls+mean")
    write_json(directory / "1_Pooling/config.json", {"pooling_mode": "cls"})
    with pytest.raises(CheckpointError, match=r"2_Dense takes 64 features.* outputs 32"):
        export_model(directory, tmp_path / "a", precisions=FP32)


@pytest.mark.parametrize("name", ["odd: name", 'a "quoted" name', "# a name", "日本語"])
def test_the_card_s_header_is_valid_whatever_the_name(tmp_path, name):
    directory = write_checkpoint(tmp_path / name)
    export_model(directory, tmp_path / "a", precisions=FP32)
    header = (tmp_path / "a/README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(header)["base_model"] == name


# Where it is written


def test_an_existing_artifact_is_kept_without_force(copy, checkpoint):
    before = contents(copy)
    with pytest.raises(FileExistsError, match=r"artifact exists; replace it with --force"):
        export_model(checkpoint, copy, precisions=FP32)
    assert contents(copy) == before


def test_an_existing_artifact_is_replaced_with_force(copy, checkpoint):
    (copy / "stray.txt").write_text("of the old artifact")
    export_model(checkpoint, copy, precisions=FP32, force=True)
    assert set(contents(copy)) == FILES
    assert names(copy.parent) == ["artifact"]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("kind", ["directory", "file", "checkpoint"])
def test_what_is_no_artifact_is_never_replaced(tmp_path, checkpoint, force, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("notes")
    elif kind == "checkpoint":
        shutil.copytree(checkpoint, target)
    else:
        target.mkdir()
        (target / "notes.txt").write_text("notes")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"precious exists and is not an artifact"):
        export_model(checkpoint, target, precisions=FP32, force=force)
    assert contents(tmp_path) == before


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a/b/c"):
        assert set(contents(export_model(checkpoint, target, precisions=FP32).directory)) == FILES


def test_a_relative_target_and_a_text_are_fine(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_model(str(checkpoint), "out", precisions=FP32)
    assert set(contents(tmp_path / "out")) == FILES


def test_the_artifact_is_readable_by_others(exported):
    umask = os.umask(0)
    os.umask(umask)
    assert exported.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("inside", ["out", "a/out"])
def test_an_unwritable_target_is_an_error_that_names_it(tmp_path, checkpoint, inside):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        export_model(checkpoint, tmp_path / "file" / inside, precisions=FP32)
    assert names(tmp_path) == ["file"]


STAGES = ["write_configs", "build_encoder", "write_card", "verify_fp32"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_midway_leaves_what_was_there(
    copy, checkpoint, monkeypatch, stage, error, existing
):
    def fail(*args, **kwargs):
        raise error

    if not existing:
        shutil.rmtree(copy)
    before = contents(copy.parent)
    monkeypatch.setattr(build, stage, fail)
    with pytest.raises(error):
        export_model(checkpoint, copy, precisions=FP32, force=True)
    assert contents(copy.parent) == before
    assert names(copy.parent) == (["artifact"] if existing else [])


HANG = """
import sys, time
from pathlib import Path
sys.modules["transformers"] = None  # the reference is numpy: PyTorch takes seconds to import
from onnxsim_embed.export import build, export_model, verify, verify_artifact, verify_recipe

def hang(*args, **options):
    Path(sys.argv[3]).touch()
    time.sleep(60)

build.verify_fp32 = hang
export_model(sys.argv[1], sys.argv[2], precisions=["fp32"], force=True)
"""


def test_a_killed_export_leaves_the_old_artifact(copy, checkpoint, tmp_path):
    before = contents(copy)
    reached = tmp_path / "reached"
    command = [sys.executable, "-c", HANG, str(checkpoint), str(copy), str(reached)]
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + 60
            while not reached.exists() and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert contents(copy) == before
    assert Embedder(copy).encode("water").shape == (32,)
    export_model(checkpoint, copy, precisions=FP32, force=True)  # what is left is in nobody's way
    assert set(contents(copy)) == FILES


# The proof


def corrupt_words(bert):
    return replace(bert, words=np.roll(bert.words, 1, axis=0))


def drop_a_layer(bert):
    return replace(bert, layers=bert.layers[:-1])


def scale_one_norm(bert):
    layer = bert.layers[0]
    norm = replace(layer.norm, weight=layer.norm.weight * np.float32(1.1))
    return replace(bert, layers=(replace(layer, norm=norm), *bert.layers[1:]))


def corrupt_graphs(monkeypatch, corrupt, layouts=("portable", "run")) -> None:
    """Make exports build their graphs of these layouts from spoilt weights."""
    build_encoder = build.build_encoder

    def spoilt(bert, layout="portable", *args, **options):
        made = corrupt(bert) if layout in layouts else bert
        return build_encoder(made, layout, *args, **options)

    monkeypatch.setattr(build, "build_encoder", spoilt)


@pytest.mark.parametrize("corrupt", [corrupt_words, drop_a_layer, scale_one_norm])
@pytest.mark.parametrize("torch", [True, False], ids=["torch", "numpy"])
def test_an_unfaithful_export_is_refused_with_numbers(
    checkpoint, tmp_path, monkeypatch, corrupt, torch
):
    corrupt_graphs(monkeypatch, corrupt)
    if not torch:
        monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VerificationError, match=r"fp32 .*mean cosine -?0\.\d+.*min -?0\.\d+"):
        export_model(checkpoint, tmp_path / "a", precisions=FP32)
    assert names(tmp_path) == []


@pytest.mark.parametrize("layout", ["portable", "run"])
def test_one_unfaithful_file_of_two_is_enough(checkpoint, tmp_path, monkeypatch, layout):
    corrupt_graphs(monkeypatch, scale_one_norm, [layout])
    with pytest.raises(VerificationError, match=r"fp32 .*cosine -?0\.\d+"):
        export_model(checkpoint, tmp_path / "a", precisions=FP32)
    assert names(tmp_path) == []


def test_an_unfaithful_export_keeps_the_old_artifact(copy, checkpoint, monkeypatch):
    before = contents(copy)
    corrupt_graphs(monkeypatch, corrupt_words)
    with pytest.raises(VerificationError):
        export_model(checkpoint, copy, precisions=FP32, force=True)
    assert contents(copy) == before


def test_a_model_that_misses_its_known_answers_is_refused(checkpoint, tmp_path):
    with pytest.raises(VerificationError, match=r"cosine_matrix published by .* is off by 0\.\d+"):
        export_model(
            checkpoint, tmp_path / "a", precisions=FP32, recipe=find_recipe("all-MiniLM-L6-v2")
        )
    assert names(tmp_path) == []


def test_a_missing_extra_is_one_line_with_the_pip_command(checkpoint, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else find(name, *a)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'onnxsim-embed\[export\]'") as caught:
        export_model(checkpoint, tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("model_type", ["roberta", "mpnet", "xlm-roberta"])
@pytest.mark.parametrize("via", ["auto", "optimum"])
def test_another_architecture_without_optimum_is_one_line_with_the_pip_command(
    tmp_path, model_type, via, monkeypatch
):
    monkeypatch.setitem(sys.modules, "optimum", None)
    directory = write_checkpoint(tmp_path / "c", config=bert_config(model_type=model_type))
    with pytest.raises(MissingExtraError, match=rf"'{model_type}'.*onnxsim-embed\[optimum\]") as e:
        export_model(directory, tmp_path / "a", precisions=FP32, via=via)
    assert "\n" not in str(e.value)
    assert names(tmp_path) == ["c"]


def test_a_configuration_without_an_architecture_is_named(tmp_path):
    directory = write_checkpoint(tmp_path / "c", config=bert_config(model_type=None))
    with pytest.raises(CheckpointError, match="architecture None"):
        export_model(directory, tmp_path / "a", precisions=FP32)


def test_only_bert_is_built_directly(tmp_path):
    directory = write_checkpoint(tmp_path / "c", config=bert_config(model_type="mpnet"))
    with pytest.raises(CheckpointError, match=r"architecture 'mpnet' .*via='optimum'"):
        export_model(directory, tmp_path / "a", precisions=FP32, via="direct")


def test_an_unknown_way_names_those_there_are(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"'torch'.*auto, direct, optimum, adopt"):
        export_model(checkpoint, tmp_path / "a", via="torch")


# What the caller adds


def test_a_prompt_of_the_caller_s_joins_those_of_the_checkpoint(checkpoint, tmp_path):
    given = {"document": "the text of "}
    artifact = export_model(checkpoint, tmp_path / "a", precisions=FP32, prompts=given)
    assert artifact.manifest.prompts == {"query": "a dog ", **given}
    model = Embedder(artifact)
    assert np.array_equal(model.encode_document("water"), model.encode("the text of water"))


def test_a_length_of_the_caller_s_wins(checkpoint, tmp_path):
    artifact = export_model(checkpoint, tmp_path / "a", precisions=FP32, max_seq_length=60)
    assert artifact.manifest.max_seq_length == 60
    assert read(tmp_path / "a/sentence_bert_config.json")["max_seq_length"] == 60
    assert len(Embedder(artifact).token_ids(["water " * 100])[0]) == 60


@pytest.mark.parametrize("length", [2, 65, -1, 8.0, True])
def test_a_length_that_the_model_does_not_have_is_refused(checkpoint, tmp_path, length):
    with pytest.raises(ValueError, match=f"from 3 to 64 .*{length}"):
        export_model(checkpoint, tmp_path / "a", precisions=FP32, max_seq_length=length)
    assert names(tmp_path) == []


def test_widths_to_be_cut_to_are_recorded(checkpoint, tmp_path):
    artifact = export_model(checkpoint, tmp_path / "a", precisions=FP32, matryoshka_dims=[8, 16, 8])
    assert artifact.manifest.matryoshka_dims == (16, 8)
    assert Artifact.open(tmp_path / "a").manifest == artifact.manifest
    assert Embedder(artifact).matryoshka_dims == (16, 8)


@pytest.mark.parametrize("width", [0, 33, 8.0, True])
def test_impossible_widths_are_refused(checkpoint, tmp_path, width):
    with pytest.raises(ValueError, match=f"matryoshka_dims.*{width}"):
        export_model(checkpoint, tmp_path / "a", precisions=FP32, matryoshka_dims=[width])
    assert names(tmp_path) == []


# fp16


@pytest.fixture(scope="module")
def halved(few_texts, checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint's artifact with fp16. Read-only."""
    target = tmp_path_factory.mktemp("halved") / "tiny"
    export_model(checkpoint, target, precisions=["fp32", "fp16"])
    return target


def test_fp16_is_half_the_size_and_close(halved):
    manifest = Artifact.open(halved).manifest
    sizes = {k: manifest.files[e.file].size for k, e in manifest.precisions.items()}
    assert sizes["fp16"] < 0.7 * sizes["fp32"]
    report = manifest.verification["fp16"]
    assert report["problems"] == []
    assert 0.9999 < report["min_cosine"] <= 1
    assert report["batch_variant"] is None
    assert "fp16" in (halved / "README.md").read_text()


def test_fp16_keeps_the_interface_of_fp32(halved):
    import onnx

    full, half = (onnx.load(halved / MODEL_FILES[p]) for p in ("fp32", "fp16"))
    for part in ("input", "output"):
        ours, theirs = ([e.name for e in getattr(m.graph, part)] for m in (full, half))
        assert ours == theirs
    assert half.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in half.graph.initializer)


def test_an_unfaithful_fp16_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(verify.FIDELITY_THRESHOLDS, "fp16", (1.1, 1.1))
    with pytest.raises(VerificationError, match="fp16 is not faithful to fp32"):
        export_model(checkpoint, tmp_path / "a", precisions=["fp16"])
    assert names(tmp_path) == []


def test_verifying_an_artifact_with_fp16_reports_it(halved):
    report = verify_artifact(Artifact.open(halved), texts=TEXTS[:6])
    assert report["fp16"]["problems"] == []


# Recipes


def test_a_recipe_that_is_not_reproduced_is_reported(checkpoint, monkeypatch):
    recipe = find_recipe("all-MiniLM-L6-v2")
    monkeypatch.setattr(
        "onnxsim_embed.artifact.cache.locate_checkpoint", lambda *a, **k: (checkpoint, recipe)
    )
    problems = verify_recipe(recipe)["problems"]
    assert any("cosine_matrix published by" in problem for problem in problems)


@pytest.mark.real
def test_the_recipe_of_minilm_is_reproduced(real_checkpoint):
    report = verify_recipe(find_recipe("all-MiniLM-L6-v2"))
    assert (report["problems"], report["known_answers"]) == ([], 8)
