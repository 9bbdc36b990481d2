"""A writer of ONNX graphs: nodes, constants, linear layers, constants shared between two files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from onnxsim_embed.export.encoder import (
    AnyLinear,
    FloatChannels,
    InputQuantization,
    Int8Table,
    Linear,
)
from onnxsim_embed.system.arrays import Float32

MICROSOFT = "com.microsoft"  # onnxruntime's own operators
OPSET = 17  # the first with LayerNormalization; every reader in use understands it
IR_VERSION = 8  # goes with opset 17

# Constants below this stay inside the file that uses them: a reference would be as large.
SHARED_BYTES = 1024


@dataclass
class GraphBuilder:
    """Collects nodes and constants.

    :param separator: stands between the name of a value and what belongs to it; a graph that is
        extended takes another one, which keeps clear of the names it has.
    """

    separator: str = "."
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Add a constant once and return its name."""
        if name not in self.initializers:
            # order="C" rather than ascontiguousarray, which would make a scalar 1-D.
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def op(
        self,
        operator: str,
        *inputs: str,
        name: str,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401 - onnx's own
    ) -> str:
        """Add a node of one output and return the output's name, which is the node's."""
        about = {"name": name, "domain": domain, **attributes}
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **about))
        return name

    def embedding(self, table: Float32 | Int8Table, constant: str, prefix: str, name: str) -> str:
        """Look up the rows of a table, int8 or float32, that `input_ids` selects.

        :param constant: name of the table in the graph.
        :param prefix: begins the names of the nodes in between.
        """
        if not isinstance(table, Int8Table):
            return self.op("Gather", self.constant(constant, table), "input_ids", name=name)
        values = self.constant(constant, table.values)
        values = self.op("Gather", values, "input_ids", name=f"{prefix}int8")
        values = self.op("Cast", values, name=f"{prefix}float", to=TensorProto.FLOAT)
        scales = self.constant(f"{constant}{self.separator}scales", table.scales[:, None])
        scales = self.op("Gather", scales, "input_ids", name=f"{prefix}scales")
        return self.op("Mul", values, scales, name=name)

    def linear(self, linear: AnyLinear, x: str, name: str) -> str:
        """Apply a linear layer, float32 or int8, to the last axis of x."""
        prefix = name + self.separator
        if isinstance(linear, Linear):
            weight = self.constant(f"{prefix}weight", linear.weight)
            y = self.op("MatMul", x, weight, name=f"{prefix}product")
            if linear.bias is None:
                return y
            return self.op("Add", y, self.constant(f"{prefix}bias", linear.bias), name=name)
        levels, scale, zero = self._quantized(linear.input, x)
        weight = self.constant(f"{prefix}weight", linear.weight)
        inputs = [levels, weight, scale, self.constant(f"{prefix}scales", linear.scales), zero]
        if linear.bias is not None:
            inputs += ["", self.constant(f"{prefix}bias", linear.bias)]
        product = f"{prefix}int8" if linear.side else name
        y = self.op("MatMulIntegerToFloat", *inputs, name=product, domain=MICROSOFT)
        if linear.side is None:
            return y
        return self.op("Add", y, self._float_channels(linear.side, x, prefix), name=name)

    def _float_channels(self, side: FloatChannels, x: str, prefix: str) -> str:
        """Multiply some channels of x in float32; they are gathered once for all linears."""
        columns = f"{x}{self.separator}float_channels"
        if f"{columns}{self.separator}columns" not in self.initializers:
            index = self.constant(f"{columns}{self.separator}columns", side.columns)
            self.op("Gather", x, index, name=columns, axis=-1)
        weight = self.constant(f"{prefix}float.weight", side.weight)
        return self.op("MatMul", columns, weight, name=f"{prefix}float")

    def _quantized(self, quantization: InputQuantization, x: str) -> tuple[str, str, str]:
        """Quantize x, once for all linears that take it; return levels, scale and zero point."""
        prefix = x + self.separator
        levels, known = f"{prefix}quantized", f"{prefix}scale" in self.initializers
        scale = self.constant(f"{prefix}scale", quantization.scale)
        zero = self.constant(f"{prefix}zero_point", quantization.zero_point)
        if not known:
            if quantization.multiplier is not None:
                multiplier = self.constant(f"{prefix}multiplier", quantization.multiplier)
                x = self.op("Mul", x, multiplier, name=f"{prefix}smoothed")
            self.op("QuantizeLinear", x, scale, zero, name=levels)
        return levels, scale, zero

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """Return the finished model, and give it the constants."""
        graph = helper.make_graph(self.nodes, "encoder", inputs, outputs)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(
            graph, opset_imports=opsets, producer_name="onnxsim-embed", ir_version=IR_VERSION
        )
        for name in list(self.initializers):  # one by one: the weights are not in memory twice
            model.graph.initializer.append(self.initializers.pop(name))
        return model


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator occurs, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def share_constants(model: onnx.ModelProto, holder: Path) -> None:
    """Replace the large constants of a model by references into another ONNX file, `holder`.

    ONNX lets a constant live outside its file, as (file, offset, length). The bytes of an equal
    constant inside `holder` serve as well as a data file: one copy of the weights on disk and in the
    page cache for two graphs.
    """
    data = holder.read_bytes()
    end = 0  # constants mostly stand in the same order in both
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        if len(raw) < SHARED_BYTES:
            continue
        offset = data.find(raw, end)
        if offset < 0 and (offset := data.find(raw)) < 0:
            raise ValueError(f"{holder} lacks the constant {tensor.name!r}")
        end = offset + len(raw)
        set_external_data(tensor, holder.name, offset, len(raw))
        tensor.ClearField("raw_data")
