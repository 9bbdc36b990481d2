"""Encoders that exist only as an ONNX file: what calibration observes, and what the file must give."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import random_token_ids

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.graph_encoder import hidden_size, observe_linears
from onnxsim_embed.export.onnx.builder import GraphBuilder
from onnxsim_embed.export.quantization.encoder import Quantizer
from onnxsim_embed.export.quantization.onnx import fit_graph, quantize_graph

RNG = np.random.default_rng(0)


def write_graph(
    path, positions: bool = True, words: bool = True, scale: float = 1.0
) -> onnx.ModelProto:
    """Token embeddings and five relative positions, each through a linear layer, added up."""
    b = GraphBuilder()
    table, relative, weight = (
        RNG.standard_normal((rows, 32)).astype(np.float32) for rows in (150, 5, 32)
    )
    y = b.embedding(table * np.float32(scale), "table", "", "x")
    q = b.op("Gather", b.constant("relative", relative), b.constant("five", np.arange(5)), name="p")
    if words:
        y = b.op("MatMul", y, b.constant("weight", weight), name="y")
    if positions:
        q = b.op("MatMul", q, b.constant("weight", weight), name="q")
    mean = b.op("ReduceMean", q, name="mean", axes=[0], keepdims=0)
    b.op("Add", y, mean, name="last_hidden_state")
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask")]
    model = b.model(inputs, [info("last_hidden_state", TensorProto.FLOAT, ["b", "t", 32])])
    onnx.save(model, path)
    return model


def test_a_linear_without_an_input_for_each_token_stays_float32_with_a_warning(tmp_path, caplog):
    """Relative positions, as in DeBERTa; a text of five tokens has an input of the same size."""
    model = write_graph(tmp_path / "m.onnx")
    texts = [np.arange(length) for length in range(2, 40)] + [np.zeros(0, np.int64)]
    seen = observe_linears(tmp_path / "m.onnx", texts)
    assert set(seen) == {"x"}
    assert "1 linear layers" in caplog.text
    groups = fit_graph(model, seen)
    choice = {name: group.fits[0] for name, group in groups.items()}
    quantize_graph(model, choice, Quantizer(groups)(choice, final=True))
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("MatMul"), kinds.count("MatMulIntegerToFloat")) == (1, 1)


@pytest.mark.parametrize("graph", [{"words": False}, {"positions": False, "scale": np.inf}])
def test_a_graph_without_a_finite_input_for_each_token_is_an_error(tmp_path, graph):
    write_graph(tmp_path / "m.onnx", **graph)
    with pytest.raises(CheckpointError, match="export fp32 only"):
        observe_linears(tmp_path / "m.onnx", random_token_ids(0, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: graph.node.append(helper.make_node("Add", ["nowhere"] * 2, ["z"])), "run"),
        (lambda graph: setattr(graph.node[2], "op_type", "Gemm"), "run"),
        (lambda graph: graph.node[-1].input.__setitem__(0, "mean"), "shape"),
    ],
)
def test_a_file_that_gives_no_hidden_states_is_an_error(tmp_path, change, message):
    model = write_graph(tmp_path / "m.onnx")
    assert hidden_size(tmp_path / "m.onnx") == 32
    change(model.graph)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=message):
        hidden_size(tmp_path / "m.onnx")
    write_graph(tmp_path / "m.onnx", scale=np.inf)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        hidden_size(tmp_path / "m.onnx")
