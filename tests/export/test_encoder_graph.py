"""The ONNX graphs of BERT, fp32 and int8, in both layouts: interface, operators, PyTorch's numbers."""

from collections import Counter

import numpy as np
import onnx
import pytest
from support import (
    bert_config,
    bert_tensors,
    calibrate,
    cosines,
    quantize,
    random_token_ids,
    run_onnx,
    tiny_bert,
    write_checkpoint,
)

from onnxsim_embed.export.encoder import ACTIVATIONS, load_encoder
from onnxsim_embed.export.onnx.builder import operator_counts
from onnxsim_embed.export.onnx.encoder_graph import build_encoder

TOLERANCE = 2e-5  # max absolute difference of a hidden state from PyTorch's
LAYERS = 2
LAYOUTS = ["portable", "run"]
GRAPHS = [(precision, layout) for precision in ("fp32", "int8") for layout in LAYOUTS]

COMMON = {
    "Add": 1 + 2 * LAYERS,
    "LayerNormalization": 1 + 2 * LAYERS,
    "Reshape": 4 * LAYERS,
    "Shape": 1,
    "Slice": 1,
    "Softmax": LAYERS,
}
LINEARS = {
    "fp32": {"MatMul": 6 * LAYERS, "Gather": 1},
    "int8": {"MatMulIntegerToFloat": 6 * LAYERS, "QuantizeLinear": 4 * LAYERS, "Gather": 2},
}
ATTENTION = {
    "portable": {"MatMul": 2 * LAYERS, "Transpose": 4 * LAYERS, "Sub": 1, "Unsqueeze": 1},
    "run": {"FusedMatMul": 2 * LAYERS, "Transpose": LAYERS},
}


def quantized(bert):
    return quantize(bert, calibrate(bert, random_token_ids(0, 60)))[0]


@pytest.fixture(scope="module")
def graphs():
    bert = tiny_bert(num_hidden_layers=LAYERS)
    berts = {"fp32": bert, "int8": quantized(bert)}
    return {key: build_encoder(berts[key[0]], key[1]) for key in GRAPHS}


@pytest.fixture(scope="module")
def tiny(graphs):
    return graphs["fp32", "portable"]


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).integers(0, 90, shape)


def masks(batch: int, tokens: int) -> np.ndarray:
    """Right padding, left padding, none, and holes, in turn; every row has a real token."""
    rng = np.random.default_rng(tokens)
    mask = rng.integers(0, 2, (batch, tokens))
    mask[np.arange(batch), rng.integers(0, tokens, batch)] = 1
    lengths = rng.integers(1, tokens + 1, batch)[:, None]
    mask[::4] = (np.arange(tokens) < lengths)[::4]
    mask[1::4] = (np.arange(tokens) >= tokens - lengths)[1::4]
    mask[2::4] = 1
    return mask.astype(np.int64)


