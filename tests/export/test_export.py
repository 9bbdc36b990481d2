"""Exports: complete, faithful and readable by other libraries, or not written at all."""

import os
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
    read_json,
    write_checkpoint,
    write_json,
)

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import MANIFEST, MODEL_FILES, PRECISIONS, Artifact
from onnxsim_embed.artifact.precision import choose_precision
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


def test_fp32_and_int8_vectors_are_close(artifact):
    opened = Artifact.open(artifact)
    assert set(opened.manifest.precisions) == set(PRECISIONS)
    opened.check()
    fp32, int8 = (Embedder(opened, precision=p).encode(TEXTS) for p in ("fp32", "int8"))
    assert np.einsum("ij,ij->i", fp32, int8).min() > 0.9


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
        ('a "quoted" name', "---\ntags: [x]\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("# a name", "---\nlicense: 'mit'\n---\n\n# A model", "mit"),
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
    if "+" in options.get("pooling", ""):  # an order of concatenation that booleans may not imply
        shutil.copyfile(directory / "model.safetensors", tmp_path / "a/model.safetensors")
        assert np.abs(reference_vectors(tmp_path / "a", TEXTS) - expected).max() < 1e-6


@pytest.mark.parametrize("dense", [False, True])
def test_a_model_saved_by_the_installed_sentence_transformers_is_exported(tmp_path, dense):
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


def test_verification_ignores_a_default_prompt(tmp_path):
    directory = write_checkpoint(tmp_path / "c", prompts={"query": "the river of "})
    path = directory / "config_sentence_transformers.json"
    change_json(path, default_prompt_name="query")
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


@pytest.mark.parametrize("kind", ["directory", "file", "checkpoint"])
def test_a_target_that_is_not_an_artifact_is_never_replaced(tmp_path, checkpoint, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("notes")
    elif kind == "checkpoint":
        shutil.copytree(checkpoint, target)
    else:
        target.mkdir()
        (target / "notes.txt").write_text("notes")
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


def test_the_artifact_is_readable_by_others(exported):
    umask = os.umask(0)
    os.umask(umask)
    assert exported.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("inside", ["out", "a/out"])
def test_an_unwritable_target_is_named(tmp_path, checkpoint, inside):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        export_model(checkpoint, tmp_path / "file" / inside, precisions=FP32)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("stage", ["write_configs", "build_encoder", "write_card", "verify_fp32"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_the_target_unchanged(
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


def permute_words(bert):
    return replace(bert, words=np.roll(bert.words, 1, axis=0))


def drop_a_layer(bert):
    return replace(bert, layers=bert.layers[:-1])


def scale_one_norm(bert):
    layer = bert.layers[0]
    norm = replace(layer.norm, weight=layer.norm.weight * np.float32(1.1))
    return replace(bert, layers=(replace(layer, norm=norm), *bert.layers[1:]))


def corrupt_graphs(monkeypatch, corrupt, layouts=("portable", "run")) -> None:
    """Make exports build their graphs of these layouts from corrupted weights."""
    build_encoder = build.build_encoder

    def corrupted(bert, layout="portable", *args, **options):
        bert = corrupt(bert) if layout in layouts else bert
        return build_encoder(bert, layout, *args, **options)

    monkeypatch.setattr(build, "build_encoder", corrupted)


@pytest.mark.parametrize(
    ("corrupt", "layouts"),
    [
        (permute_words, ["portable", "run"]),
        (drop_a_layer, ["portable", "run"]),
        (scale_one_norm, ["portable", "run"]),
        (scale_one_norm, ["portable"]),
        (scale_one_norm, ["run"]),
    ],
)
@pytest.mark.parametrize("torch", [True, False], ids=["torch", "numpy"])
def test_an_unfaithful_export_fails_with_numbers(
    copy, checkpoint, monkeypatch, corrupt, layouts, torch
):
    before = contents(copy.parent)
    corrupt_graphs(monkeypatch, corrupt, layouts)
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


def test_fp16_is_chosen_on_cuda_and_rejected_on_the_cpu(half):
    opened = Artifact.open(half)
    for precision in ("auto", "fp16"):
        assert choose_precision(opened, precision, "CUDAExecutionProvider") == "fp16"
    for provider in ("CPUExecutionProvider", "OpenVINOExecutionProvider"):
        assert choose_precision(opened, "auto", provider) == "fp32"
    for device in ("cpu", "auto"):
        with pytest.raises(ValueError, match=r"'fp16'.*precision='auto'"):
            Embedder(half, precision="fp16", device=device)


def test_an_unfaithful_fp16_fails_the_export(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(fidelity.FIDELITY_THRESHOLDS, "fp16", (1.1, 1.1))
    with pytest.raises(VerificationError, match="fp16 is not faithful to fp32"):
        export_model(checkpoint, tmp_path / "a", precisions=["fp16"])
    assert names(tmp_path) == []
    made = export_model(checkpoint, tmp_path / "a", precisions=["fp16"], skip_unfaithful=True)
    assert list(made.manifest.precisions) == ["fp32"]
    assert made.manifest.verification["fp16"]["problems"]
    assert not (tmp_path / "a" / MODEL_FILES["fp16"]).exists()


@pytest.mark.parametrize(
    ("scale", "fits"), [(1, True), (1e4, True), (1e6, False)], ids=["small", "large", "too large"]
)
def test_fp16_of_hidden_states_beyond_its_range_is_rejected(few_texts, tmp_path, scale, fits):
    """65,504 is float16's largest number; the last norm makes a hidden state of any size."""
    config = bert_config(layer_norm_eps=1e-12)
    tensors = bert_tensors(config)
    last = f"encoder.layer.{config['num_hidden_layers'] - 1}.output.LayerNorm"
    for name in tensors:
        if last in name:
            tensors[name] *= np.float32(scale)
    checkpoint = write_checkpoint(tmp_path / "c", config=config, tensors=tensors)
    if fits:
        made = export_model(checkpoint, tmp_path / "a", precisions=["fp32", "fp16"])
        assert made.manifest.verification["fp16"]["min_cosine"] > 0.999
        return
    with pytest.raises(VerificationError, match=r"float16's largest number, 65,504"):
        export_model(checkpoint, tmp_path / "a", precisions=["fp32", "fp16"])
