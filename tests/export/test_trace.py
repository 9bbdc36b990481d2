"""Architectures that optimum traces: the same artifact, proven against PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import TEXTS, VOCABULARY, bert_config, tokenizer_json, write_checkpoint, write_json

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
    (directory / "model.safetensors").unlink()
    (directory / "vocab.txt").unlink()
    for name in ("config.json", "sentence_bert_config.json"):
        (directory / name).unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    write_json(
        directory / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    order = OTHER_ORDER if settings.get("pad_token_id") == 1 else VOCABULARY
    write_json(directory / "tokenizer.json", tokenizer_json(order))
    model.save_pretrained(directory)
    return directory


def torch_vectors(directory: Path, artifact: Artifact, texts: list[str]) -> np.ndarray:
    """Return mean-pooled unit vectors straight from PyTorch, text by text."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory).eval()
    rows = []
    for ids in Embedder(artifact, precision="fp32").token_ids(texts):
        with torch.no_grad():
            row = torch.from_numpy(ids)[None]
            hidden = model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
        rows.append(hidden[0].mean(0).numpy())
    vectors = np.stack(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
def test_an_architecture_is_traced_and_equals_pytorch(tmp_path, kind):
    directory = write_model(tmp_path / "c", kind)
    artifact = export_model(directory, tmp_path / "a", precisions=["fp32"])
    manifest = artifact.manifest
    assert (manifest.via, manifest.architecture) == ("optimum", kind)
    assert (manifest.hidden_size, manifest.layers, manifest.dim) == (32, 2, 32)
    assert manifest.max_seq_length == 48
    assert manifest.pad_token_id == (1 if "pad_token_id" in KINDS[kind] else 0)
    assert manifest.precisions["fp32"].encoder is None
    assert {"torch", "transformers", "optimum-onnx"} <= set(manifest.tools)
    report = manifest.verification["fp32"]
    assert (report["reference"], report["problems"], report["batch_variant"]) == ("PyTorch", [], 0)
    vectors = Embedder(artifact).encode(TEXTS)
    assert np.abs(vectors - torch_vectors(directory, artifact, TEXTS)).max() < 1e-5


def test_the_traced_file_is_what_readers_expect(tmp_path):
    artifact = export_model(
        write_model(tmp_path / "c", "roberta"), tmp_path / "a", precisions=["fp32"]
    )
    model = load_graph(artifact.directory / "onnx/model.onnx")
    assert [entry.name for entry in model.graph.input] == ["input_ids", "attention_mask"]
    assert [entry.name for entry in model.graph.output] == ["last_hidden_state"]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert sorted(path.name for path in (artifact.directory / "onnx").iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "modernbert"])
def test_every_precision_of_a_traced_model_is_made_and_proven(tmp_path, kind):
    directory = write_model(tmp_path / "c", kind)
    artifact = export_model(directory, tmp_path / "a", precisions=["fp32", "int8", "fp16"])
    manifest = artifact.manifest
    assert set(manifest.precisions) == {"fp32", "int8", "fp16"}
    int8 = manifest.precisions["int8"]
    assert int8.operators["MatMulIntegerToFloat"] == len([*int8.layers]) + 2 * 2 * (
        kind != "modernbert"
    )
    assert manifest.verification["int8"]["batch_variant"] == 0
    assert manifest.verification["int8"]["mean_cosine"] >= 0.995
    assert manifest.verification["fp16"]["min_cosine"] >= 0.999
    vectors = Embedder(artifact, precision="int8").encode(TEXTS)
    assert (
        np.einsum("ij,ij->i", vectors, Embedder(artifact, precision="fp32").encode(TEXTS)).min()
        > 0.9
    )


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


@pytest.mark.real
def test_both_ways_give_the_same_vectors_for_minilm(real_checkpoint, tmp_path):
    from onnxsim_embed.export.quantization.calibration import calibration_texts

    first, second = (
        Embedder(export_model("minilm", tmp_path / via, precisions=["fp32"], via=via))
        for via in ("direct", "optimum")
    )
    texts = [*TEXTS, *calibration_texts()[:50]]
    assert np.abs(first.encode(texts) - second.encode(texts)).max() < 2e-5


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    directory = write_model(tmp_path / "c", "distilbert")
    tensors = load_file(directory / "model.safetensors")
    del tensors["transformer.layer.1.ffn.lin1.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors, '.*layer.1.ffn.lin1.weight'"):
        export_model(directory, tmp_path / "a", precisions=["fp32"])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    directory = write_model(tmp_path / "c", "distilbert")
    tensors = load_file(directory / "model.safetensors")
    tensors["transformer.layer.0.ffn.lin1.bias"][0] = np.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer.0.ffn.lin1.bias.* NaN"):
        export_model(directory, tmp_path / "a", precisions=["fp32"])


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


def test_an_architecture_that_optimum_does_not_know_names_both_ways(tmp_path):
    import torch
    from transformers import FunnelConfig, FunnelModel

    directory = write_model(tmp_path / "c", "distilbert")
    torch.manual_seed(0)
    small = {"block_sizes": [1], "d_model": 32, "n_head": 2, "d_head": 8, "d_inner": 32}
    FunnelModel(FunnelConfig(vocab_size=len(VOCABULARY), **small)).save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    write_json(directory / "tokenizer_config.json", config | {"model_max_length": 48})
    with pytest.raises(CheckpointError, match=r"'funnel' .*neither directly .*nor through optimum"):
        export_model(directory, tmp_path / "a", precisions=["fp32"])


def test_pickled_weights_are_read_without_running_them(tmp_path):
    import torch
    from safetensors.torch import load_file

    directory = write_model(tmp_path / "c", "distilbert")
    plain = export_model(directory, tmp_path / "a", precisions=["fp32"])
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    pickled = export_model(directory, tmp_path / "b", precisions=["fp32"])
    assert np.array_equal(Embedder(plain).encode(TEXTS), Embedder(pickled).encode(TEXTS))

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"embeddings.word_embeddings.weight": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load"):
        export_model(directory, tmp_path / "d", precisions=["fp32"])
    assert not (tmp_path / "ran").exists()


def test_two_traces_of_one_checkpoint_are_equal_to_the_byte(tmp_path):
    directory = write_model(tmp_path / "c", "distilbert")
    first, second = (
        export_model(directory, tmp_path / name, precisions=["fp32", "int8"]) for name in "ab"
    )
    assert first.manifest == second.manifest
