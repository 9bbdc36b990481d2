"""The fp32 ONNX graph: its interface, its operators, and PyTorch's own numbers."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from support import bert_config, bert_tensors, write_checkpoint

from onnxsim_embed.export.bert import ACTIVATIONS, load_bert
from onnxsim_embed.export.checkpoint import open_checkpoint, read_tensors
from onnxsim_embed.export.onnx.bert_graph import build_encoder
from onnxsim_embed.runtime.pooling import Head, PoolingMode

TOLERANCE = 2e-5  # the bar: max absolute difference of a hidden state


def session(model: onnx.ModelProto, level: str = "ORT_ENABLE_ALL") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def masks(rng: np.random.Generator, batch: int, tokens: int) -> np.ndarray:
    """Right padding, left padding, none, and holes, in turn; every row has a real token."""
    mask = np.zeros((batch, tokens), np.int64)
    for row in range(batch):
        real = rng.integers(1, tokens + 1)
        if row % 4 == 0:
            mask[row, :real] = 1
        elif row % 4 == 1:
            mask[row, tokens - real :] = 1
        elif row % 4 == 2:
            mask[row] = 1
        else:
            mask[row] = rng.integers(0, 2, tokens)
            mask[row, rng.integers(tokens)] = 1
    return mask


def difference(model: onnx.ModelProto, reference, ids: np.ndarray, mask: np.ndarray) -> float:
    """Return the largest difference of a real token's hidden state from PyTorch's."""
    hidden, expected = states(model, reference, ids, mask)
    return float(np.abs(hidden - expected)[mask == 1].max())


def states(model: onnx.ModelProto, reference, ids: np.ndarray, mask: np.ndarray):
    """Return the hidden states of the graph and of PyTorch."""
    import torch

    hidden = session(model).run(None, {"input_ids": ids, "attention_mask": mask})[0]
    with torch.inference_mode():
        expected = reference(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).last_hidden_state.numpy()
    assert hidden.dtype == np.float32
    return hidden, expected


def pretrained(directory):
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def random_bert(seed: int, **changes):
    """Return transformers' own BERT with seeded weights of BERT's scale, and its configuration.

    BERT's initial biases and norms are zeros and ones, which would hide mistakes: they get noise.
    """
    import torch
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = BertConfig(**bert_config(max_position_embeddings=512, **shape | changes))
    torch.manual_seed(seed)
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    tensors = {name: value.detach().numpy() for name, value in model.named_parameters()}
    return model, config.to_dict(), tensors


@pytest.fixture(scope="module")
def tiny() -> onnx.ModelProto:
    config = bert_config()
    return build_encoder(load_bert(config, bert_tensors(config)))


# Form


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_graph_is_valid(activation):
    config = bert_config(hidden_act=activation)
    model = build_encoder(load_bert(config, bert_tensors(config)))
    onnx.checker.check_model(model, full_check=True)


def test_inputs_and_outputs_are_what_every_reader_expects(tiny):
    found = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in [*tiny.graph.input, *tiny.graph.output]
    }
    axes = ["batch", "sequence"]
    assert found == {
        "input_ids": (onnx.TensorProto.INT64, axes),
        "attention_mask": (onnx.TensorProto.INT64, axes),
        "last_hidden_state": (onnx.TensorProto.FLOAT, [*axes, 32]),
    }
    assert [value.name for value in tiny.graph.output] == ["last_hidden_state"]


def test_float32_uses_standard_operators_of_opset_17_only(tiny):
    assert [(opset.domain, opset.version) for opset in tiny.opset_import] == [("", 17)]
    assert {node.domain for node in tiny.graph.node} == {""}
    assert tiny.ir_version == 8


def test_operators_of_the_tiny_model(tiny):
    assert Counter(node.op_type for node in tiny.graph.node) == {
        "Add": 17,
        "Cast": 1,
        "Div": 2,
        "Erf": 2,
        "Gather": 1,
        "LayerNormalization": 5,
        "MatMul": 16,
        "Mul": 5,
        "Reshape": 8,
        "Shape": 1,
        "Slice": 1,
        "Softmax": 2,
        "Sub": 1,
        "Transpose": 8,
        "Unsqueeze": 1,
    }


def test_names_of_nodes_and_tensors_are_unique(tiny):
    names = [node.name for node in tiny.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    made = [name for node in tiny.graph.node for name in node.output]
    made += [tensor.name for tensor in tiny.graph.initializer]
    made += [value.name for value in tiny.graph.input]
    assert len(set(made)) == len(made)


def test_equal_weights_give_an_equal_file(tiny):
    config = bert_config()
    again = build_encoder(load_bert(config, bert_tensors(config)))
    assert again.SerializeToString() == tiny.SerializeToString()


# Numbers


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("padded", [True, False])
def test_the_tiny_model_equals_transformers(tmp_path, activation, padded):
    config = bert_config(hidden_act=activation)
    directory = write_checkpoint(tmp_path / "c", config=config)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config["vocab_size"], (24, 17))
    mask = masks(rng, *ids.shape) if padded else np.ones_like(ids)
    model = build_encoder(load_bert(config, read_tensors(directory)))
    assert difference(model, pretrained(directory), ids, mask) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 63, 64])
def test_every_length_up_to_the_positions_equals_transformers(checkpoint, tiny, tokens):
    ids = np.random.default_rng(1).integers(0, 100, (3, tokens))
    assert difference(tiny, pretrained(checkpoint), ids, np.ones_like(ids)) < TOLERANCE


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_onnxruntime_s_optimizations_change_nothing_but_rounding(tiny, level):
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 100, (8, 20))
    feed = {"input_ids": ids, "attention_mask": masks(rng, *ids.shape)}
    plain, best = (session(tiny, each).run(None, feed)[0] for each in (level, "ORT_ENABLE_ALL"))
    assert np.abs(plain - best).max() < 1e-5


def test_padding_does_not_reach_real_tokens(tiny):
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 100, (1, 9))
    run = session(tiny)
    alone = run.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    padded = np.concatenate([ids, rng.integers(0, 100, (1, 30))], axis=1)
    mask = (np.arange(39) < 9).astype(np.int64)[None]
    beside = run.run(None, {"input_ids": padded, "attention_mask": mask})[0]
    assert np.abs(alone[0] - beside[0, :9]).max() < 1e-6


def test_a_row_of_padding_only_is_finite(tiny):
    ids = np.ones((2, 5), np.int64)
    mask = np.array([[0] * 5, [1] * 5])
    assert np.isfinite(session(tiny).run(None, {"input_ids": ids, "attention_mask": mask})[0]).all()


def test_large_scores_survive_the_mask(tmp_path):
    config = bert_config()
    tensors = bert_tensors(config)
    for name in tensors:
        if ".attention.self.query." in name or ".attention.self.key." in name:
            tensors[name] = tensors[name] * 6
    directory = write_checkpoint(tmp_path / "c", tensors=tensors)
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 100, (8, 20))
    model = build_encoder(load_bert(config, tensors))
    assert difference(model, pretrained(directory), ids, masks(rng, *ids.shape)) < 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_graph_of_the_run_path_computes_the_same(activation):
    config = bert_config(hidden_act=activation)
    bert = load_bert(config, bert_tensors(config))
    portable, run = (session(build_encoder(bert, layout)) for layout in ("portable", "run"))
    for shape in ((5, 12), (1, 64), (3, 1)):
        ids = np.random.default_rng(7).integers(0, 100, shape)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        [hidden] = run.run(None, {"input_ids": np.ascontiguousarray(ids.T)})
        assert np.abs(hidden.transpose(1, 0, 2) - portable.run(None, feed)[0]).max() < 1e-5


@pytest.mark.real
def test_minilm_equals_transformers(real_checkpoint):
    checkpoint = open_checkpoint(real_checkpoint)
    model = build_encoder(load_bert(checkpoint.config, checkpoint.tensors()))
    rng = np.random.default_rng(5)
    ids = rng.integers(1000, 30522, (8, 60))
    assert difference(model, pretrained(real_checkpoint), ids, masks(rng, *ids.shape)) < TOLERANCE


# BERT-base and BGE-base share this shape; they differ in pooling, which for BGE is CLS, normalized.
@pytest.mark.parametrize(
    ("vocabulary", "layers"),
    [
        (30522, 2),
        (500, 12),  # words are only looked up: a small table saves 90 MB and tests the same graph
    ],
)
def test_random_weights_of_base_shape_equal_transformers(vocabulary, layers):
    reference, config, tensors = random_bert(6, vocab_size=vocabulary, num_hidden_layers=layers)
    model = build_encoder(load_bert(config, tensors))
    rng = np.random.default_rng(6)
    ids = rng.integers(0, vocabulary, (4, 40))
    mask = masks(rng, *ids.shape)
    hidden, expected = states(model, reference, ids, mask)
    assert np.abs(hidden - expected)[mask == 1].max() < TOLERANCE
    bge = Head((PoolingMode.CLS,), normalizes=True)
    assert np.abs(bge(hidden, mask) - bge(expected, mask)).max() < 1e-6
