"""Exports: complete, faithful and readable by other libraries, or not written at all."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from support import (
    TEXTS,
    VOCABULARY,
    bert_config,
    bert_tensors,
    change_json,
    contents,
    names,
    read_json,
    sentence_transformer,
    write_checkpoint,
    write_json,
)

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import MANIFEST, MODEL_FILES, Artifact
from onnxsim_embed.artifact.recipes import find_recipe
from onnxsim_embed.errors import CheckpointError, MissingExtraError, VerificationError
from onnxsim_embed.export import build, export_model, fidelity, verify_artifact, verify_recipe
from onnxsim_embed.export.checkpoint import open_checkpoint

FILES = {
    "onnx/model.onnx", "onnx/encoder.onnx", "config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "modules.json", "1_Pooling/config.json", "README.md",
    "sentence_bert_config.json", "config_sentence_transformers.json", MANIFEST,
}  # fmt: skip
FP32 = ["fp32"]

pytestmark = pytest.mark.usefixtures("few_texts")


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


# Files


def test_the_manifest_lists_every_file_and_the_facts(exported, checkpoint):
    assert set(contents(exported)) == FILES
    assert (exported / "2_Normalize").is_dir()
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


@pytest.mark.parametrize("precisions", [[], ["fp32", "fp32"]])
def test_fp32_is_always_written(checkpoint, tmp_path, precisions):
    artifact = export_model(checkpoint, tmp_path / "a", precisions=precisions)
    assert list(artifact.manifest.precisions) == ["fp32"]


def test_the_tokenizer_has_no_length_and_no_padding(exported):
    tokenizer = read_json(exported / "tokenizer.json")
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    config = read_json(exported / "tokenizer_config.json")
    assert config["model_max_length"] == 48
    assert "max_length" not in config
    assert (config["pad_token"], config["tokenizer_class"]) == ("[PAD]", "BertTokenizer")
    assert read_json(exported / "special_tokens_map.json") == {
        f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")
    }
    assert (exported / "vocab.txt").read_text().splitlines() == VOCABULARY


@pytest.mark.parametrize("schema", ["legacy", "new"])
def test_configs_have_the_legacy_schema(tmp_path, schema):
    prompts = {"query": "a dog "}
    directory = write_checkpoint(
        tmp_path / "c", pooling="cls", dense=True, schema=schema, prompts=prompts
    )
    artifact = export_model(directory, tmp_path / "a", precisions=FP32).directory
    modes = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens",
             "weightedmean_tokens", "lasttoken")  # fmt: skip
    booleans = {f"pooling_mode_{mode}": mode == "cls_token" for mode in modes}
    pooling = {"word_embedding_dimension": 32, **booleans, "include_prompt": True}
    assert read_json(artifact / "1_Pooling/config.json") == pooling
    lengths = {"max_seq_length": 48, "do_lower_case": False}
    assert read_json(artifact / "sentence_bert_config.json") == lengths
    main = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    assert read_json(artifact / "config_sentence_transformers.json") == main
    assert [(m["idx"], m["path"], m["type"]) for m in read_json(artifact / "modules.json")] == [
        (0, "", "sentence_transformers.models.Transformer"),
        (1, "1_Pooling", "sentence_transformers.models.Pooling"),
        (2, "2_Dense", "sentence_transformers.models.Dense"),
        (3, "3_Normalize", "sentence_transformers.models.Normalize"),
    ]
    assert read_json(artifact / "2_Dense/config.json")["out_features"] == 16
    assert (artifact / "2_Dense/model.safetensors").is_file()
    assert read_json(artifact / "config.json") == read_json(directory / "config.json")


def test_the_card_states_facts_and_fidelity(exported, checkpoint):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\n")
    for fact in (checkpoint.name, "32 dimensions", "mean pooling", "at most 48 tokens", "PyTorch"):
        assert fact in card


@pytest.mark.parametrize(
    ("name", "card", "licence"),
    [
        ("odd: name", None, None),
        ('# a "quoted" name', "---\ntags: [x]\nlicense: 'mit'\n---\n\n# A model", "mit"),
        ("日本語", "# A model\nlicense: mit\n", None),
    ],
)
def test_the_header_of_the_card_is_valid_yaml_and_states_the_licence(tmp_path, name, card, licence):
    directory = write_checkpoint(tmp_path / name)
    if card:
        (directory / "README.md").write_text(card, encoding="utf-8")
    export_model(directory, tmp_path / "a", precisions=FP32)
    header = (tmp_path / "a/README.md").read_text(encoding="utf-8").split("---\n")[1]
    table = yaml.safe_load(header)
    assert (table["base_model"], table.get("license")) == (name, licence)


def test_a_licence_that_the_checkpoint_does_not_state_is_the_recipes(checkpoint):
    recipe = find_recipe("all-MiniLM-L6-v2")
    assert open_checkpoint(checkpoint, recipe=recipe).licence == "apache-2.0"


def test_two_exports_of_one_checkpoint_are_equal_to_the_byte(checkpoint, exported, tmp_path):
    export_model(checkpoint, tmp_path / "again", precisions=FP32)
    assert contents(tmp_path / "again") == contents(exported)


# Vectors


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "mean+cls+max", "schema": "legacy"},
        {"pooling": "mean+cls+max", "schema": "new"},
        {"config": bert_config(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                               num_hidden_layers=1), "pooling": "cls"},
    ],
    ids=["legacy", "new", "bge"],
)  # fmt: skip
def test_vectors_equal_those_of_sentence_transformers(tmp_path, options):
    directory = write_checkpoint(tmp_path / "c", **options)
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    vectors = Embedder(artifact).encode(TEXTS)
    expected = sentence_transformer(directory).encode(TEXTS)
    assert vectors.shape == expected.shape
    assert np.abs(vectors - expected).max() < 1e-5
    if "+" in options["pooling"]:  # an order of concatenation that booleans may not imply
        shutil.copyfile(directory / "model.safetensors", tmp_path / "a/model.safetensors")
        exported = sentence_transformer(tmp_path / "a").encode(TEXTS)
        assert np.abs(exported - expected).max() < 1e-6


def test_a_model_saved_by_the_installed_sentence_transformers_is_exported(tmp_path):
    directory = write_checkpoint(tmp_path / "c", dense=True, prompts={"query": "a dog "})
    model = sentence_transformer(directory)
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
    modules = read_json(directory / "modules.json")
    modules[0]["path"] = "0_Transformer"
    write_json(directory / "modules.json", modules)
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    assert np.array_equal(Embedder(artifact).encode(TEXTS), Embedder(exported).encode(TEXTS))


def test_the_pooling_argument_is_written(tmp_path):
    directory = write_checkpoint(tmp_path / "c", pooling=None)
    artifact = export_model(directory, tmp_path / "a", precisions=FP32, pooling="cls")
    assert artifact.manifest.pooling == ("cls",)
    assert not artifact.manifest.normalize
    assert read_json(tmp_path / "a/1_Pooling/config.json")["pooling_mode_cls_token"] is True


def test_half_precision_weights_export(tmp_path):
    config = bert_config(torch_dtype="float16", dtype="float16")
    tensors = {name: value.astype(np.float16) for name, value in bert_tensors(config).items()}
    directory = write_checkpoint(tmp_path / "c", config=config, tensors=tensors)
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    assert artifact.manifest.verification["fp32"]["min_cosine"] > 0.99999


def test_verification_ignores_a_default_prompt(tmp_path):
    directory = write_checkpoint(tmp_path / "c", prompts={"query": "the river of "})
    path = directory / "config_sentence_transformers.json"
    change_json(path, default_prompt_name="query")
    artifact = export_model(directory, tmp_path / "a", precisions=FP32)
    expected = sentence_transformer(directory).encode(TEXTS)
    assert np.abs(Embedder(artifact).encode(TEXTS) - expected).max() < 1e-5


# The target


def test_an_existing_artifact_is_replaced_only_with_force(copy, checkpoint):
    before = contents(copy)
    with pytest.raises(FileExistsError, match="force"):
        export_model(checkpoint, copy, precisions=FP32)
    assert contents(copy) == before
    (copy / "stray.txt").write_text("of the old artifact")
    export_model(checkpoint, copy, precisions=FP32, force=True)
    assert set(contents(copy)) == FILES
    assert names(copy.parent) == ["artifact"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_target_that_is_not_an_artifact_is_never_replaced(tmp_path, checkpoint, kind):
    target = tmp_path / "precious"
    (target if kind == "file" else target / "notes.txt").parent.mkdir(exist_ok=True)
    (target if kind == "file" else target / "notes.txt").write_text("notes")
    before = contents(tmp_path)
    for force in (True, False):
        with pytest.raises(FileExistsError, match="precious exists and is not an artifact"):
            export_model(checkpoint, target, precisions=FP32, force=force)
    assert contents(tmp_path) == before


def test_targets_may_be_empty_nested_or_relative(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a/b/c", "relative"):
        export_model(str(checkpoint), target, precisions=FP32)
        assert set(contents(tmp_path / target)) == FILES


@pytest.mark.parametrize("inside", ["out", "a/out"])
def test_an_unwritable_target_is_named(tmp_path, checkpoint, inside):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        export_model(checkpoint, tmp_path / "file" / inside, precisions=FP32)
    assert names(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
sys.modules["transformers"] = None  # the reference is numpy: PyTorch takes seconds to import
from onnxsim_embed.export import build, export_model

build.verify_fp32 = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
export_model(sys.argv[1], sys.argv[2], precisions=["fp32"], force=True)
"""


