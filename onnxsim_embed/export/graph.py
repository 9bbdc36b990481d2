"""BERT encoder -> ONNX graph, fp32 and int8."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsim_embed.export.bert import AnyLinear, Bert, Layer, Linear, Norm

MICROSOFT = "com.microsoft"  # onnxruntime's own operators
OPSET = 17  # the first with LayerNormalization; every reader in use understands it
IR_VERSION = 8  # goes with opset 17

# What a padded position adds to a score before softmax: exp() of it is exactly 0 in float32, and a
# row that is all padding still gets finite weights.
MASKED_SCORE = np.float32(-10000.0)


@dataclass(frozen=True)
class DynamicLinear:
    """An int8 linear layer whose input range is taken from each batch as it comes.

    :param weight: int8 array (in_features, out_features), symmetric per output channel.
    :param scales: float32 array (out_features,).
    :param bias: float32 array (out_features,) or None.
    """

    weight: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None


@dataclass
class GraphBuilder:
    """Collects nodes and initializers; names what it makes."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    quantized: dict[tuple[str, str], tuple[str, str, str]] = field(default_factory=dict)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Add an initializer once and return its name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def node(
        self,
        operator: str,
        *inputs: str,
        name: str,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401 - onnx's own
    ) -> list[str]:
        """Add a node and return the names of its outputs."""
        names = [f"{name}_{i}" if outputs > 1 else name for i in range(outputs)]
        self.nodes.append(
            helper.make_node(operator, list(inputs), names, name=name, domain=domain, **attributes)
        )
        return names

    def op(
        self,
        operator: str,
        *inputs: str,
        name: str,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401 - onnx's own
    ) -> str:
        """Add a node of one output and return its name."""
        return self.node(operator, *inputs, name=name, domain=domain, **attributes)[0]

    def model(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(
            self.nodes, "encoder", inputs, outputs, list(self.initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="onnxsim-embed")
        model.ir_version = IR_VERSION
        return model


def build_encoder(bert: Bert) -> onnx.ModelProto:
    """Build the encoder as a portable ONNX model.

    Inputs input_ids and attention_mask, int64 (batch, sequence); first and only output
    last_hidden_state, float32 (batch, sequence, hidden).
    """
    b = GraphBuilder()
    x = _embeddings(b, bert)
    mask = _additive_mask(b)
    for number, layer in enumerate(bert.layers):
        x = _layer(b, bert, layer, x, mask, f"layer{number}")
    b.nodes[-1].output[0] = "last_hidden_state"
    axes = ["batch", "sequence"]
    return b.model(
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, axes)
            for name in ("input_ids", "attention_mask")
        ],
        [
            helper.make_tensor_value_info(
                "last_hidden_state", TensorProto.FLOAT, [*axes, bert.hidden]
            )
        ],
    )


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator occurs, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def quantize_weight(
    weight: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantize a weight symmetrically, one scale per output channel.

    :param weight: float32 array (in_features, out_features).
    :returns: int8 array of the same shape within [-127, 127], float32 scales (out_features,).
    """
    scales = np.abs(weight).max(axis=0) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def _embeddings(b: GraphBuilder, bert: Bert) -> str:
    words = b.op("Gather", b.constant("words", bert.words), "input_ids", name="embeddings.words")
    length = b.op("Shape", "input_ids", name="sequence_length", start=1, end=2)
    zero = b.constant("zero", np.array([0], np.int64))
    positions = b.op(
        "Slice",
        b.constant("positions", bert.positions),
        zero,
        length,
        zero,
        name="embeddings.positions",
    )
    return _norm(
        b, bert, bert.norm, b.op("Add", words, positions, name="embeddings.sum"), "embeddings.norm"
    )


def _additive_mask(b: GraphBuilder) -> str:
    real = b.op("Cast", "attention_mask", name="mask.real", to=TensorProto.FLOAT)
    padded = b.op("Sub", b.constant("one", np.float32(1)), real, name="mask.padded")
    scores = b.op("Mul", padded, b.constant("masked_score", MASKED_SCORE), name="mask.scores")
    return b.op(
        "Unsqueeze", scores, b.constant("mask.axes", np.array([1, 2], np.int64)), name="mask"
    )


def _layer(b: GraphBuilder, bert: Bert, layer: Layer, x: str, mask: str, name: str) -> str:
    heads = b.constant("heads", np.array([0, 0, bert.heads, bert.head_width], np.int64))
    parts = []
    for part, linear, order in (
        ("query", layer.query, [0, 2, 1, 3]),
        ("key", layer.key, [0, 2, 3, 1]),
        ("value", layer.value, [0, 2, 1, 3]),
    ):
        flat = _linear(b, linear, x, f"{name}.{part}")
        split = b.op("Reshape", flat, heads, name=f"{name}.{part}.heads")
        parts.append(b.op("Transpose", split, name=f"{name}.{part}.split", perm=order))
    query, key, value = parts
    scores = b.op("MatMul", query, key, name=f"{name}.scores")
    scores = b.op("Add", scores, mask, name=f"{name}.scores.masked")
    weights = b.op("Softmax", scores, name=f"{name}.weights", axis=-1)
    context = b.op("MatMul", weights, value, name=f"{name}.context")
    context = b.op("Transpose", context, name=f"{name}.context.joined", perm=[0, 2, 1, 3])
    context = b.op(
        "Reshape",
        context,
        b.constant("hidden", np.array([0, 0, bert.hidden], np.int64)),
        name=f"{name}.context.flat",
    )
    attended = _linear(b, layer.output, context, f"{name}.output")
    x = _norm(
        b,
        bert,
        layer.attention_norm,
        b.op("Add", x, attended, name=f"{name}.attended"),
        f"{name}.attention_norm",
    )
    inner = _activation(
        b, bert.activation, _linear(b, layer.up, x, f"{name}.up"), f"{name}.activation"
    )
    down = _linear(b, layer.down, inner, f"{name}.down")
    return _norm(b, bert, layer.norm, b.op("Add", x, down, name=f"{name}.sum"), f"{name}.norm")


def _norm(b: GraphBuilder, bert: Bert, norm: Norm, x: str, name: str) -> str:
    weight, bias = b.constant(f"{name}.weight", norm.weight), b.constant(f"{name}.bias", norm.bias)
    return b.op("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=bert.epsilon)


def _activation(b: GraphBuilder, activation: str, x: str, name: str) -> str:
    if activation == "relu":
        return b.op("Relu", x, name=name)
    half, one = b.constant("half", np.float32(0.5)), b.constant("one", np.float32(1))
    if activation == "gelu":  # written out as onnxruntime's fusion expects it
        scaled = b.op("Div", x, b.constant("sqrt2", np.float32(np.sqrt(2))), name=f"{name}.scaled")
        curve = b.op("Erf", scaled, name=f"{name}.erf")
    else:  # the tanh approximation, gelu_new and gelu_pytorch_tanh
        cube = b.op("Pow", x, b.constant("three", np.float32(3)), name=f"{name}.cube")
        cube = b.op(
            "Mul", cube, b.constant("gelu.cubic", np.float32(0.044715)), name=f"{name}.cubic"
        )
        inner = b.op("Add", x, cube, name=f"{name}.inner")
        inner = b.op(
            "Mul",
            inner,
            b.constant("gelu.scale", np.float32(np.sqrt(2 / np.pi))),
            name=f"{name}.scaled",
        )
        curve = b.op("Tanh", inner, name=f"{name}.tanh")
    shifted = b.op("Add", curve, one, name=f"{name}.shifted")
    product = b.op("Mul", x, shifted, name=f"{name}.product")
    return b.op("Mul", product, half, name=name)


def _linear(b: GraphBuilder, linear: AnyLinear, x: str, name: str) -> str:
    if isinstance(linear, Linear):
        y = b.op("MatMul", x, b.constant(f"{name}.weight", linear.weight), name=f"{name}.product")
        return (
            y
            if linear.bias is None
            else b.op("Add", y, b.constant(f"{name}.bias", linear.bias), name=name)
        )
    if isinstance(linear, DynamicLinear):
        if (x, "dynamic") not in b.quantized:  # query, key and value share their input
            values, scale, zero = b.node(
                "DynamicQuantizeLinear", x, name=f"{name}.input", outputs=3
            )
            b.quantized[x, "dynamic"] = (values, scale, zero)
        values, scale, zero = b.quantized[x, "dynamic"]
        weight, scales = (
            b.constant(f"{name}.weight", linear.weight),
            b.constant(f"{name}.scales", linear.scales),
        )
        inputs = [values, weight, scale, scales, zero]
        if linear.bias is not None:
            inputs += ["", b.constant(f"{name}.bias", linear.bias)]
        return b.op("MatMulIntegerToFloat", *inputs, name=name, domain=MICROSOFT)
    raise TypeError(f"{name}: cannot emit {type(linear).__name__}")
