"""Encoder -> ONNX graph, fp32 and int8, in layouts that share their weights.

*portable*: input_ids and attention_mask, int64 (batch, sequence); last_hidden_state, float32 (batch,
sequence, hidden). What every reader takes.

*run*: input_ids, int64 (sequence, batch), rows of equal length, no mask; hidden, float32 (sequence,
batch, hidden). For our own run path: no masking, and attention reads query, key and value where the
linears left them (onnxruntime's FusedMatMul takes the transposition as a stride).

*gpu*: like *portable*, in onnxruntime's fused operators, for our own run path on CUDA. In place of the mask
it takes key_lengths, int32 (3 batch + 2): the real tokens of each row, padded on the right, then the first
position of each row and the end, for queries and for keys. The one form that its fast kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsim_embed.export.encoder import Encoder, Layer, Norm, StaticLinear
from onnxsim_embed.export.onnx.builder import MICROSOFT, GraphBuilder
from onnxsim_embed.system.arrays import Float32

Layout = Literal["portable", "run", "gpu"]

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
    axis = int(layout != "run")
    length = b.op("Shape", "input_ids", name="sequence_length", start=axis, end=axis + 1)
    x = _embeddings(b, encoder, length, axis)
    added = _relative_bias(b, encoder.relative_bias, length)
    if layout == "portable":
        added = _additive_mask(b, added)
    elif layout == "gpu" and added is not None:  # (1, heads, sequence, sequence)
        added = b.op("Unsqueeze", added, b.constant("batch", np.array([0])), name="relative.batch")
    for number, layer in enumerate(encoder.layers):
        x = _layer(b, encoder, layer, x, added, layout, f"layer{number}")
    output = "hidden" if layout == "run" else "last_hidden_state"
    b.nodes[-1].output[0] = output
    axes = ["batch", "sequence"] if axis else ["sequence", "batch"]
    inputs = [("input_ids", TensorProto.INT64, axes)]
    if layout == "portable":
        inputs.append(("attention_mask", TensorProto.INT64, axes))
    elif layout == "gpu":
        inputs.append(("key_lengths", TensorProto.INT32, ["lengths"]))
    return b.model(
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [*axes, encoder.hidden])]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in expose],
    )


def _embeddings(b: GraphBuilder, encoder: Encoder, length: str, axis: int) -> str:
    words = b.embedding(encoder.words, "words", "embeddings.", "embeddings.words")
    if encoder.skipped is None:
        zero = b.constant("zero", np.array([0], np.int64))
        table = b.constant("positions", encoder.positions if axis else encoder.positions[:, None])
        positions = b.op("Slice", table, zero, length, zero, name="embeddings.positions")
    else:
        table, ids = (
            b.constant("positions", encoder.positions),
            _counted_positions(b, encoder, axis),
        )
        positions = b.op("Gather", table, ids, name="embeddings.positions")
    total = b.op("Add", words, positions, name="embeddings.sum")
    if encoder.projection is None:
        return _norm(b, encoder, encoder.norm, total, "embeddings")
    normed = _norm(b, encoder, encoder.norm, total, "embeddings.norm")
    return b.linear(encoder.projection, normed, "embeddings")


def _counted_positions(b: GraphBuilder, encoder: Encoder, axis: int) -> str:
    # Even without padding: a text may contain the padding token.
    skipped = b.constant("skipped", np.int64(encoder.skipped or 0))
    found = b.op("Equal", "input_ids", skipped, name="positions.skipped")
    kept = b.op("Not", found, name="positions.kept")
    ones = b.op("Cast", kept, name="positions.ones", to=TensorProto.INT64)
    count = b.op("CumSum", ones, b.constant("axis", np.int64(axis)), name="positions.count")
    count = b.op("Mul", count, ones, name="positions.counted")
    return b.op("Add", count, skipped, name="positions.ids")


def _relative_bias(b: GraphBuilder, bias: Float32 | None, length: str) -> str | None:
    """Return the bias (heads, sequence, sequence) of an encoder that has one.

    onnxruntime computes that of all lengths when it loads the file, where it would be megabytes.
    """
    if bias is None:
        return None
    tokens = (bias.shape[1] + 1) // 2
    keys = b.constant("relative.keys", np.arange(tokens - 1, 2 * tokens - 1)[None])
    queries = b.constant("relative.queries", np.arange(tokens)[:, None])
    columns = b.op("Sub", keys, queries, name="relative.columns")
    table = b.constant("relative.bias", bias)
    longest = b.op("Gather", table, columns, name="relative.longest", axis=1)
    ends = b.op("Concat", length, length, name="relative.ends", axis=0)
    zeros = b.constant("relative.zeros", np.array([0, 0], np.int64))
    axes = b.constant("relative.axes", np.array([1, 2], np.int64))
    return b.op("Slice", longest, zeros, ends, axes, name="relative")


def _additive_mask(b: GraphBuilder, bias: str | None) -> str:
    real = b.op("Cast", "attention_mask", name="mask.real", to=TensorProto.FLOAT)
    padded = b.op("Sub", b.constant("one", np.float32(1)), real, name="mask.padded")
    scores = b.op("Mul", padded, b.constant("masked_score", MASKED_SCORE), name="mask.scores")
    axes = b.constant("mask.axes", np.array([1, 2], np.int64))
    mask = b.op("Unsqueeze", scores, axes, name="mask")
    return mask if bias is None else b.op("Add", mask, bias, name="mask.biased")


def _layer(
    b: GraphBuilder,
    encoder: Encoder,
    layer: Layer,
    x: str,
    added: str | None,
    layout: Layout,
    name: str,
) -> str:
    if layout == "gpu":
        return _layer_gpu(b, encoder, layer, x, added, name)
    attend = _attention_portable if layout == "portable" else _attention_strided
    context = attend(b, _heads(b, encoder, layer, x, name), name, added)
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


def _layer_gpu(
    b: GraphBuilder, encoder: Encoder, layer: Layer, x: str, added: str | None, name: str
) -> str:
    linears = {"query": layer.query, "key": layer.key, "value": layer.value}
    inputs = [b.linear(linear, x, f"{name}.{key}") for key, linear in linears.items()]
    context = b.op(
        "MultiHeadAttention", *inputs, "", "key_lengths", added or "", name=f"{name}.context",
        domain=MICROSOFT, num_heads=encoder.heads, scale=1.0,
    )  # fmt: skip
    attended = b.linear(layer.output, context, f"{name}.output")
    x = _skip_norm(b, encoder, layer.attention_norm, x, attended, f"{name}.attention_norm")
    up = b.linear(layer.up, x, f"{name}.up")
    inner = _activation(b, encoder.activation, up, f"{name}.activation", fused=True)
    down = b.linear(layer.down, inner, f"{name}.down")
    return _skip_norm(b, encoder, layer.norm, x, down, f"{name}.norm")


def _skip_norm(b: GraphBuilder, encoder: Encoder, norm: Norm, x: str, added: str, name: str) -> str:
    weight, bias = b.constant(f"{name}.weight", norm.weight), b.constant(f"{name}.bias", norm.bias)
    return b.op(
        "SkipLayerNormalization", added, x, weight, bias, name=name, domain=MICROSOFT,
        epsilon=encoder.epsilon,
    )  # fmt: skip


def _heads(b: GraphBuilder, encoder: Encoder, layer: Layer, x: str, name: str) -> list[str]:
    """Project to query, key and value, each (., ., heads, head width)."""
    shape = b.constant("heads.shape", np.array([0, 0, encoder.heads, encoder.head_width], np.int64))
    linears = {"query": layer.query, "key": layer.key, "value": layer.value}
    return [
        b.op("Reshape", b.linear(linear, x, f"{name}.{key}"), shape, name=f"{name}.{key}.heads")
        for key, linear in linears.items()
    ]


def _attention_portable(b: GraphBuilder, heads: Sequence[str], name: str, added: str | None) -> str:
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    query, key, value = (
        b.op("Transpose", head, name=f"{head}.split", perm=order)
        for head, order in zip(heads, orders, strict=True)
    )
    scores = b.op("MatMul", query, key, name=f"{name}.scores")
    weights = _softmax(b, scores, name, added)
    context = b.op("MatMul", weights, value, name=f"{name}.context.split")
    return b.op("Transpose", context, name=f"{name}.context.joined", perm=[0, 2, 1, 3])


def _attention_strided(b: GraphBuilder, heads: Sequence[str], name: str, added: str | None) -> str:
    query, key, value = heads  # each (sequence, batch, heads, head width)
    fused: dict[str, Any] = {"domain": MICROSOFT, "alpha": 1.0, "transBatchB": 1}
    # transBatch: leading axes (batch, heads) come from axes 1 and 2, the matrix rows from axis 0.
    scores = b.op(
        "FusedMatMul", query, key, name=f"{name}.scores", transBatchA=1, transB=1, **fused
    )
    weights = _softmax(b, scores, name, added)
    context = b.op("FusedMatMul", weights, value, name=f"{name}.context.split", **fused)
    return b.op("Transpose", context, name=f"{name}.context.joined", perm=[2, 0, 1, 3])


def _softmax(b: GraphBuilder, scores: str, name: str, added: str | None) -> str:
    if added is not None:
        scores = b.op("Add", scores, added, name=f"{name}.scores.sum")
    return b.op("Softmax", scores, name=f"{name}.weights", axis=-1)


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
