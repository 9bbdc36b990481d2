"""Linears of any graph become int8: found, split at outlier channels, kept where it does not pay."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import run_onnx

from onnxsim_embed.export.onnx.builder import GraphBuilder
from onnxsim_embed.export.quantization import ranges, search
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.encoder import Quantizer
from onnxsim_embed.export.quantization.onnx import (
    find_linears,
    fit_graph,
    follows_norm,
    quantize_graph,
)

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((50, 32)).astype(np.float32)
WEIGHT = (RNG.standard_normal((32, 24)) * 0.2).astype(np.float32)


def graph(
    table=TABLE, weight=WEIGHT, bias: bool = True, also: str | None = None
) -> onnx.ModelProto:
    """input_ids -> table -> one linear; its bias on the left of the Add, as exporters put it."""
    b = GraphBuilder()
    x = b.embedding(table, "table", "", "x")
    y = b.op("MatMul", x, b.constant("weight", weight), name="y" if bias else "out")
    if bias:
        b.op("Add", b.constant("bias", weight[0]), y, name="out")
    if also:
        b.op(also, "y", name="z")
    info = helper.make_tensor_value_info
    ids = info("input_ids", TensorProto.INT64, ["b", "t"])
    return b.model([ids], [info("out", TensorProto.FLOAT, ["b", "t", weight.shape[1]])])


def seen(rows: np.ndarray) -> dict[str, Activations]:
    return {"x": Activations(rows.min(axis=0), rows.max(axis=0), rows)}


def quantize(model: onnx.ModelProto, seen, keep: bool = False) -> dict:
    groups = fit_graph(model, seen)
    choice = {name: None if keep else group.fits[0] for name, group in groups.items()}
    quantize_graph(model, choice, Quantizer(groups)(choice, final=True))
    return choice


def noise(model: onnx.ModelProto, exact: onnx.ModelProto, ids: np.ndarray) -> float:
    """Return the mean squared difference of two graphs, relative to the variance."""
    [a], [b] = (run_onnx(graph, ids) for graph in (model, exact))
    return float(np.square(a - b).mean() / b.var())


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_found_with_its_bias(bias):
    (linear,) = find_linears(graph(bias=bias))
    assert (linear.name, linear.input, linear.outputs[-1]) == ("y" if bias else "out", "x", "out")
    assert np.array_equal(linear.linear.weight, WEIGHT)
    assert (linear.linear.bias is None) != bias


def test_a_product_that_something_else_reads_keeps_its_add():
    (linear,) = find_linears(graph(also="Relu"))
    assert (linear.outputs, linear.linear.bias) == (("y",), None)


@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_graph_gives_nearly_the_same(bias):
    model = graph(bias=bias)
    assert list(quantize(model, seen(TABLE))) == ["x"]
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert "MatMul" not in kinds
    assert kinds.count("MatMulIntegerToFloat") == kinds.count("QuantizeLinear") == 1
    assert not {"table", "weight"} & {tensor.name for tensor in model.graph.initializer}
    assert 0 < noise(model, graph(bias=bias), np.arange(50)[None]) < 0.001


def test_a_linear_stays_float32_where_chosen_or_without_activations():
    model = graph()
    quantize(model, seen(TABLE), keep=True)
    assert [node.op_type for node in model.graph.node][-2:] == ["MatMul", "Add"]
    assert fit_graph(graph(), {}) == {}


@pytest.mark.parametrize(
    ("operators", "smoothed"),
    [
        (["LayerNormalization"], True),
        (["LayerNormalization", "Reshape", "Transpose"], True),
        (["ReduceMean", "Sub", "Div", "Mul", "Add"], True),
        (["LayerNormalization", "Gelu"], False),
        (["LayerNormalization", "MatMul", "Add", "Erf", "Mul"], False),
        (["Softmax", "MatMul", "Transpose", "Reshape"], False),
    ],
)
def test_only_what_follows_a_norm_is_smoothed(operators, smoothed):
    names = ["x", *map(str, range(len(operators)))]
    nodes = [
        helper.make_node(operator, [before], [name])
        for operator, before, name in zip(operators, names, names[1:], strict=False)
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert follows_norm(model, names[-1]) == smoothed


def test_float_channels_are_multiplied_beside_the_int8_product(monkeypatch):
    monkeypatch.setattr(search, "CHANNEL_COUNTS", (2,))
    rows = RNG.standard_normal((50, 32)).astype(np.float32)
    rows[:, [4, 9]] *= 50
    model = graph(rows)
    (fit,) = quantize(model, seen(rows)).values()
    assert fit.float_channels.tolist() == [4, 9]
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("MatMulIntegerToFloat"), kinds.count("MatMul")) == (1, 1)
    assert noise(model, graph(rows), np.arange(50)[None]) < 1e-3


def test_a_graph_with_split_channels_equals_the_float_one(monkeypatch):
    """Of Gelu-like values, one channel far exceeds the rest."""
    fit = ranges.fit_smoothing
    monkeypatch.setattr(ranges, "fit_smoothing", lambda *a, **k: replace(fit(*a, **k), error=1.0))
    rows = np.maximum(RNG.standard_normal((2048, 192)), -0.17).astype(np.float32)
    rows[:, 7] = RNG.uniform(-0.17, 40, 2048)
    weight = (RNG.standard_normal((192, 16)) * 0.1).astype(np.float32)
    split = ranges.fit_outlier_splits(seen(rows)["x"], [weight])[1]
    assert set(split.columns) == {7}
    assert float(split.range.scale) < 40 / 255 / 1.9
    inputs = split.apply(rows)
    total = inputs[:, 7] + (inputs[:, 192:] - split.floor).sum(axis=1)
    # Each split channel is off by half a step at most.
    assert np.abs(total - rows[:, 7]).max() <= float(split.range.scale) * (len(split.columns) + 1)
    model = graph(rows, weight)
    assert len(quantize(model, seen(rows))["x"].columns) >= 1
    assert {"Concat", "Sub"} <= {node.op_type for node in model.graph.node}
    assert noise(model, graph(rows, weight), np.arange(0, 2048, 7)[None]) < 0.001
