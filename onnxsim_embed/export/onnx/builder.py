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

from onnxsim_embed.export.bert import AnyLinear, Int8Table, Linear, StaticLinear

MICROSOFT = "com.microsoft"  # onnxruntime's own operators
OPSET = 17  # the first with LayerNormalization; every reader in use understands it
IR_VERSION = 8  # goes with opset 17

# Constants below this stay inside the file that uses them: a reference would be as large.
SHARED_BYTES = 1024


@dataclass
class GraphBuilder:
    """Collects nodes and constants.

    :param separator: stands between the name of a value and that of what belongs to it; another one
        keeps clear of the names in a graph that is extended.
    """

    separator: str = "."
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    # Quantized values by (input, quantization): linears that share an input quantize it once.
    quantized: dict[tuple[str, int], str] = field(default_factory=dict)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Add a constant once and return its name."""
        if name not in self.initializers:
            # order="C" rather than ascontiguousarray, which would make a scalar 1-D.
            self.initializers[name] = numpy_helper.from_array(np.array(value, order="C"), name)
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
        node = helper.make_node(
            operator, list(inputs), [name], name=name, domain=domain, **attributes
        )
        self.nodes.append(node)
        return name

    def embedding(
        self,
        table: npt.NDArray[np.float32] | Int8Table,
        indices: str,
        *,
        constant: str,
        prefix: str,
        name: str,
    ) -> str:
        """Look up rows of a table; int8 rows are multiplied by their scales.

        :param constant: name of the table in the graph.
        :param prefix: begins the names of the nodes in between.
        """
        if not isinstance(table, Int8Table):
            return self.op("Gather", self.constant(constant, table), indices, name=name)
        values = self.constant(constant, table.values)
        values = self.op("Gather", values, indices, name=f"{prefix}int8")
        values = self.op("Cast", values, name=f"{prefix}float", to=TensorProto.FLOAT)
        scales = self.constant(f"{constant}{self.separator}scales", table.scales[:, None])
        scales = self.op("Gather", scales, indices, name=f"{prefix}scales")
        return self.op("Mul", values, scales, name=name)

    def linear(self, linear: AnyLinear, x: str, name: str) -> str:
        """Apply a linear layer, float32 or int8, to the last axis of x."""
        prefix = name + self.separator
        if isinstance(linear, StaticLinear):
            return self._static_linear(linear, x, name)
        if not isinstance(linear, Linear):
            raise TypeError(f"{name}: expected a linear layer, got {type(linear).__name__}")
        y = self.op(
            "MatMul", x, self.constant(f"{prefix}weight", linear.weight), name=f"{prefix}product"
        )
        if linear.bias is None:
            return y
        return self.op("Add", y, self.constant(f"{prefix}bias", linear.bias), name=name)

    def _static_linear(self, linear: StaticLinear, x: str, name: str) -> str:
        how = linear.input
        of_x, prefix = x + self.separator, name + self.separator
        key = (x, id(how))
        scale = self.constant(f"{of_x}scale", how.scale)
        zero = self.constant(f"{of_x}zero_point", how.zero_point)
        if key not in self.quantized:
            source = x
            if how.multiplier is not None:
                factors = self.constant(f"{of_x}multiplier", how.multiplier)
                source = self.op("Mul", x, factors, name=f"{of_x}smoothed")
            self.quantized[key] = self.op(
                "QuantizeLinear", source, scale, zero, name=f"{of_x}quantized"
            )
        inputs = [self.quantized[key], self.constant(f"{prefix}weight", linear.weight), scale]
        inputs += [self.constant(f"{prefix}scales", linear.scales), zero]
        if linear.bias is not None:
            inputs += ["", self.constant(f"{prefix}bias", linear.bias)]
        return self.op("MatMulIntegerToFloat", *inputs, name=name, domain=MICROSOFT)

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """Return the finished model."""
        constants = list(self.initializers.values())
        graph = helper.make_graph(self.nodes, "encoder", inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="onnxsim-embed")
        model.ir_version = IR_VERSION
        return model


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator occurs, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def share_constants(model: onnx.ModelProto, holder: Path) -> int:
    """Replace the large constants of a model by references into another ONNX file.

    ONNX lets a constant live outside its file, as (file, offset, length). The bytes of an equal
    constant inside `holder` serve as well as a data file: one copy of the weights on disk and in the
    page cache for two graphs.

    :param model: changed in place; to be saved in the directory of `holder`.
    :param holder: an ONNX file that holds equal constants.
    :returns: bytes that stay in the model itself.
    :raises ValueError: naming a large constant that the holder lacks.
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
    return model.ByteSize()
