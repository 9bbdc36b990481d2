"""Any float32 ONNX encoder -> int8 with static ranges, linear by linear.

For graphs that we did not build: the choices of encoder.py, made without knowing what lies between the
linears. Smoothing becomes a Mul before the quantizer, and outlier channels are split on the input
itself. With a range [low, R], a channel x that exceeds R gets split channels x - k (R - low), each of
which leaves `low` exactly where the one before saturates at R; the bias takes back what they contribute
while they rest at `low`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsim_embed.export.encoder import AnyLinear, Linear
from onnxsim_embed.export.onnx.builder import MICROSOFT, GraphBuilder
from onnxsim_embed.export.onnx.files import subgraphs
from onnxsim_embed.export.quantization import ranges
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.gptq import quantize_table
from onnxsim_embed.export.quantization.search import Choice, Group, channel_counts
from onnxsim_embed.system.threads import map_chunks

MIN_WEIGHT_SIZE = 256  # quantizing smaller weights gains nothing


@dataclass(frozen=True)
class GraphLinear:
    """A MatMul with a constant weight, and the Add of its bias where there is one.

    :param outputs: of these nodes; the last is what the linear computes.
    """

    name: str
    input: str
    outputs: tuple[str, ...]
    linear: Linear


def find_linears(model: onnx.ModelProto) -> list[GraphLinear]:
    """Return the linear layers of a graph, in its order."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    matrices = _matrices(model)
    consumers: dict[str, list[onnx.NodeProto | None]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            consumers[name].append(node)
    for entry in model.graph.output:
        consumers[entry.name].append(None)
    linears = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in matrices or node.input[0] in constants:
            continue
        weight = numpy_helper.to_array(matrices[node.input[1]])
        if weight.size < MIN_WEIGHT_SIZE:
            continue
        outputs, bias = [node.output[0]], None
        add, *others = consumers[node.output[0]] or [None]
        if add is not None and add.op_type == "Add" and not others:
            added = constants.get(next((i for i in add.input if i != node.output[0]), ""))
            if added is not None and list(added.dims) == [weight.shape[1]]:
                bias = numpy_helper.to_array(added)
                outputs.append(add.output[0])
        linear = Linear(weight, bias)
        name = node.name or outputs[-1]
        linears.append(GraphLinear(name, node.input[0], tuple(outputs), linear))
    return linears


def _matrices(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }


def fit_graph(model: onnx.ModelProto, seen: Mapping[str, Activations]) -> dict[str, Group]:
    """Return each input of linears, by its name, with ways to quantize it.

    :param model: float32, its weights in memory; a linear whose input is not in `seen` stays float32.
    """
    linears: dict[str, list[Linear]] = defaultdict(list)
    for entry in find_linears(model):
        if entry.input in seen:
            linears[entry.input].append(entry.linear)
    normed = {name for name in linears if follows_norm(model, name)}

    def fit(name: str) -> Group:
        weights = [linear.weight for linear in linears[name]]
        fits: list[ranges.Fit] = []
        for channels in channel_counts(weights):
            split = ranges.fit_outlier_splits(seen[name], weights, channels=channels)[0]
            options: dict[str, Any] = {} if name in normed else {"exponents": (0.0,)}
            smoothing = ranges.fit_smoothing(
                seen[name], weights, shifts=(0.0,), channels=channels, **options
            )
            fits.append(smoothing if smoothing.error <= split.error else split)
        return Group(tuple(linears[name]), seen[name], tuple(fits))

    return dict(zip(linears, map_chunks(fit, list(linears)), strict=True))


def follows_norm(model: onnx.ModelProto, name: str) -> bool:
    """Return whether a value is a layer norm's output: only such inputs are smoothed.

    Behind an activation or attention, a channel may exceed many times what it reached in calibration
    when a text speaks of something else; with a range of its own, it would saturate.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    names, visited = [name], set[str]()
    while names:
        node = producers.get(names.pop())
        if node is None or node.output[0] in visited:
            continue
        if "LayerNorm" in node.op_type or node.op_type in ("ReduceMean", "Sqrt"):
            return True
        visited.add(node.output[0])
        if node.op_type in ("Add", "Sub", "Mul", "Div", "Cast", "Reshape", "Transpose", "Identity"):
            names += node.input
    return False


def quantize_graph(
    model: onnx.ModelProto, choice: Choice, quantized: Mapping[str, Sequence[AnyLinear]]
) -> None:
    """Replace linear layers and the word embeddings of a float32 model by quantized ones, in place."""
    groups: dict[str, list[GraphLinear]] = defaultdict(list)
    for entry in find_linears(model):
        groups[entry.input].append(entry)
    b, tables = GraphBuilder(separator="::"), _matrices(model)
    linears = {
        entry.outputs[0]: (fit, entry, static)
        for name, fit in choice.items()
        for entry, static in zip(groups[name], quantized[name], strict=True)
        if fit is not None
    }
    replaced = {output for _, entry, _ in linears.values() for output in entry.outputs}
    for node in model.graph.node:
        name = node.output[0]
        if name in linears:
            fit, entry, static = linears[name]
            b.linear(static, _split_channels(b, fit, entry.input), entry.outputs[-1])
        elif node.op_type == "Gather" and node.input[1] == "input_ids" and node.input[0] in tables:
            table = quantize_table(numpy_helper.to_array(tables[node.input[0]]))
            b.embedding(table, f"{name}::words", f"{name}::", name)
        elif name not in replaced:
            b.nodes.append(node)
    constants = [*model.graph.initializer, *b.initializers.values()]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(b.nodes)
    used: set[str] = set()
    for graph in subgraphs(model.graph):
        used.update(entry.name for entry in graph.output)
        used.update(name for node in graph.node for name in node.input)
    model.graph.initializer.extend(tensor for tensor in constants if tensor.name in used)
    if MICROSOFT not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _split_channels(b: GraphBuilder, fit: ranges.Fit | None, x: str) -> str:
    """Add the split channels of an input, once for all linears that take it."""
    if not isinstance(fit, ranges.ChannelSplit) or not len(fit.columns):
        return x
    if f"{x}::columns" not in b.initializers:
        columns = b.constant(f"{x}::columns", fit.columns)
        outliers = b.op("Gather", x, columns, name=f"{x}::outliers", axis=-1)
        offsets = b.constant(f"{x}::offsets", fit.offsets)
        lowered = b.op("Sub", outliers, offsets, name=f"{x}::lowered")
        b.op("Concat", x, lowered, name=f"{x}::split", axis=-1)
    return f"{x}::split"
