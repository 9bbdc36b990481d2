"""The int8 graphs: operators counted, two layouts that agree, weights shared between two files."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from support import VOCABULARY, bert_config, bert_tensors

from onnxsim_embed.export.bert import ACTIVATIONS, load_bert
from onnxsim_embed.export.onnx.bert_graph import build_encoder
from onnxsim_embed.export.onnx.builder import (
    MICROSOFT,
    SHARED_BYTES,
    GraphBuilder,
    operator_counts,
    share_constants,
)
from onnxsim_embed.export.quantization.bert import quantize_static
from onnxsim_embed.export.quantization.calibration import collect_activations

LAYERS = 2
LAYOUTS = ["portable", "run"]
SHAPES = [(1, 1), (5, 12), (1, 64), (33, 7)]

COMMON = {
    "Add": 1 + 2 * LAYERS,
    "Cast": 1,
    "Gather": 2,
    "Gelu": LAYERS,
    "LayerNormalization": 1 + 2 * LAYERS,
    "MatMulIntegerToFloat": 6 * LAYERS,
    "QuantizeLinear": 4 * LAYERS,
    "Reshape": 4 * LAYERS,
    "Shape": 1,
    "Slice": 1,
    "Softmax": LAYERS,
}
SMOOTHED = 2 * LAYERS  # the inputs of query, key and value, and of up
INT8_COUNTS = {
    "run": COMMON | {"FusedMatMul": 2 * LAYERS, "Mul": 1 + SMOOTHED, "Transpose": LAYERS},
    "portable": COMMON
    | {
        "Add": COMMON["Add"] + LAYERS,  # the mask
        "Cast": 2,
        "MatMul": 2 * LAYERS,  # scores and context
        "Mul": 2 + SMOOTHED,
        "Sub": 1,
        "Transpose": 4 * LAYERS,
        "Unsqueeze": 1,
    },
}


def make(activation: str = "gelu", **changes):
    config = bert_config(hidden_act=activation, num_hidden_layers=LAYERS, **changes)
    return load_bert(config, bert_tensors(config))


def quantize(bert):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 60)
    seen = collect_activations(bert, [rng.integers(5, len(VOCABULARY), n) for n in lengths])
    return quantize_static(bert, seen).bert


@pytest.fixture(scope="module")
def berts():
    bert = make()
    return {"fp32": bert, "int8": quantize(bert)}


def open_session(model) -> onnxruntime.InferenceSession:
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def hidden(session: onnxruntime.InferenceSession, ids: np.ndarray) -> np.ndarray:
    """Run either layout on rows of equal length; return (batch, tokens, hidden)."""
    if len(session.get_inputs()) == 1:
        [made] = session.run(None, {"input_ids": np.ascontiguousarray(ids.T)})
        return made.transpose(1, 0, 2)
    return session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).integers(5, len(VOCABULARY), shape)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# Form


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_of_the_tiny_int8_model(berts, layout):
    assert operator_counts(build_encoder(berts["int8"], layout)) == dict(
        sorted(INT8_COUNTS[layout].items())
    )


def test_operators_of_the_fp32_run_path(berts):
    counts = operator_counts(build_encoder(berts["fp32"], "run"))
    assert counts["FusedMatMul"] == 2 * LAYERS
    assert counts["Transpose"] == LAYERS
    assert counts["MatMul"] == 6 * LAYERS
    assert not {"Unsqueeze", "Sub", "Gelu", "QuantizeLinear"} & set(counts)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_are_valid_and_their_names_unique(berts, precision, layout):
    model = build_encoder(berts[precision], layout)
    onnx.checker.check_model(model)
    names = [node.name for node in model.graph.node] + [t.name for t in model.graph.initializer]
    assert max(Counter(names).values()) == 1
    made = [name for node in model.graph.node for name in node.output]
    assert max(Counter(made).values()) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnxruntime_s_operators_are_declared_where_they_are_used(berts, layout):
    for bert in berts.values():
        model = build_encoder(bert, layout)
        used = {node.domain for node in model.graph.node}
        assert {opset.domain for opset in model.opset_import} == used | {""}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_constant_is_idle(berts, precision):
    for layout in LAYOUTS:
        model = build_encoder(berts[precision], layout)
        used = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= used


def test_inputs_and_outputs_of_the_run_path(berts):
    model = build_encoder(berts["int8"], "run")
    [ids], [output] = model.graph.input, model.graph.output
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (ids, output)
    ]
    assert (ids.name, output.name) == ("input_ids", "hidden")
    assert shapes == [["sequence", "batch"], ["sequence", "batch", 32]]


def test_inner_values_can_be_exposed(berts):
    model = build_encoder(berts["fp32"], "run", expose=["layer0.up", "layer1.context"])
    values = open_session(model).run(None, {"input_ids": random_ids(9, 3)})
    assert [value.shape for value in values] == [(9, 3, 32), (9, 3, 64), (9, 3, 32)]


def test_a_layer_that_is_no_layer_is_refused(berts):
    from dataclasses import replace

    bert = berts["fp32"]
    broken = replace(bert, layers=(replace(bert.layers[0], up=3), *bert.layers[1:]))
    with pytest.raises(TypeError, match=r"layer0\.up: "):
        build_encoder(broken)


# Numbers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_layouts_agree(activation, shape):
    bert = make(activation)
    ids = random_ids(*shape)
    portable, run = (hidden(open_session(build_encoder(bert, layout)), ids) for layout in LAYOUTS)
    assert np.abs(portable - run).max() < 1e-5
    int8 = quantize(bert)
    portable, run = (hidden(open_session(build_encoder(int8, layout)), ids) for layout in LAYOUTS)
    assert cosines(portable, run).min() > 0.9999


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_is_close_to_fp32(activation):
    bert = make(activation)
    ids = random_ids(40, 20)
    fp32, int8 = (
        hidden(open_session(build_encoder(b, "run")), ids) for b in (bert, quantize(bert))
    )
    assert cosines(fp32.mean(axis=1), int8.mean(axis=1)).min() > 0.995


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_on_the_run_path_a_row_does_not_depend_on_its_batch(berts, precision, tokens):
    session = open_session(build_encoder(berts[precision], "run"))
    ids = random_ids(23, tokens)
    together = hidden(session, ids)
    order = np.random.default_rng(1).permutation(len(ids))
    assert np.array_equal(hidden(session, ids[order]), together[order])
    for rows in (1, 2, 5, 16):
        parts = [hidden(session, ids[i : i + rows]) for i in range(0, len(ids), rows)]
        assert np.array_equal(np.concatenate(parts), together)


def test_padding_does_not_reach_the_real_tokens_of_int8(berts):
    session = open_session(build_encoder(berts["int8"], "portable"))
    ids = random_ids(4, 9)
    alone = hidden(session, ids)
    padded = np.concatenate([ids, random_ids(4, 30)], axis=1)
    mask = np.tile(np.arange(39) < 9, (4, 1)).astype(np.int64)
    beside = session.run(None, {"input_ids": padded, "attention_mask": mask})[0][:, :9]
    assert cosines(alone, beside).min() > 0.9999


# Shared constants


@pytest.fixture(params=["fp32", "int8"])
def pair(request, berts, tmp_path):
    """The portable file, and the run-path graph before it is shared."""
    holder = tmp_path / "model.onnx"
    onnx.save(build_encoder(berts[request.param], "portable"), holder)
    return holder, build_encoder(berts[request.param], "run")


def large(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [t for t in model.graph.initializer if len(t.raw_data) >= SHARED_BYTES]


def test_a_shared_graph_is_small_and_loads_beside_its_holder(pair):
    holder, model = pair
    ids = random_ids(6, 15)
    before = hidden(open_session(model), ids)
    whole, number = model.ByteSize(), len(large(model))
    left = share_constants(model, holder)
    assert number > 10
    assert not large(model)
    assert left == model.ByteSize() < whole / 2
    path = holder.with_name("encoder.onnx")
    onnx.save(model, path)
    assert sorted(p.name for p in holder.parent.iterdir()) == ["encoder.onnx", "model.onnx"]
    assert np.array_equal(hidden(open_session(path), ids), before)


def test_references_name_the_bytes_of_the_holder(pair):
    holder, model = pair
    values = {tensor.name: tensor.raw_data for tensor in large(model)}
    share_constants(model, holder)
    data = holder.read_bytes()
    for tensor in model.graph.initializer:
        if tensor.name in values:
            where = {entry.key: entry.value for entry in tensor.external_data}
            offset = int(where["offset"])
            assert where["location"] == "model.onnx"
            assert data[offset : offset + int(where["length"])] == values[tensor.name]


def test_small_constants_stay_in_the_file(pair):
    holder, model = pair
    before = {t.name: t.raw_data for t in model.graph.initializer if len(t.raw_data) < SHARED_BYTES}
    share_constants(model, holder)
    after = {t.name: t.raw_data for t in model.graph.initializer if t.raw_data}
    assert after == before


def test_a_constant_that_the_holder_lacks_is_named(tmp_path):
    holder = tmp_path / "model.onnx"
    onnx.save(build_encoder(make(), "portable"), holder)
    b = GraphBuilder()
    b.constant("another", np.arange(1000.0))
    with pytest.raises(ValueError, match=r"model\.onnx lacks the constant 'another'"):
        share_constants(b.model([], []), holder)


# The writer


def test_a_constant_is_added_once_and_keeps_shape_and_type():
    b = GraphBuilder()
    assert b.constant("a", np.float32(2)) == "a"
    b.constant("a", np.zeros(5))
    b.constant("b", np.arange(6).reshape(2, 3).T)
    found = {name: onnx.numpy_helper.to_array(t) for name, t in b.initializers.items()}
    assert found["a"].shape == ()
    assert found["a"].dtype == np.float32
    assert np.array_equal(found["b"], np.arange(6).reshape(2, 3).T)


def test_operators_are_counted_and_sorted():
    b = GraphBuilder()
    b.op("Relu", b.op("Add", "x", "x", name="sum"), name="positive")
    b.op(
        "FusedMatMul", "positive", b.op("Add", "x", "sum", name="more"), name="y", domain=MICROSOFT
    )
    model = b.model([], [])
    assert list(operator_counts(model).items()) == [("Add", 2), ("FusedMatMul", 1), ("Relu", 1)]
    assert [opset.domain for opset in model.opset_import] == ["", MICROSOFT]
