"""What readers that cannot be run here parse of an artifact; `make interop` runs the others.

text-embeddings-inference (ONNX Runtime backend): field names and types as its router and backend
declare them. A missing field there is a server that does not start.
"""

from __future__ import annotations

import onnx
from support import read_json
from tokenizers import Tokenizer


def test_text_embeddings_inference_finds_fields_of_the_types_it_declares(artifact):
    assert not (artifact / "model.onnx").exists()  # it would be taken before onnx/model.onnx
    graph = onnx.load(artifact / "onnx/model.onnx").graph
    types = {entry.name: entry.type.tensor_type.elem_type for entry in graph.input}
    assert types == dict.fromkeys(["input_ids", "attention_mask"], onnx.TensorProto.INT64)
    first = graph.output[0]
    assert first.name == "last_hidden_state"
    assert first.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert len(first.type.tensor_type.shape.dim) == 3
    pooling = read_json(artifact / "1_Pooling/config.json")
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]
    assert [pooling[f"pooling_mode_{mode}"] for mode in modes] == [False, True, False, False]
    assert read_json(artifact / "sentence_bert_config.json")["max_seq_length"] == 48
    config = read_json(artifact / "config.json")
    assert isinstance(config["model_type"], str)
    for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id"):
        assert type(config[key]) is int, key
    # A name that ends so would make it a classifier, without embeddings.
    assert not any(name.endswith("Classification") for name in config["architectures"])
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    assert tokenizer.truncation is tokenizer.padding is None  # it cuts and pads by itself
    side = read_json(artifact / "tokenizer_config.json").get("padding_side", "right")
    assert side in ("right", "left")
    prompts = read_json(artifact / "config_sentence_transformers.json")["prompts"]
    assert all(isinstance(text, str) for text in prompts.values())
