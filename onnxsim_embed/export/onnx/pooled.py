"""Pooled ONNX files: token ids to `sentence_embedding`, for readers that have no pooling of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.encoder import Linear
from onnxsim_embed.export.onnx.builder import GraphBuilder
from onnxsim_embed.export.onnx.files import OUTPUT, load_graph, rename_value
from onnxsim_embed.runtime.pooling import Head, PoolingMode

SENTENCE = "sentence_embedding"  # sentence-transformers' name
LEAST_OPSET = 13  # axes of ReduceSum, Squeeze and Unsqueeze are inputs since then
TINY = np.float32(np.finfo(np.float32).tiny)  # divides what is zero anyway


def write_pooled(source: Path, target: Path, head: Head, dim: int) -> None:
    """Write a portable file with the modules after the encoder; external data stays where it is.

    Outputs are `sentence_embedding`, float32 (batch, dim), and `last_hidden_state`.

    :raises CheckpointError: for an adopted file of an opset before 13.
    """
    model = load_graph(source)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < LEAST_OPSET:
        raise CheckpointError(
            f"{source.name} has opset {opset}; a pooled file needs {LEAST_OPSET} or later"
        )
    rename_value(model.graph, SENTENCE, f"{SENTENCE}_replaced")
    b = HeadBuilder(separator="::")
    b.op("Identity", b.head(head), name=SENTENCE)
    model.graph.node.extend(b.nodes)
    model.graph.initializer.extend(b.initializers.values())
    hidden = next(entry for entry in model.graph.output if entry.name == OUTPUT)
    vector = helper.make_tensor_value_info(SENTENCE, TensorProto.FLOAT, ["batch", dim])
    outputs = [vector, hidden]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, target)


class HeadBuilder(GraphBuilder):
    """Writes the nodes that `Head` stands for, in operators that are the same since opset 13."""

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401 - onnx's own
        """Add a node and return its output."""
        return self.op(operator, *inputs, name=f"pooling::{len(self.nodes)}", **attributes)

    def value(self, value: npt.ArrayLike) -> str:
        """Add a constant and return its name."""
        return self.constant(f"pooling::constant{len(self.initializers)}", value)

    def head(self, head: Head) -> str:
        """Return the vectors (batch, dim)."""
        mask = self.node("Cast", "attention_mask", to=TensorProto.FLOAT)
        parts = [self.pool(mode, mask) for mode in head.modes]
        x = self.node("Concat", *parts, axis=-1)
        for number, dense in enumerate(head.dense):
            x = self.linear(Linear(dense.weight, dense.bias), x, f"pooling::dense{number}")
            x = self.activation(dense.activation.rpartition(".")[2], x)
        if head.normalizes:
            squares = self.node("Mul", x, x)
            square = self.node("ReduceSum", squares, self.value(np.array([-1])), keepdims=1)
            x = self.node("Div", x, self.node("Max", self.node("Sqrt", square), self.value(TINY)))
        return x

    def pool(self, mode: PoolingMode, mask: str) -> str:
        """Return one vector a text, (batch, hidden), from the hidden states and the mask."""
        tokens, channels = self.value(np.array([1])), self.value(np.array([2]))
        if mode is PoolingMode.MAX:
            real = self.node("Cast", "attention_mask", to=TensorProto.BOOL)
            lowest = self.value(np.finfo(np.float32).min)
            states = self.node("Where", self.node("Unsqueeze", real, channels), OUTPUT, lowest)
            states = self.node("Transpose", states, perm=[0, 2, 1])
            return self.node("Squeeze", self.node("GlobalMaxPool", states), channels)
        weights, position = mask, self.node("CumSum", mask, self.value(np.int64(1)))
        if mode is PoolingMode.WEIGHTED_MEAN:
            weights = self.node("Mul", mask, position)
        elif mode in (PoolingMode.CLS, PoolingMode.LAST_TOKEN):
            chosen = self.value(np.float32(1))
            if mode is PoolingMode.LAST_TOKEN:
                chosen = self.node("ReduceSum", mask, tokens, keepdims=1)
            chosen = self.node("Equal", position, chosen)
            weights = self.node("Mul", mask, self.node("Cast", chosen, to=TensorProto.FLOAT))
        divisor = self.node("ReduceSum", weights, tokens, keepdims=1)
        if mode is PoolingMode.MEAN_SQRT_LEN:
            divisor = self.node("Sqrt", divisor)
        total = self.node("MatMul", self.node("Unsqueeze", weights, tokens), OUTPUT)
        total = self.node("Squeeze", total, tokens)
        return self.node("Div", total, self.node("Max", divisor, self.value(TINY)))

    def activation(self, kind: str, x: str) -> str:
        """Apply the activation of a Dense module, by the name of PyTorch's class."""
        if kind != "GELU":
            return self.node({"ReLU": "Relu"}.get(kind, kind), x)
        curve = self.node("Erf", self.node("Div", x, self.value(np.float32(np.sqrt(2)))))
        half = self.node("Mul", x, self.value(np.float32(0.5)))
        return self.node("Mul", half, self.node("Add", curve, self.value(np.float32(1))))
