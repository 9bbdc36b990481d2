"""The graph writer: constants, linear layers, and constants shared between two files."""

import numpy as np
import onnx
import pytest
from support import calibrate, quantize, random_token_ids, run_onnx, tiny_bert

from onnxsim_embed.export.encoder import InputQuantization, Int8Table, StaticLinear
from onnxsim_embed.export.onnx.builder import GraphBuilder, share_constants
from onnxsim_embed.export.onnx.encoder_graph import build_encoder


def test_a_constant_is_added_once_and_keeps_shape_and_type():
    b = GraphBuilder()
    assert b.constant("a", np.float32(2)) == "a"
    b.constant("a", np.zeros(5))
    b.constant("b", np.arange(6).reshape(2, 3).T)
    values = {name: onnx.numpy_helper.to_array(t) for name, t in b.initializers.items()}
    assert (values["a"].shape, values["a"].dtype) == ((), np.float32)
    assert np.array_equal(values["b"], np.arange(6).reshape(2, 3).T)


@pytest.mark.parametrize("separator", [".", "::"])
def test_int8_linears_of_one_input_quantize_it_once(separator):
    b = GraphBuilder(separator)
    quantization = InputQuantization(np.float32(0.1), np.uint8(3), np.ones(4, np.float32))
    for name in "ab":
        weight, scales = np.ones((4, 2), np.int8), np.ones(2, np.float32)
        assert b.linear(StaticLinear(weight, scales, None, quantization), "x", name) == name
    kinds = [node.op_type for node in b.nodes]
    assert kinds == ["Mul", "QuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"]
    assert {node.input[0] for node in b.nodes[2:]} == {f"x{separator}quantized"}


def test_rows_of_an_int8_table_are_scaled():
    b = GraphBuilder()
    table = Int8Table(np.arange(-6, 6, dtype=np.int8).reshape(4, 3), np.float32([1, 2, 3, 4]))
    b.embedding(table, "words", "e.", "y")
    info = onnx.helper.make_tensor_value_info
    ids, y = (
        info("input_ids", onnx.TensorProto.INT64, ["n"]),
        info("y", onnx.TensorProto.FLOAT, None),
    )
    [rows] = run_onnx(b.model([ids], [y]), np.array([3, 0]))
    assert np.array_equal(rows, (table.values * table.scales[:, None])[[3, 0]])


# Shared constants


@pytest.fixture(scope="module")
def berts():
    bert = tiny_bert()
    seen = calibrate(bert, random_token_ids(0, 60))
    return {"fp32": bert, "int8": quantize(bert, seen)[0]}


@pytest.fixture(params=["fp32", "int8"])
def pair(request, berts, tmp_path):
    """The portable file, and the run-path graph before it is shared."""
    holder = tmp_path / "model.onnx"
    onnx.save(build_encoder(berts[request.param], "portable"), holder)
    return holder, build_encoder(berts[request.param], "run")


def test_a_shared_graph_is_small_and_loads_beside_its_holder(pair):
    holder, model = pair
    ids = np.random.default_rng(6).integers(5, 90, (6, 15))
    before, size = run_onnx(model, ids)[0], model.ByteSize()
    share_constants(model, holder)
    assert model.ByteSize() < size / 2
    path = holder.with_name("encoder.onnx")
    onnx.save(model, path)
    assert sorted(p.name for p in holder.parent.iterdir()) == ["encoder.onnx", "model.onnx"]
    assert np.array_equal(run_onnx(path, ids)[0], before)


def test_a_constant_that_the_holder_lacks_is_named(tmp_path):
    holder = tmp_path / "model.onnx"
    onnx.save(build_encoder(tiny_bert(), "portable"), holder)
    b = GraphBuilder()
    b.constant("another", np.arange(1000.0))
    with pytest.raises(ValueError, match="another"):
        share_constants(b.model([], []), holder)