def test_a_killed_export_leaves_the_old_artifact(copy, checkpoint):
    before = contents(copy)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), str(copy)])
    assert killed.returncode == -signal.SIGKILL
    assert contents(copy) == before
    export_model(checkpoint, copy, precisions=FP32, force=True)
    assert set(contents(copy)) == FILES


# Verification


def scale_one_norm(bert):
    layer = bert.layers[0]
    norm = replace(layer.norm, weight=layer.norm.weight * np.float32(1.1))
    return replace(bert, layers=(replace(layer, norm=norm), *bert.layers[1:]))


@pytest.mark.parametrize("layouts", [["portable", "run"], ["portable"], ["run"]])
@pytest.mark.parametrize("torch", [True, False], ids=["torch", "numpy"])
def test_an_unfaithful_export_fails_with_numbers(copy, checkpoint, monkeypatch, layouts, torch):
    before, build_encoder = contents(copy.parent), build.build_encoder

    def corrupted(bert, layout="portable"):
        return build_encoder(scale_one_norm(bert) if layout in layouts else bert, layout)

    monkeypatch.setattr(build, "build_encoder", corrupted)
    if not torch:
        monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VerificationError, match=r"fp32 .*cosine -?0\.\d+"):
        export_model(checkpoint, copy, precisions=FP32, force=True)
    assert contents(copy.parent) == before


