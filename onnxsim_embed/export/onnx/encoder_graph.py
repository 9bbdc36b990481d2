"""BERT encoder -> ONNX graph, fp32 and int8, in two layouts that share their weights.

*portable*: input_ids and attention_mask, int64 (batch, sequence); last_hidden_state, float32 (batch,
sequence, hidden). What every reader takes.

*run*: input_ids, int64 (sequence, batch), rows of equal length, no mask; hidden, float32 (sequence,
batch, hidden). For our own run path: no masking, and attention reads query, key and value where the
linears left them (onnxruntime's FusedMatMul takes the transposition as a stride).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsim_embed.export.encoder import Encoder, Layer, Norm, StaticLinear
from onnxsim_embed.export.onnx.builder import MICROSOFT, GraphBuilder

Layout = Literal["portable", "run"]

# What a padded position adds to a score before softmax: exp() of it is exactly 0 in float32, and a
# row that is all padding still gets finite weights.
MASKED_SCORE = np.float32(-10000.0)


def build_encoder(
    encoder: Encoder, layout: Layout = "portable", expose: Sequence[str] = ()
) -> onnx.ModelProto:
    """Build the encoder.

    :param layout: see the module's docstring.
    :param expose: inner values to add as outputs (calibration reads them).
    """
    b = GraphBuilder()
    portable = layout == "portable"
    x = _embeddings(b, encoder, portable)
    mask = _additive_mask(b) if portable else None
    for number, layer in enumerate(encoder.layers):
        x = _layer(b, encoder, layer, x, mask, f"layer{number}")
    output = "last_hidden_state" if portable else "hidden"
    b.nodes[-1].output[0] = output
    axes = ["batch", "sequence"] if portable else ["sequence", "batch"]
    inputs = ["input_ids", "attention_mask"] if portable else ["input_ids"]
    return b.model(
        [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [*axes, encoder.hidden])]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in expose],
    )


def _embeddings(b: GraphBuilder, encoder: Encoder, portable: bool) -> str:
    words = b.embedding(encoder.words, "words", "embeddings.", "embeddings.words")
    axis = 1 if portable else 0
    length = b.op("Shape", "input_ids", name="sequence_length", start=axis, end=axis + 1)
    zero = b.constant("zero", np.array([0], np.int64))
    table = b.constant("positions", encoder.positions if portable else encoder.positions[:, None])
    positions = b.op("Slice", table, zero, length, zero, name="embeddings.positions")
    total = b.op("Add", words, positions, name="embeddings.sum")
    return _norm(b, encoder, encoder.norm, total, "embeddings.norm")


def _additive_mask(b: GraphBuilder) -> str:
    real = b.op("Cast", "attention_mask", name="mask.real", to=TensorProto.FLOAT)
    padded = b.op("Sub", b.constant("one", np.float32(1)), real, name="mask.padded")
    scores = b.op("Mul", padded, b.constant("masked_score", MASKED_SCORE), name="mask.scores")
    axes = b.constant("mask.axes", np.array([1, 2], np.int64))
    return b.op("Unsqueeze", scores, axes, name="mask")


def _layer(
    b: GraphBuilder, encoder: Encoder, layer: Layer, x: str, mask: str | None, name: str
) -> str:
    attend = _attention_strided if mask is None else partial(_attention_masked, mask=mask)
    context = attend(b, _heads(b, encoder, layer, x, name), name)
    flat = b.constant("hidden.shape", np.array([0, 0, encoder.hidden], np.int64))
    context = b.op("Reshape", context, flat, name=f"{name}.context")
    attended = b.linear(layer.output, context, f"{name}.output")
    x = b.op("Add", x, attended, name=f"{name}.attended")
    x = _norm(b, encoder, layer.attention_norm, x, f"{name}.attention_norm")
    up = b.linear(layer.up, x, f"{name}.up")
    fused = isinstance(layer.down, StaticLinear)
    inner = _activation(b, encoder.activation, up, f"{name}.activation", fused)
    down = b.linear(layer.down, inner, f"{name}.down")
    total = b.op("Add", x, down, name=f"{name}.sum")
    return _norm(b, encoder, layer.norm, total, f"{name}.norm")


def _heads(b: GraphBuilder, encoder: Encoder, layer: Layer, x: str, name: str) -> list[str]:
    """Project to query, key and value, each (., ., heads, head width)."""
    shape = b.constant("heads.shape", np.array([0, 0, encoder.heads, encoder.head_width], np.int64))
    linears = {"query": layer.query, "key": layer.key, "value": layer.value}
    return [
        b.op("Reshape", b.linear(linear, x, f"{name}.{key}"), shape, name=f"{name}.{key}.heads")
        for key, linear in linears.items()
    ]


def _attention_masked(b: GraphBuilder, heads: Sequence[str], name: str, mask: str) -> str:
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    query, key, value = (
        b.op("Transpose", head, name=f"{head}.split", perm=order)
        for head, order in zip(heads, orders, strict=True)
    )
    scores = b.op("MatMul", query, key, name=f"{name}.scores")
    scores = b.op("Add", scores, mask, name=f"{name}.scores.masked")
    weights = b.op("Softmax", scores, name=f"{name}.weights", axis=-1)
    context = b.op("MatMul", weights, value, name=f"{name}.context.split")
    return b.op("Transpose", context, name=f"{name}.context.joined", perm=[0, 2, 1, 3])


def _attention_strided(b: GraphBuilder, heads: Sequence[str], name: str) -> str:
    query, key, value = heads  # each (sequence, batch, heads, head width)
    fused: dict[str, Any] = {"domain": MICROSOFT, "alpha": 1.0, "transBatchB": 1}
    # transBatch: leading axes (batch, heads) come from axes 1 and 2, the matrix rows from axis 0.
    scores = b.op(
        "FusedMatMul", query, key, name=f"{name}.scores", transBatchA=1, transB=1, **fused
    )
    weights = b.op("Softmax", scores, name=f"{name}.weights", axis=-1)
    context = b.op("FusedMatMul", weights, value, name=f"{name}.context.split", **fused)
    return b.op("Transpose", context, name=f"{name}.context.joined", perm=[2, 0, 1, 3])


def _norm(b: GraphBuilder, encoder: Encoder, norm: Norm, x: str, name: str) -> str:
    # Not onnxruntime's SkipLayerNormalization: Add and LayerNormalization measured faster.
    weight, bias = b.constant(f"{name}.weight", norm.weight), b.constant(f"{name}.bias", norm.bias)
    return b.op("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=encoder.epsilon)


def _activation(b: GraphBuilder, activation: str, x: str, name: str, fused: bool) -> str:
    """Emit the activation; `fused` graphs hold onnxruntime's operators anyway and take its Gelu."""
    if activation == "relu":
        return b.op("Relu", x, name=name)
    if activation == "gelu" and fused:
        return b.op("Gelu", x, name=name, domain=MICROSOFT)
    half, one = b.constant("half", np.float32(0.5)), b.constant("one", np.float32(1))
    if activation == "gelu":  # written out as onnxruntime's fusion expects it
        sqrt2 = b.constant("sqrt2", np.float32(np.sqrt(2)))
        curve = b.op("Erf", b.op("Div", x, sqrt2, name=f"{name}.scaled"), name=f"{name}.erf")
    else:  # the tanh approximation, gelu_new and gelu_pytorch_tanh
        square = b.op("Mul", x, x, name=f"{name}.square")
        cube = b.op("Mul", square, x, name=f"{name}.cube")
        cube = b.op(
            "Mul", cube, b.constant("gelu.cubic", np.float32(0.044715)), name=f"{name}.cubic"
        )
        inner = b.op("Add", x, cube, name=f"{name}.inner")
        scale = b.constant("gelu.scale", np.float32(np.sqrt(2 / np.pi)))
        curve = b.op("Tanh", b.op("Mul", inner, scale, name=f"{name}.scaled"), name=f"{name}.tanh")
    shifted = b.op("Add", curve, one, name=f"{name}.shifted")
    return b.op("Mul", b.op("Mul", x, shifted, name=f"{name}.product"), half, name=name)
