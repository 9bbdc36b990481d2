"""What readers that cannot be run here parse of an artifact; `make interop` runs the others.

text-embeddings-inference (ONNX Runtime backend): field names and types as its router and backend
declare them. A missing field there is a server that does not start.
"""

from __future__ import annotations

import json

import onnx
import pytest
from support import write_checkpoint
from tokenizers import Tokenizer

from onnxsim_embed.export import export_model


@pytest.fixture(scope="module", params=["mean", "cls"])
def directory(request, tmp_path_factory, artifact):
    if request.param == "mean":
        return request.param, artifact
    home = tmp_path_factory.mktemp("readers")
    checkpoint = write_checkpoint(home / "checkpoint", pooling=request.param, seed=3)
    export_model(checkpoint, home / "artifact", precisions=["fp32"])
    return request.param, home / "artifact"


def read(directory, name):
    return json.loads((directory / name).read_text(encoding="utf-8"))


def test_text_embeddings_inference_finds_a_model_of_the_types_it_feeds(directory):
    _, place = directory
    assert not (place / "model.onnx").exists()  # it would be taken before onnx/model.onnx
    graph = onnx.load(place / "onnx/model.onnx").graph
    types = {entry.name: entry.type.tensor_type.elem_type for entry in graph.input}
    assert types.pop("token_type_ids", onnx.TensorProto.INT64) == onnx.TensorProto.INT64
    assert types == dict.fromkeys(["input_ids", "attention_mask"], onnx.TensorProto.INT64)
    first = graph.output[0]
    assert first.name == "last_hidden_state"
    assert first.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert len(first.type.tensor_type.shape.dim) == 3


def test_text_embeddings_inference_knows_the_pooling(directory):
    pooling, place = directory
    config = read(place, "1_Pooling/config.json")
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]
    assert {mode for mode in modes if config[f"pooling_mode_{mode}"] is True} == {
        {"mean": "mean_tokens", "cls": "cls_token"}[pooling]
    }
    assert all(isinstance(config[f"pooling_mode_{mode}"], bool) for mode in modes)


def test_text_embeddings_inference_knows_the_length_and_the_architecture(directory):
    _, place = directory
    assert read(place, "sentence_bert_config.json")["max_seq_length"] == 48
    config = read(place, "config.json")
    assert isinstance(config["model_type"], str)
    for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id"):
        assert type(config[key]) is int, key
    # A name that ends so would make it a classifier, without embeddings.
    assert config["architectures"]
    assert not any(name.endswith("Classification") for name in config["architectures"])


def test_text_embeddings_inference_cuts_and_pads_by_itself(directory):
    _, place = directory
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    assert read(place, "tokenizer_config.json").get("padding_side", "right") in ("right", "left")
    prompts = read(place, "config_sentence_transformers.json")["prompts"]
    assert all(isinstance(text, str) for text in prompts.values())