def test_a_model_that_misses_its_known_answers_fails(checkpoint, tmp_path, monkeypatch):
    recipe = find_recipe("all-MiniLM-L6-v2")
    with pytest.raises(VerificationError, match=r"cosine_matrix published by .* is off by 0\.\d+"):
        export_model(checkpoint, tmp_path / "a", precisions=FP32, recipe=recipe)
    assert names(tmp_path) == []
    monkeypatch.setattr(
        "onnxsim_embed.export.api.locate_checkpoint", lambda *a, **k: (checkpoint, recipe)
    )
    assert any("cosine_matrix" in problem for problem in verify_recipe(recipe)["problems"])


# Arguments


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    monkeypatch.setattr("onnxsim_embed.export.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[export\]'"):
        from onnxsim_embed.export import export_model  # noqa: F401


@pytest.mark.parametrize(
    ("kind", "via", "message"), [(None, "auto", "None"), ("albert", "direct", "'albert' .*'torch'")]
)
def test_only_bert_is_built_directly(tmp_path, kind, via, message):
    directory = write_checkpoint(tmp_path / "c", config=bert_config(model_type=kind))
    with pytest.raises(CheckpointError, match=message):
        export_model(directory, tmp_path / "a", precisions=FP32, via=via)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precisions": ["fp8"]}, "precision 'fp8'; known are fp32, int8"),
        ({"precisions": "int8"}, "precision 'i'"),
        ({"via": "magic"}, "'magic'.*auto, direct, torch, optimum, adopt"),
        ({"pooling": "median"}, "pooling 'median'"),
        *(({"max_seq_length": n}, f"from 3 to 64 .*{n}") for n in (2, 65, -1, 8.0, True)),
        *(({"matryoshka_dims": [n]}, f"matryoshka_dims.*{n}") for n in (0, 33, 8.0, True)),
    ],
)
def test_invalid_arguments_are_named_and_nothing_is_written(
    checkpoint, tmp_path, arguments, message
):
    with pytest.raises(ValueError, match=message):
        export_model(checkpoint, tmp_path / "a", **({"precisions": FP32} | arguments))
    assert names(tmp_path) == []


