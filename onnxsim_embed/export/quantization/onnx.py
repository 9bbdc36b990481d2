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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsim_embed.export.encoder import Linear, StaticLinear
from onnxsim_embed.export.onnx.builder import MICROSOFT, GraphBuilder
from onnxsim_embed.export.onnx.files import subgraphs
from onnxsim_embed.export.quantization import ranges
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.encoder import describe_fit, quantize_linears
from onnxsim_embed.export.quantization.gptq import quantize_table
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import single_blas_thread

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


def quantize_graph(
    model: onnx.ModelProto, seen: Mapping[str, Activations], budget: float
) -> tuple[dict[str, Any], ...]:
    """Quantize every linear layer and the word embeddings.

    :param model: float32, its weights in memory; changed in place.
    :param seen: activations of the linears' inputs, by name; a linear whose input is missing stays
        float32.
    :param budget: relative squared output error above which a linear stays float32.
    :returns: what was chosen for each input.
    """
    groups: dict[str, list[GraphLinear]] = defaultdict(list)
    for linear in find_linears(model):
        if linear.input in seen:
            groups[linear.input].append(linear)

    def quantize(name: str) -> tuple[ranges.Fit, Sequence[StaticLinear]]:
        linears = [entry.linear for entry in groups[name]]
        weights = [linear.weight for linear in linears]
        smoothing = ranges.fit_smoothing(seen[name], weights, shifts=(0.0,))
        split = ranges.fit_outlier_split(seen[name], weights)
        fit: ranges.Fit = smoothing if smoothing.error <= split.error else split
        return fit, quantize_linears(linears, fit, seen[name].rows) if fit.error <= budget else ()

    # See encoder.py for why BLAS gets one thread.
    with single_blas_thread(), ThreadPoolExecutor(available_cpus()) as workers:
        fits = dict(zip(groups, workers.map(quantize, groups), strict=True))
    b, tables = GraphBuilder(separator="::"), _matrices(model)
    linears = {
        entry.outputs[0]: (fit, entry, static)
        for name, (fit, quantized) in fits.items()
        for entry, static in zip(groups[name], quantized, strict=False)
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
    return tuple(
        {groups[name][0].name: describe_fit(fit, budget)} for name, (fit, _) in fits.items()
    )


def _split_channels(b: GraphBuilder, fit: ranges.Fit, x: str) -> str:
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
