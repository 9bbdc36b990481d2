"""Weights and configuration of a BERT encoder: what is refused, and what folding keeps."""

import numpy as np
import pytest
from support import bert_config, bert_tensors

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.bert import load_bert

CONFIG = bert_config(num_hidden_layers=1)
TENSORS = bert_tensors(CONFIG)
NEEDED = [name for name in TENSORS if not name.startswith("pooler")]


def test_the_shape_of_the_encoder_comes_from_the_configuration():
    bert = load_bert(bert_config(), bert_tensors(bert_config()))
    assert (bert.hidden, bert.heads, bert.head_width, len(bert.layers)) == (32, 4, 8, 2)
    assert bert.epsilon == 1e-12
    assert bert.activation == "gelu"
    assert bert.positions.shape == (64, 32)


def test_token_type_zero_joins_the_positions():
    types = TENSORS["embeddings.token_type_embeddings.weight"]
    positions = TENSORS["embeddings.position_embeddings.weight"]
    assert np.array_equal(load_bert(CONFIG, TENSORS).positions, positions + types[0])


def test_loading_leaves_the_tensors_alone():
    tensors = {name: value.copy() for name, value in TENSORS.items()}
    load_bert(CONFIG, tensors)
    assert all(np.array_equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_heads_and_pooler_are_not_needed():
    extra = {"cls.predictions.bias": np.zeros(3, np.float32)}
    load_bert(CONFIG, {name: TENSORS[name] for name in NEEDED} | extra)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_tensor_is_named(name):
    with pytest.raises(CheckpointError, match=f"lack tensor '{name}'"):
        load_bert(CONFIG, {key: value for key, value in TENSORS.items() if key != name})


@pytest.mark.parametrize("name", NEEDED)
def test_a_misshapen_tensor_is_named_with_both_shapes(name):
    value = TENSORS[name]
    wrong = np.zeros((value.shape[0] + 1, *value.shape[1:]), np.float32)
    with pytest.raises(
        CheckpointError, match=f"'{name}' has shape .*config.json implies"
    ) as caught:
        load_bert(CONFIG, TENSORS | {name: wrong})
    assert str(wrong.shape) in str(caught.value)
    assert str(value.shape) in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "max_position_embeddings",
        "type_vocab_size",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", ["missing", None, 0, -1, 2.0, "32", True])
def test_a_size_that_is_no_positive_integer_is_named(key, value):
    config = {k: v for k, v in CONFIG.items() if k != key}
    if value != "missing":
        config[key] = value
    with pytest.raises(CheckpointError, match=f"config.json: {key} must be a positive integer"):
        load_bert(config, TENSORS)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(CheckpointError, match=r"hidden_size 32 is not a multiple .* 5"):
        load_bert(CONFIG | {"num_attention_heads": 5}, TENSORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not one of"),
        ({"hidden_act": None}, "hidden_act None is not one of"),
        ({"position_embedding_type": "relative_key"}, "only absolute position .*'relative_key'"),
        ({"is_decoder": True}, "is_decoder is set; only encoders"),
        ({"add_cross_attention": True}, "add_cross_attention is set; only encoders"),
        ({"model_type": "roberta"}, "architecture 'roberta'.*'bert'"),
        ({"model_type": None}, "architecture None.*'bert'"),
        ({"layer_norm_eps": "small"}, "config.json: layer_norm_eps"),
        ({"layer_norm_eps": None}, "config.json: layer_norm_eps"),
        ({"layer_norm_eps": -1.0}, "config.json: layer_norm_eps"),
    ],
)
def test_a_configuration_that_cannot_be_built_says_why(change, message):
    with pytest.raises(CheckpointError, match=message):
        load_bert(CONFIG | change, TENSORS)


def test_silence_means_what_transformers_takes_it_to_mean():
    silent = ("hidden_act", "layer_norm_eps", "position_embedding_type")
    bert = load_bert({k: v for k, v in CONFIG.items() if k not in silent}, TENSORS)
    assert (bert.activation, bert.epsilon) == ("gelu", 1e-12)
