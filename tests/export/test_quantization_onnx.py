"""Linears of any graph become int8: found, split where channels stand out, kept where it does not pay."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsim_embed.export.quantization import onnx as module
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.onnx import find_linears, quantize_graph
from onnxsim_embed.export.quantization.ranges import fit_outlier_split

RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((32, 24)) * 0.2).astype(np.float32)
BIAS = RNG.standard_normal(24).astype(np.float32)


def graph(*, bias: bool = True, words: bool = True) -> onnx.ModelProto:
    """input_ids -> table -> one linear; its bias on the left of the Add, as exporters put it."""
    table = RNG.standard_normal((50, 32)).astype(np.float32)
    constants = {"table": table, "weight": WEIGHT, "bias": BIAS}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="words"),
        helper.make_node("MatMul", ["x", "weight"], ["y" if bias else "out"], name="linear"),
    ]
    if bias:
        nodes.append(helper.make_node("Add", ["bias", "y"], ["out"], name="add"))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", "t", 24])
    made = helper.make_graph(
        nodes, "g", [ids], [out],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def run(model: onnx.ModelProto, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["out"], {"input_ids": ids})[0]


def seen(rows: np.ndarray) -> Activations:
    return Activations(rows.min(axis=0), rows.max(axis=0), rows)


def table_rows(model: onnx.ModelProto) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "table")


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_found_with_its_bias(bias):
    (found,) = find_linears(graph(bias=bias))
    assert (found.name, found.input, found.outputs[-1]) == ("linear", "x", "out")
    assert np.array_equal(found.linear.weight, WEIGHT)
    assert (found.linear.bias is None) != bias


def test_a_product_that_something_else_reads_keeps_its_add():
    model = graph()
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    (found,) = find_linears(model)
    assert (found.outputs[-1], found.linear.bias) == ("y", None)


@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_graph_gives_nearly_the_same(bias):
    model = graph(bias=bias)
    ids = np.arange(50)[None]
    exact = run(model, ids)
    notes = quantize_graph(model, {"x": seen(table_rows(model))}, 0.02)
    onnx.checker.check_model(model)
    assert [list(note) for note in notes] == [["linear"]]
    kinds = [node.op_type for node in model.graph.node]
    assert "MatMul" not in kinds
    assert kinds.count("MatMulIntegerToFloat") == kinds.count("QuantizeLinear") == 1
    assert not {"table", "weight"} & {t.name for t in model.graph.initializer}
    error = np.square(run(model, ids) - exact).mean() / exact.var()
    assert 0 < error < 0.001


def test_what_misses_the_budget_or_was_not_seen_stays_float32():
    model = graph()
    (note,) = quantize_graph(model, {"x": seen(table_rows(model))}, 0.0)
    assert note["linear"]["kept"] == "float32"
    assert [node.op_type for node in model.graph.node][-2:] == ["MatMul", "Add"]
    assert quantize_graph(graph(), {}, 0.02) == ()


def outliers(reach: float) -> np.ndarray:
    """2,048 tokens of Gelu-like values, one channel of which reaches far beyond the rest."""
    rows = np.maximum(RNG.standard_normal((2048, 192)), -0.17).astype(np.float32)
    rows[:, 7] = RNG.uniform(-0.17, reach, 2048)
    return rows


def test_an_outlier_channel_is_split_and_its_copies_add_up():
    rows = outliers(40)
    weight = (RNG.standard_normal((192, 16)) * 0.1).astype(np.float32)
    split = fit_outlier_split(seen(rows), [weight])
    assert set(split.columns) == {7}
    inputs = split.apply(rows)
    total = inputs[:, 7] + (inputs[:, 192:] - split.floor).sum(axis=1)
    # Each copy is off by half a step at most.
    most = float(split.range.scale) * (len(split.columns) + 1)
    assert np.abs(total - rows[:, 7]).max() <= most
    whole = float(40 / 255)
    assert float(split.range.scale) < whole / 1.9


def test_without_outliers_nothing_is_copied():
    rows = RNG.uniform(-0.17, 3, (2048, 192)).astype(np.float32)
    split = fit_outlier_split(seen(rows), [np.eye(192, dtype=np.float32)])
    assert len(split.columns) == 0
    assert split.range.ends[1] >= 3 * 0.99


def test_a_graph_with_a_split_equals_the_float_one(monkeypatch):
    fit = module.ranges.fit_smoothing
    monkeypatch.setattr(
        module.ranges, "fit_smoothing", lambda *a, **k: replace(fit(*a, **k), error=1.0)
    )
    rows = outliers(40)
    weight = (RNG.standard_normal((192, 16)) * 0.1).astype(np.float32)
    model = graph()
    for tensor in model.graph.initializer:
        new = {"table": rows, "weight": weight, "bias": BIAS[:16]}[tensor.name]
        tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 16
    ids = np.arange(0, 2048, 7)[None]
    exact = run(model, ids)
    (note,) = quantize_graph(model, {"x": seen(rows)}, 0.02)
    assert note["linear"]["copies"] >= 1
    assert {"Concat", "Sub"} <= {node.op_type for node in model.graph.node}
    assert np.square(run(model, ids) - exact).mean() / exact.var() < 0.001
