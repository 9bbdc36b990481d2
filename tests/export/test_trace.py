"""Architectures that are traced: the same artifact, compared with PyTorch."""

import functools
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support import (
    TEXTS,
    VOCABULARY,
    bert_config,
    change_json,
    tokenizer_json,
    write_checkpoint,
    write_json,
)

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import MODEL_FILES, Artifact
from onnxsim_embed.errors import CheckpointError, MissingExtraError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.api import resolve_via
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.onnx import files
from onnxsim_embed.export.onnx import trace as module
from onnxsim_embed.export.onnx.trace import missing_package
from onnxsim_embed.export.reference import load_model

pytestmark = [
    pytest.mark.skipif(
        missing_package("torch") is not None,
        reason="needs PyTorch, transformers 5 and onnxscript: pip install 'onnxsim-embed[torch]'",
    ),
    pytest.mark.usefixtures("few_texts"),
    # What transformers and torch say of themselves while they are imported and trace.
    pytest.mark.filterwarnings("ignore"),
]

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
PADDED_WITH_1 = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 50, "type_vocab_size": 1}
ENDS = {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
KINDS = {
    "albert": {**SMALL, "embedding_size": 16},
    "deberta-v2": {
        **SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "gte": {**SMALL, "pad_token_id": 1},
    "modernbert": {**SMALL, **ENDS, "pad_token_id": 1, "local_attention": 8, "num_hidden_layers": 4},
    "mpnet": PADDED_WITH_1,
    "nomic_bert": SMALL,
}  # fmt: skip
FEW = ("deberta-v2", "modernbert", "mpnet")  # each takes seconds; `make interop` traces all
# Where padding is token 1.
OTHER_ORDER = ["[CLS]", "[PAD]", "[SEP]", *(t for t in VOCABULARY if t not in ("[CLS]", "[PAD]", "[SEP]"))]  # fmt: skip


def write_model(directory: Path, kind: str) -> Path:
    """Write a seeded tiny model, mean-pooled, of at most 48 tokens."""
    import torch
    from transformers import AutoConfig, AutoModel

    settings = {**KINDS[kind], "vocab_size": len(VOCABULARY)}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(8)  # so that attention is uneven
    write_checkpoint(directory, tensors={"none": np.zeros(1, np.float32)})
    for name in ("model.safetensors", "vocab.txt", "config.json", "sentence_bert_config.json"):
        (directory / name).unlink()
    change_json(
        directory / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "attention_mask"],
    )
    order = OTHER_ORDER if settings.get("pad_token_id") == 1 else VOCABULARY
    write_json(directory / "tokenizer.json", tokenizer_json(order))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Write and export a kind of model once: its directory and its artifact."""

    @functools.cache
    def export(kind: str) -> tuple[Path, Artifact]:
        directory = write_model(tmp_path_factory.mktemp(kind) / "c", kind)
        precisions = ["fp32", "int8", "fp16"] if kind == "modernbert" else ["fp32", "int8"]
        target = directory.with_name("artifact")
        return directory, export_model(directory, target, precisions=precisions, via="torch")

    return export


@pytest.mark.parametrize("kind", KINDS if os.environ.get("ONNXSIM_EMBED_ALL_TRACES") else FEW)
def test_an_architecture_is_traced_and_equals_pytorch(traced, kind):
    manifest = traced(kind)[1].manifest
    assert (manifest.via, manifest.architecture) == ("torch", kind)
    assert (manifest.hidden_size, manifest.layers) == (32, KINDS[kind]["num_hidden_layers"])
    assert manifest.max_seq_length == 48
    assert manifest.pad_token_id == KINDS[kind].get("pad_token_id", 0)
    assert manifest.precisions["fp32"].encoder is None
    assert {"torch", "transformers", "onnxscript"} <= set(manifest.tools)
    report = manifest.verification["fp32"]
    assert (report["reference"], report["problems"], report["batch_variant"]) == ("PyTorch", [], 0)
    assert report["lengths_min_cosine"] > 0.99999
    assert manifest.verification["int8"]["batch_variant"] == 0
    assert manifest.verification["int8"]["mean_cosine"] >= 0.995
    int8 = manifest.precisions["int8"]
    assert int8.operators["MatMulIntegerToFloat"] >= len(int8.layers) >= 6


def test_the_traced_file_is_what_readers_expect(traced):
    directory = traced("mpnet")[1].directory / "onnx"
    model = files.load_graph(directory / "model.onnx")
    assert [entry.name for entry in model.graph.input] == ["input_ids", "attention_mask"]
    axes = [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    assert [entry.name for entry in model.graph.output] == ["last_hidden_state"]
    assert axes == ["batch", "sequence", 32]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not any(node.metadata_props for node in model.graph.node)  # no paths of this machine
    assert sorted(path.name for path in directory.iterdir()) == ["model.onnx", "model_int8.onnx"]


def test_two_traces_of_one_checkpoint_are_equal_to_the_byte_and_silent(traced, tmp_path, capfd):
    directory, artifact = traced("mpnet")
    capfd.readouterr()
    again = export_model(directory, tmp_path / "a", precisions=["fp32"], via="torch")
    assert capfd.readouterr() == ("", "")
    name = MODEL_FILES["fp32"]
    assert again.manifest.files[name] == artifact.manifest.files[name]


def test_weights_beyond_protobufs_limit_go_to_a_data_file(traced, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 50_000)
    made = export_model(traced("mpnet")[0], tmp_path / "a", precisions=["fp32"], via="torch")
    assert made.manifest.precisions["fp32"].data == ("onnx/model.onnx_data",)


def test_optimum_traces_where_it_is_asked_for(traced, tmp_path, monkeypatch):
    directory, artifact = traced("mpnet")

    class Tasks:
        @staticmethod
        def get_exporter_config_constructor(exporter, model, **options):
            assert (exporter, options["task"]) == ("onnx", "feature-extraction")
            return lambda config: config

    def export(model, config, target, opset):
        assert opset == 17
        shutil.copyfile(artifact.directory / MODEL_FILES["fp32"], target)

    stand_in = {"": {}, ".exporters": {}, ".exporters.onnx": {}, ".exporters.onnx.model_configs": {},
                ".exporters.onnx.convert": {"export": export}, ".exporters.tasks": {"TasksManager": Tasks}}  # fmt: skip
    for name, content in stand_in.items():
        package = ModuleType(f"optimum{name}")
        vars(package).update(content)
        monkeypatch.setitem(sys.modules, package.__name__, package)
    installed = {"torch": "2.6.0", "transformers": "4.57.6", "optimum-onnx": "0.1.0"}
    monkeypatch.setattr(module, "version", installed.__getitem__)
    monkeypatch.setattr("onnxsim_embed.export.build.version", lambda name: installed.get(name, "1"))
    made = export_model(directory, tmp_path / "a", precisions=["fp32"], via="optimum")
    assert (made.manifest.via, made.manifest.tools["optimum-onnx"]) == ("optimum", "0.1.0")
    assert np.array_equal(*(Embedder(a, precision="fp32").encode(TEXTS) for a in (artifact, made)))


@pytest.mark.parametrize(
    ("installed", "via", "expected"),
    [
        ({"torch": "2.13.0+cpu", "transformers": "5.0.1", "onnxscript": "0.5"}, "auto", "torch"),
        ({"torch": "2.5.1", "transformers": "5.0.1", "onnxscript": "0.5"}, "auto", "torch>=2.6"),
        ({"torch": "2.6.0", "transformers": "4.57.6", "onnxscript": "0.5"}, "auto", "transformers>=5.0"),
        ({"torch": "2.6.0", "transformers": "4.57.6", "optimum-onnx": "0.1"}, "auto", "optimum"),
        ({"torch": "2.6.0", "transformers": "4.57.6", "optimum-onnx": "0.1"}, "torch", "transformers>=5.0"),
        ({}, "optimum", "'torch'"),
    ],
)  # fmt: skip
def test_auto_chooses_what_is_installed(tmp_path, monkeypatch, installed, via, expected):
    directory = write_checkpoint(tmp_path / "c", config=bert_config(model_type="modernbert"))

    def version(name):
        if name not in installed:
            raise module.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(module, "version", version)
    if expected in module.REQUIREMENTS:
        assert resolve_via(open_checkpoint(directory), via) == expected
    else:
        with pytest.raises(MissingExtraError, match=rf"'modernbert'.*{expected}"):
            resolve_via(open_checkpoint(directory), via)


@pytest.mark.parametrize("fault", ["lack", "NaN"])
def test_incomplete_or_broken_weights_are_named(traced, tmp_path, fault):
    from safetensors.numpy import load_file, save_file

    directory = shutil.copytree(traced("mpnet")[0], tmp_path / "c")
    tensors = load_file(directory / "model.safetensors")
    name = "encoder.layer.1.intermediate.dense.weight"
    if fault == "lack":
        del tensors[name]
    else:
        tensors[name][0] = np.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=fault) as caught:
        export_model(directory, tmp_path / "a", precisions=["fp32"], via="torch")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (bert_config(model_type="nonsense"), "transformers cannot load .*nonsense"),
        (
            bert_config(model_type="nonsense", auto_map={"AutoModel": "modeling.Nonsense"}),
            "'nonsense' is defined by code inside the checkpoint .*never run",
        ),
    ],
)
def test_what_neither_way_can_export_is_one_clear_error(tmp_path, config, message):
    directory = write_checkpoint(tmp_path / "c", config=config)
    (directory / "modeling.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(CheckpointError, match=message) as caught:
        export_model(directory, tmp_path / "a", precisions=["fp32"], via="torch")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("fault", ["decoder", "fixed"])
def test_what_cannot_be_traced_is_one_clear_error(traced, tmp_path, monkeypatch, fault):
    directory, artifact = traced("mpnet")

    def trace(model, target):
        graph = files.load_graph(artifact.directory / MODEL_FILES["fp32"])
        graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7
        files.save_graph(graph, target)

    if fault == "decoder":
        directory = Path(shutil.copytree(directory, tmp_path / "c"))
        change_json(directory / "config.json", is_encoder_decoder=True)
    monkeypatch.setitem(module.TRACERS, "torch", trace)
    message = {"decoder": "only encoders", "fixed": "one length only"}[fault]
    with pytest.raises(CheckpointError, match=f"'mpnet' .* via='torch': .*{message}"):
        export_model(directory, tmp_path / "a", via="torch")


def test_pickled_weights_are_read_without_running_them(traced, tmp_path):
    import torch
    from safetensors.torch import load_file

    original = traced("mpnet")[0]
    directory = Path(shutil.copytree(original, tmp_path / "c"))
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    pickled, safe = (load_model(open_checkpoint(d)).state_dict() for d in (directory, original))
    assert all(torch.equal(pickled[name], value) for name, value in safe.items())

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"embeddings.word_embeddings.weight": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load"):
        export_model(directory, tmp_path / "d", precisions=["fp32"], via="torch")
    assert not (tmp_path / "ran").exists()
