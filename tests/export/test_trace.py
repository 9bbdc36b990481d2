"""Architectures that optimum traces: the same artifact, proven against PyTorch."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import (
    TEXTS,
    VOCABULARY,
    bert_config,
    cosines,
    tokenizer_json,
    write_checkpoint,
    write_json,
)

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.onnx.files import load_graph
from onnxsim_embed.export.onnx.trace import has_optimum

pytestmark = [
    pytest.mark.skipif(
        not has_optimum(), reason="needs optimum: pip install 'onnxsim-embed[optimum]'"
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
}
PADDED_WITH_1 = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 50}
KINDS = {
    "bert": {**SMALL, "max_position_embeddings": 48},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 48},
    "roberta": {**PADDED_WITH_1, "type_vocab_size": 1},
    "xlm-roberta": {**PADDED_WITH_1, "type_vocab_size": 1},
    "mpnet": PADDED_WITH_1,
    "electra": {**SMALL, "embedding_size": 16, "max_position_embeddings": 48},
    "albert": {**SMALL, "embedding_size": 16, "max_position_embeddings": 48},
    "modernbert": {
        **SMALL, "max_position_embeddings": 48, "pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2,
        "bos_token_id": 0, "eos_token_id": 2, "reference_compile": False,
    },
}  # fmt: skip
ALL_PRECISIONS = ["distilbert", "roberta", "modernbert"]
# Where padding is token 1.
OTHER_ORDER = ["[CLS]", "[PAD]", "[SEP]", *(t for t in VOCABULARY if t not in ("[CLS]", "[PAD]", "[SEP]"))]  # fmt: skip


def write_model(directory: Path, kind: str, **changes) -> Path:
    """Write a seeded tiny model, mean-pooled, as a Sentence-Transformers directory."""
    import torch
    from transformers import AutoConfig, AutoModel

    settings = KINDS[kind] | {"vocab_size": len(VOCABULARY)} | changes
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(8)  # so that attention is uneven
    write_checkpoint(directory, tensors={"none": np.zeros(1, np.float32)})
    for name in ("model.safetensors", "vocab.txt", "config.json", "sentence_bert_config.json"):
        (directory / name).unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"model_input_names": ["input_ids", "attention_mask"]}
    write_json(directory / "tokenizer_config.json", config)
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
        precisions = ["fp32", "int8", "fp16"] if kind in ALL_PRECISIONS else ["fp32"]
        target = directory.with_name("artifact")
        return directory, export_model(directory, target, precisions=precisions)

    return export


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
def test_an_architecture_is_traced_and_equals_pytorch(traced, kind):
    manifest = traced(kind)[1].manifest
    assert (manifest.via, manifest.architecture) == ("optimum", kind)
    assert (manifest.hidden_size, manifest.layers, manifest.dim) == (32, 2, 32)
    assert manifest.max_seq_length == 48
    assert manifest.pad_token_id == (1 if "pad_token_id" in KINDS[kind] else 0)
    assert manifest.precisions["fp32"].encoder is None
    assert {"torch", "transformers", "optimum-onnx"} <= set(manifest.tools)
    report = manifest.verification["fp32"]
    assert (report["reference"], report["problems"], report["batch_variant"]) == ("PyTorch", [], 0)


def test_the_traced_file_is_what_readers_expect(traced):
    directory = traced("mpnet")[1].directory / "onnx"
    model = load_graph(directory / "model.onnx")
    assert [entry.name for entry in model.graph.input] == ["input_ids", "attention_mask"]
    assert [entry.name for entry in model.graph.output] == ["last_hidden_state"]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert [path.name for path in directory.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("kind", ALL_PRECISIONS)
def test_every_precision_of_a_traced_model_is_exported_and_verified(traced, kind):
    artifact = traced(kind)[1]
    manifest = artifact.manifest
    assert set(manifest.precisions) == {"fp32", "int8", "fp16"}
    int8 = manifest.precisions["int8"]
    # Query, key and value of a layer share one input, but modernbert has one linear for them.
    shared = 0 if kind == "modernbert" else 2 * 2
    assert int8.operators["MatMulIntegerToFloat"] == len(int8.layers) + shared
    assert manifest.verification["int8"]["batch_variant"] == 0
    assert manifest.verification["int8"]["mean_cosine"] >= 0.995
    assert manifest.verification["fp16"]["min_cosine"] >= 0.999
    vectors = (Embedder(artifact, precision=name).encode(TEXTS) for name in ("int8", "fp32"))
    assert cosines(*vectors).min() > 0.9


def test_two_traces_of_one_checkpoint_are_equal_to_the_byte(traced, tmp_path):
    directory, artifact = traced("distilbert")
    again = export_model(directory, tmp_path / "a", precisions=list(artifact.manifest.precisions))
    assert again.manifest == artifact.manifest


def test_both_ways_give_the_same_vectors(checkpoint, tmp_path):
    ways = [
        export_model(checkpoint, tmp_path / via, precisions=["fp32"], via=via)
        for via in ("direct", "optimum")
    ]
    assert [way.manifest.via for way in ways] == ["direct", "optimum"]
    first, second = (Embedder(way).encode(TEXTS) for way in ways)
    assert np.abs(first - second).max() < 1e-5
    names = [{path.name for path in way.directory.rglob("*")} - {"encoder.onnx"} for way in ways]
    assert names[0] == names[1]


@pytest.mark.parametrize("fault", ["lack", "NaN"])
def test_incomplete_or_broken_weights_are_named(traced, tmp_path, fault):
    from safetensors.numpy import load_file, save_file

    directory = shutil.copytree(traced("distilbert")[0], tmp_path / "c")
    tensors, name = (
        load_file(directory / "model.safetensors"),
        "transformer.layer.1.ffn.lin1.weight",
    )
    if fault == "lack":
        del tensors[name]
    else:
        tensors[name][0] = np.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=fault) as caught:
        export_model(directory, tmp_path / "a", precisions=["fp32"])
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (bert_config(model_type="nonsense"), "transformers cannot load .*nonsense"),
        (
            bert_config(model_type="nonsense", auto_map={"AutoModel": "modeling.Nonsense"}),
            "transformers cannot load",
        ),
    ],
)
def test_what_neither_way_can_export_is_one_clear_error(tmp_path, config, message):
    directory = write_checkpoint(tmp_path / "c", config=config)
    (directory / "modeling.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(CheckpointError, match=message) as caught:
        export_model(directory, tmp_path / "a", precisions=["fp32"])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_an_architecture_that_optimum_does_not_know_names_both_ways(traced, tmp_path):
    from transformers import FunnelConfig, FunnelModel

    directory = shutil.copytree(traced("distilbert")[0], tmp_path / "c")
    small = {"block_sizes": [1], "d_model": 32, "n_head": 2, "d_head": 8, "d_inner": 32}
    FunnelModel(FunnelConfig(vocab_size=len(VOCABULARY), **small)).save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    write_json(directory / "tokenizer_config.json", config | {"model_max_length": 48})
    with pytest.raises(CheckpointError, match=r"'funnel' .*neither directly .*nor through optimum"):
        export_model(directory, tmp_path / "a", precisions=["fp32"])


def test_pickled_weights_are_read_without_running_them(traced, tmp_path):
    import torch
    from safetensors.torch import load_file

    original, artifact = traced("distilbert")
    directory = shutil.copytree(original, tmp_path / "c")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    pickled = export_model(directory, tmp_path / "b", precisions=["fp32"])
    vectors = Embedder(artifact, precision="fp32").encode(TEXTS)
    assert np.array_equal(vectors, Embedder(pickled).encode(TEXTS))

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"embeddings.word_embeddings.weight": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load"):
        export_model(directory, tmp_path / "d", precisions=["fp32"])
    assert not (tmp_path / "ran").exists()