def pretrained(directory):
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def difference(model, reference, ids: np.ndarray, mask: np.ndarray) -> float:
    """Return the largest difference of a real token's hidden state from PyTorch's."""
    import torch

    [hidden] = run_onnx(model, ids, mask)
    with torch.inference_mode():
        output = reference(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    assert hidden.dtype == np.float32
    return float(np.abs(hidden - output.last_hidden_state.numpy())[mask == 1].max())


# Form


@pytest.mark.parametrize("key", GRAPHS)
def test_graphs_are_valid_without_idle_constants_or_repeated_names(graphs, key):
    model = graphs[key]
    onnx.checker.check_model(model, full_check=key == ("fp32", "portable"))
    nodes, constants = model.graph.node, [tensor.name for tensor in model.graph.initializer]
    values = [name for node in nodes for name in node.output]
    values += constants + [entry.name for entry in model.graph.input]
    assert max(Counter(values).values()) == max(Counter(n.name for n in nodes).values()) == 1
    assert set(constants) <= {name for node in nodes for name in node.input}
    used = {node.domain for node in nodes}
    assert {entry.domain for entry in model.opset_import} == used | {""}
    assert (used == {""}) == (key == ("fp32", "portable"))
    assert (model.opset_import[0].version, model.ir_version) == (17, 8)


@pytest.mark.parametrize(("precision", "layout"), GRAPHS)
def test_operators_of_the_tiny_model(graphs, precision, layout):
    expected = Counter(COMMON) + Counter(LINEARS[precision]) + Counter(ATTENTION[layout])
    if layout == "portable":
        expected += Counter(Cast=1, Mul=1, Add=LAYERS)  # the mask
    if precision == "int8":
        smoothed = 2 * LAYERS  # the inputs of query, key and value, and of up
        expected += Counter(Gelu=LAYERS, Cast=1, Mul=1 + smoothed)
    else:  # key and value have no bias; Gelu is written out
        expected += Counter(Add=4 * LAYERS + LAYERS, Erf=LAYERS, Div=LAYERS, Mul=2 * LAYERS)
    assert operator_counts(graphs[precision, layout]) == expected


@pytest.mark.parametrize(
    ("layout", "names", "axes"),
    [
        ("portable", ["input_ids", "attention_mask", "last_hidden_state"], ["batch", "sequence"]),
        ("run", ["input_ids", "hidden"], ["sequence", "batch"]),
    ],
)
def test_inputs_and_outputs_are_what_readers_expect(graphs, layout, names, axes):
    model = graphs["int8", layout]
    entries = [*model.graph.input, *model.graph.output]
    types = [entry.type.tensor_type for entry in entries]
    shapes = [[d.dim_param or d.dim_value for d in kind.shape.dim] for kind in types]
    assert [entry.name for entry in entries] == names
    assert shapes == [axes] * (len(names) - 1) + [[*axes, 32]]
    expected = [onnx.TensorProto.INT64] * (len(names) - 1) + [onnx.TensorProto.FLOAT]
    assert [kind.elem_type for kind in types] == expected


# Numbers


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_tiny_model_equals_transformers_in_both_layouts(tmp_path, activation):
    config = bert_config(hidden_act=activation)
    reference = pretrained(write_checkpoint(tmp_path / "c", config=config))
    bert, ids = tiny_bert(activation), random_ids(24, 17)
    assert difference(build_encoder(bert), reference, ids, masks(*ids.shape)) < TOLERANCE
    for shape in (ids.shape, (33, 7), (1, 1), (3, 64)):
        ids = random_ids(*shape)
        for layout in LAYOUTS:
            model = build_encoder(bert, layout)
            assert difference(model, reference, ids, np.ones_like(ids)) < TOLERANCE
    int8 = quantized(bert)
    portable, run = (run_onnx(build_encoder(int8, layout), ids)[0] for layout in LAYOUTS)
    assert cosines(portable, run).min() > 0.9999
    assert cosines(run_onnx(build_encoder(bert), ids)[0].mean(1), run.mean(1)).min() > 0.995


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_onnxruntime_s_optimizations_change_nothing_but_rounding(tiny, level):
    ids = random_ids(8, 20)
    mask = masks(*ids.shape)
    [plain], [best] = run_onnx(tiny, ids, mask, level=level), run_onnx(tiny, ids, mask)
    assert np.abs(plain - best).max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_on_the_run_path_a_row_does_not_depend_on_its_batch(graphs, precision, tokens):
    model, ids = graphs[precision, "run"], random_ids(23, tokens)
    [together] = run_onnx(model, ids)
    order = np.random.default_rng(1).permutation(len(ids))
    assert np.array_equal(run_onnx(model, ids[order])[0], together[order])
    for rows in (1, 2, 5, 16):
        batches = [run_onnx(model, ids[i : i + rows])[0] for i in range(0, len(ids), rows)]
        assert np.array_equal(np.concatenate(batches), together)


def test_a_row_of_padding_only_is_finite(tiny):
    [hidden] = run_onnx(tiny, np.ones((2, 5), np.int64), np.array([[0] * 5, [1] * 5]))
    assert np.isfinite(hidden).all()


def test_large_scores_survive_the_mask(tmp_path):
    tensors = bert_tensors(bert_config())
    for name in tensors:
        if ".attention.self.query." in name or ".attention.self.key." in name:
            tensors[name] *= 6
    reference = pretrained(write_checkpoint(tmp_path / "c", tensors=tensors))
    model, ids = build_encoder(load_encoder(bert_config(), tensors)), random_ids(8, 20)
    assert difference(model, reference, ids, masks(*ids.shape)) < 1e-3