def test_arguments_override_the_checkpoint(checkpoint, tmp_path):
    artifact = export_model(
        checkpoint,
        tmp_path / "a",
        precisions=FP32,
        prompts={"document": "the text of "},
        max_seq_length=60,
        matryoshka_dims=[8, 16, 8],
    )
    model = Embedder(artifact)
    assert artifact.manifest.prompts == {"query": "a dog ", "document": "the text of "}
    assert np.array_equal(model.encode_document("water"), model.encode("the text of water"))
    assert artifact.manifest.max_seq_length == 60
    assert read_json(tmp_path / "a/sentence_bert_config.json")["max_seq_length"] == 60
    assert len(model.token_ids(["water " * 100])[0]) == 60
    assert model.matryoshka_dims == artifact.manifest.matryoshka_dims == (16, 8)
    assert Artifact.open(tmp_path / "a").manifest == artifact.manifest


def test_bar_is_a_deprecated_name_of_min_fidelity(checkpoint, artifact, tmp_path):
    with pytest.warns(DeprecationWarning, match="min_fidelity"), pytest.raises(VerificationError):
        export_model(checkpoint, tmp_path / "a", precisions=["int8"], bar=(1.1, 1.1))
    with pytest.warns(DeprecationWarning, match="min_fidelity"):
        report = verify_artifact(Artifact.open(artifact), texts=TEXTS, bar=(1.1, 1.1))
    assert "int8 is not faithful to fp32" in report["int8"]["problems"][0]


# fp16


def test_fp16_is_smaller_close_and_has_the_interface_of_fp32(half):
    manifest = Artifact.open(half).manifest
    sizes = {k: manifest.files[e.file].size for k, e in manifest.precisions.items()}
    assert sizes["fp16"] < 0.7 * sizes["fp32"]
    report = manifest.verification["fp16"]
    assert report["problems"] == verify_artifact(Artifact.open(half))["fp16"]["problems"] == []
    assert 0.9999 < report["min_cosine"] <= 1
    assert 0.9999 < report["run_path_min_cosine"] <= 1
    assert report["batch_variant"] is None
    run_path = half / manifest.precisions["fp16"].encoder  # refers to the weights of the other file
    assert run_path.stat().st_size < (half / MODEL_FILES["fp16"]).stat().st_size
    assert "fp16" in (half / "README.md").read_text()
    full, small = (onnx.load(half / MODEL_FILES[p]).graph for p in ("fp32", "fp16"))
    for kind in ("input", "output"):
        assert [e.name for e in getattr(full, kind)] == [e.name for e in getattr(small, kind)]
    assert small.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in small.initializer)


def test_an_unfaithful_fp16_fails_the_export(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(fidelity.FIDELITY_THRESHOLDS, "fp16", (1.1, 1.1))
    with pytest.raises(VerificationError, match="fp16 is not faithful to fp32"):
        export_model(checkpoint, tmp_path / "a", precisions=["fp16"])
    assert names(tmp_path) == []


@pytest.mark.parametrize(("scale", "fits"), [(1e4, True), (1e6, False)])
def test_fp16_of_hidden_states_beyond_its_range_fails_or_is_skipped(tmp_path, scale, fits):
    """65,504 is float16's largest number; the last norm makes a hidden state of any size."""
    config = bert_config(layer_norm_eps=1e-12)
    tensors = bert_tensors(config)
    last = f"encoder.layer.{config['num_hidden_layers'] - 1}.output.LayerNorm"
    for name in tensors:
        if last in name:
            tensors[name] *= np.float32(scale)
    checkpoint = write_checkpoint(tmp_path / "c", config=config, tensors=tensors)
    if fits:
        made = export_model(checkpoint, tmp_path / "a", precisions=["fp16"])
        assert made.manifest.verification["fp16"]["min_cosine"] > 0.999
        return
    with pytest.raises(VerificationError, match=r"float16's largest number, 65,504"):
        export_model(checkpoint, tmp_path / "a", precisions=["fp16"])
    assert names(tmp_path) == ["c"]
    made = export_model(checkpoint, tmp_path / "a", precisions=["fp16"], skip_unfaithful=True)
    assert list(made.manifest.precisions) == ["fp32"]
    assert "65,504" in made.manifest.verification["fp16"]["problems"][0]
    assert not (tmp_path / "a" / MODEL_FILES["fp16"]).exists()
