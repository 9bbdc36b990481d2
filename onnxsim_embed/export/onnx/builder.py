"""A small writer of ONNX graphs: nodes, constants, and constants shared between two files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"  # onnxruntime's own operators
OPSET = 17  # the first with LayerNormalization; every reader in use understands it
IR_VERSION = 8  # goes with opset 17

# Constants below this stay inside the file that uses them: a reference would be as large.
SHARED_BYTES = 1024


@dataclass
class GraphBuilder:
    """Collects nodes and constants."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    # Quantized tensors by (input, how), so that linears with the same input quantize it once.
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

    def model(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
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

    ONNX lets a constant live outside its file, as (file, offset, length). The bytes of a constant of
    the same content inside `holder` serve as well as a file of their own: one copy of the weights
    on disk and in the page cache for two graphs.

    :param model: changed in place; to be saved in the directory of `holder`.
    :param holder: an ONNX file that holds constants of the same content.
    :returns: bytes that stay in the model itself.
    :raises ValueError: naming a large constant that the holder does not hold.
    """
    data = holder.read_bytes()
    end = 0  # constants mostly stand in the same order in both
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        if len(raw) < SHARED_BYTES:
            continue
        offset = data.find(raw, end)
        if offset < 0 and (offset := data.find(raw)) < 0:
            raise ValueError(f"{holder} does not hold the constant {tensor.name!r}")
        end = offset + len(raw)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", holder.name), ("offset", offset), ("length", len(raw))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    return model.ByteSize()
