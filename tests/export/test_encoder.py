"""Weights and configuration of a BERT encoder: errors, defaults and folding."""

import numpy as np
import pytest
from support import bert_config, bert_tensors

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.encoder import load_encoder

CONFIG = bert_config(num_hidden_layers=1)
TENSORS = bert_tensors(CONFIG)
NEEDED = [name for name in TENSORS if not name.startswith("pooler")]


def test_the_shape_of_the_encoder_comes_from_the_configuration():
    bert = load_encoder(bert_config(), bert_tensors(bert_config()))
    assert (bert.hidden, bert.heads, bert.head_width, len(bert.layers)) == (32, 4, 8, 2)
    assert bert.epsilon == 1e-12
    assert bert.activation == "gelu"
    assert bert.positions.shape == (64, 32)


def test_token_type_zero_joins_the_positions():
    types = TENSORS["embeddings.token_type_embeddings.weight"]
    positions = TENSORS["embeddings.position_embeddings.weight"]
    assert np.array_equal(load_encoder(CONFIG, TENSORS).positions, positions + types[0])


def test_loading_leaves_the_tensors_alone():
    tensors = {name: value.copy() for name, value in TENSORS.items()}
    load_encoder(CONFIG, tensors)
    assert all(np.array_equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_or_misshapen_tensor_is_named(name):
    with pytest.raises(CheckpointError, match=f"lack tensor '{name}'"):
        load_encoder(CONFIG, {key: value for key, value in TENSORS.items() if key != name})
    value = TENSORS[name]
    misshapen = np.zeros((value.shape[0] + 1, *value.shape[1:]), np.float32)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_encoder(CONFIG, TENSORS | {name: misshapen})
    assert str(misshapen.shape) in str(caught.value)
    assert str(value.shape) in str(caught.value)


SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
    "max_position_embeddings", "type_vocab_size", "vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
def test_a_size_must_be_a_positive_integer(key):
    for value in (None, 0, -1, 2.0, "32", True):
        with pytest.raises(CheckpointError, match=f"{key} must be a positive integer"):
            load_encoder(CONFIG | {key: value}, TENSORS)


def test_hidden_size_must_be_a_multiple_of_the_heads():
    with pytest.raises(CheckpointError, match="hidden_size 32"):
        load_encoder(CONFIG | {"num_attention_heads": 5}, TENSORS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", None),
        ("add_cross_attention", True),
        ("model_type", "gpt2"),
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", -1.0),
    ],
)
def test_an_unsupported_configuration_names_key_and_value(key, value):
    with pytest.raises(CheckpointError, match=f"{key}.* {value!r}"):
        load_encoder(CONFIG | {key: value}, TENSORS)


def test_missing_keys_have_the_defaults_of_transformers():
    silent = ("hidden_act", "layer_norm_eps", "position_embedding_type")
    bert = load_encoder({k: v for k, v in CONFIG.items() if k not in silent}, TENSORS)
    assert (bert.activation, bert.epsilon) == ("gelu", 1e-12)
