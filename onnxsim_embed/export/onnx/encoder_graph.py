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
    return _EncoderBuilder(encoder, layout).build(expose)


class _EncoderBuilder(GraphBuilder):
    def __init__(self, encoder: Encoder, layout: Layout) -> None:
        super().__init__()
        self.encoder, self.layout = encoder, layout
        self.axis = int(layout != "run")  # of the sequence

    def build(self, expose: Sequence[str]) -> onnx.ModelProto:
        axis, layout = self.axis, self.layout
        length = self.op("Shape", "input_ids", name="sequence_length", start=axis, end=axis + 1)
        x = self.embeddings(length)
        added = self.relative_bias(length)
        if layout == "portable":
            added = self.additive_mask(added)
        elif layout == "gpu" and added is not None:  # (1, heads, sequence, sequence)
            batch = self.constant("batch", np.array([0]))
            added = self.op("Unsqueeze", added, batch, name="relative.batch")
        for number, layer in enumerate(self.encoder.layers):
            x = self.layer(layer, x, added, f"layer{number}")
        output = "hidden" if layout == "run" else "last_hidden_state"
        self.nodes[-1].output[0] = output
        axes = ["batch", "sequence"] if axis else ["sequence", "batch"]
        inputs = [("input_ids", TensorProto.INT64, axes)]
        if layout == "portable":
            inputs.append(("attention_mask", TensorProto.INT64, axes))
        elif layout == "gpu":
            inputs.append(("key_lengths", TensorProto.INT32, ["lengths"]))
        shapes = {output: [*axes, self.encoder.hidden]} | dict.fromkeys(expose)
        return self.model(
            [helper.make_tensor_value_info(*entry) for entry in inputs],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in shapes.items()
            ],
        )

    def embeddings(self, length: str) -> str:
        encoder, axis = self.encoder, self.axis
        words = self.embedding(encoder.words, "words", "embeddings.", "embeddings.words")
        if encoder.skipped is None:
            zero = self.constant("zero", np.array([0], np.int64))
            rows = encoder.positions if axis else encoder.positions[:, None]
            table = self.constant("positions", rows)
            positions = self.op("Slice", table, zero, length, zero, name="embeddings.positions")
        else:
            table = self.constant("positions", encoder.positions)
            ids = self.counted_positions(encoder.skipped)
            positions = self.op("Gather", table, ids, name="embeddings.positions")
        total = self.op("Add", words, positions, name="embeddings.sum")
        if encoder.projection is None:
            return self.norm(encoder.norm, total, "embeddings")
        normed = self.norm(encoder.norm, total, "embeddings.norm")
        return self.linear(encoder.projection, normed, "embeddings")

    def counted_positions(self, skipped_id: int) -> str:
        # Even without padding: a text may contain the padding token.
        skipped = self.constant("skipped", np.int64(skipped_id))
        found = self.op("Equal", "input_ids", skipped, name="positions.skipped")
        kept = self.op("Not", found, name="positions.kept")
        ones = self.op("Cast", kept, name="positions.ones", to=TensorProto.INT64)
        axis = self.constant("axis", np.int64(self.axis))
        count = self.op("CumSum", ones, axis, name="positions.count")
        count = self.op("Mul", count, ones, name="positions.counted")
        return self.op("Add", count, skipped, name="positions.ids")

    def relative_bias(self, length: str) -> str | None:
        """Return the bias (heads, sequence, sequence) of an encoder that has one.

        onnxruntime computes that of all lengths when it loads the file, where it would be megabytes.
        """
        bias = self.encoder.relative_bias
        if bias is None:
            return None
        tokens = (bias.shape[1] + 1) // 2
        keys = self.constant("relative.keys", np.arange(tokens - 1, 2 * tokens - 1)[None])
        queries = self.constant("relative.queries", np.arange(tokens)[:, None])
        columns = self.op("Sub", keys, queries, name="relative.columns")
        table = self.constant("relative.bias", bias)
        longest = self.op("Gather", table, columns, name="relative.longest", axis=1)
        ends = self.op("Concat", length, length, name="relative.ends", axis=0)
        zeros = self.constant("relative.zeros", np.array([0, 0], np.int64))
        axes = self.constant("relative.axes", np.array([1, 2], np.int64))
        return self.op("Slice", longest, zeros, ends, axes, name="relative")

    def additive_mask(self, bias: str | None) -> str:
        real = self.op("Cast", "attention_mask", name="mask.real", to=TensorProto.FLOAT)
        padded = self.op("Sub", self.constant("one", np.float32(1)), real, name="mask.padded")
        masked = self.constant("masked_score", MASKED_SCORE)
        scores = self.op("Mul", padded, masked, name="mask.scores")
        axes = self.constant("mask.axes", np.array([1, 2], np.int64))
        mask = self.op("Unsqueeze", scores, axes, name="mask")
        return mask if bias is None else self.op("Add", mask, bias, name="mask.biased")

    def layer(self, layer: Layer, x: str, added: str | None, name: str) -> str:
        context = self.context(layer, x, added, name)
        attended = self.linear(layer.output, context, f"{name}.output")
        total, normed = f"{name}.attended", f"{name}.attention_norm"
        x = self.add_and_norm(layer.attention_norm, x, attended, total, normed)
        up = self.linear(layer.up, x, f"{name}.up")
        # Graphs that hold onnxruntime's operators anyway take its Gelu.
        fused = self.layout == "gpu" or isinstance(layer.down, StaticLinear)
        inner = self.activation(up, f"{name}.activation", fused)
        down = self.linear(layer.down, inner, f"{name}.down")
        return self.add_and_norm(layer.norm, x, down, f"{name}.sum", f"{name}.norm")

    def context(self, layer: Layer, x: str, added: str | None, name: str) -> str:
        """Return what the heads attend to, side by side."""
        linears = {"query": layer.query, "key": layer.key, "value": layer.value}
        if self.layout == "gpu":
            inputs = [self.linear(linear, x, f"{name}.{key}") for key, linear in linears.items()]
            return self.op(
                "MultiHeadAttention", *inputs, "", "key_lengths", added or "",
                name=f"{name}.context", domain=MICROSOFT, num_heads=self.encoder.heads, scale=1.0,
            )  # fmt: skip
        split = np.array([0, 0, self.encoder.heads, self.encoder.head_width], np.int64)
        shape = self.constant("heads.shape", split)
        heads = [
            self.op("Reshape", self.linear(linear, x, f"{name}.{key}"), shape, name=f"{name}.{key}.heads")
            for key, linear in linears.items()
        ]  # fmt: skip
        scores_of: dict[str, Any] = {}
        context_of: dict[str, Any] = {}
        if self.layout == "portable":
            product, joined = "MatMul", [0, 2, 1, 3]
            orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
            heads = [
                self.op("Transpose", head, name=f"{head}.split", perm=order)
                for head, order in zip(heads, orders, strict=True)
            ]
        else:
            product, joined = "FusedMatMul", [2, 0, 1, 3]
            # transBatch: leading axes (batch, heads) come from axes 1 and 2, the matrix rows from axis 0.
            context_of = {"domain": MICROSOFT, "alpha": 1.0, "transBatchB": 1}
            scores_of = {"transBatchA": 1, "transB": 1} | context_of
        query, key, value = heads
        scores = self.op(product, query, key, name=f"{name}.scores", **scores_of)
        if added is not None:
            scores = self.op("Add", scores, added, name=f"{name}.scores.sum")
        weights = self.op("Softmax", scores, name=f"{name}.weights", axis=-1)
        context = self.op(product, weights, value, name=f"{name}.context.split", **context_of)
        context = self.op("Transpose", context, name=f"{name}.context.joined", perm=joined)
        flat = self.constant("hidden.shape", np.array([0, 0, self.encoder.hidden], np.int64))
        return self.op("Reshape", context, flat, name=f"{name}.context")

    def add_and_norm(self, norm: Norm, x: str, added: str, total: str, name: str) -> str:
        if self.layout == "gpu":
            return self.norm(norm, x, name, added)
        # On the CPU, Add and LayerNormalization measured faster than SkipLayerNormalization.
        return self.norm(norm, self.op("Add", x, added, name=total), name)

    def norm(self, norm: Norm, x: str, name: str, added: str | None = None) -> str:
        weight = self.constant(f"{name}.weight", norm.weight)
        bias = self.constant(f"{name}.bias", norm.bias)
        options: dict[str, Any] = {"name": name, "epsilon": self.encoder.epsilon}
        if added is None:
            return self.op("LayerNormalization", x, weight, bias, axis=-1, **options)
        options["domain"] = MICROSOFT
        return self.op("SkipLayerNormalization", added, x, weight, bias, **options)

    def activation(self, x: str, name: str, fused: bool) -> str:
        activation = self.encoder.activation
        if activation == "relu":
            return self.op("Relu", x, name=name)
        if activation == "gelu" and fused:
            return self.op("Gelu", x, name=name, domain=MICROSOFT)
        half, one = self.constant("half", np.float32(0.5)), self.constant("one", np.float32(1))
        if activation == "gelu":  # written out as onnxruntime's fusion expects it
            sqrt2 = self.constant("sqrt2", np.float32(np.sqrt(2)))
            scaled = self.op("Div", x, sqrt2, name=f"{name}.scaled")
            curve = self.op("Erf", scaled, name=f"{name}.erf")
        else:  # the tanh approximation, gelu_new and gelu_pytorch_tanh
            square = self.op("Mul", x, x, name=f"{name}.square")
            cube = self.op("Mul", square, x, name=f"{name}.cube")
            factor = self.constant("gelu.cubic", np.float32(0.044715))
            cube = self.op("Mul", cube, factor, name=f"{name}.cubic")
            inner = self.op("Add", x, cube, name=f"{name}.inner")
            scale = self.constant("gelu.scale", np.float32(np.sqrt(2 / np.pi)))
            scaled = self.op("Mul", inner, scale, name=f"{name}.scaled")
            curve = self.op("Tanh", scaled, name=f"{name}.tanh")
        shifted = self.op("Add", curve, one, name=f"{name}.shifted")
        product = self.op("Mul", x, shifted, name=f"{name}.product")
        return self.op("Mul", product, half, name=name)
