"""Any float32 ONNX encoder -> int8 with static ranges, linear by linear.

For graphs that we did not build. The same choices as in bert.py, made without knowing what lies
between the linears: smoothing becomes a Mul before the quantizer, and outlier channels are split on the
input itself. With a range [low, R], a channel x that exceeds R gets split channels x - k (R - low):
channel k leaves `low` exactly where channel k - 1 saturates at R, so that all of them, less `low` each,
add up to x. What they contribute while they rest at `low` the bias takes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsim_embed.export.bert import Linear, StaticLinear
from onnxsim_embed.export.onnx.builder import MICROSOFT, GraphBuilder
from onnxsim_embed.export.onnx.files import subgraphs
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.gptq import quantize_table
from onnxsim_embed.export.quantization.ranges import fit_outlier_split, fit_smoothing
from onnxsim_embed.export.quantization.transforms import (
    ChannelSplit,
    Fit,
    describe_fit,
    quantize_linears,
)
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import single_blas_thread

# Quantizing smaller weights gains nothing.
MIN_WEIGHT_SIZE = 256


@dataclass(frozen=True)
class GraphLinear:
    """A MatMul with a constant weight, and the Add of its bias where there is one.

    :param nodes: outputs of the nodes that it replaces.
    :param output: the value that it computes.
    """

    name: str
    input: str
    output: str
    linear: Linear
    nodes: tuple[str, ...]


def find_linears(model: onnx.ModelProto) -> list[GraphLinear]:
    """Return the linear layers of a graph, in its order."""
    weights = _matrices(model)
    vectors = {t.name: t for t in model.graph.initializer if len(t.dims) == 1}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in model.graph.initializer}
    graph_outputs = {entry.name for entry in model.graph.output}
    linears = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights or node.input[0] in constants:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        if weight.size < MIN_WEIGHT_SIZE:
            continue
        output, nodes, bias = node.output[0], [node.output[0]], None
        after = consumers.get(output, [])
        if len(after) == 1 and after[0].op_type == "Add" and output not in graph_outputs:
            other = next((name for name in after[0].input if name != output), output)
            if other in vectors and list(vectors[other].dims) == [weight.shape[1]]:
                bias = numpy_helper.to_array(vectors[other])
                output = after[0].output[0]
                nodes.append(output)
        linear = Linear(weight, bias)
        linears.append(
            GraphLinear(node.name or output, node.input[0], output, linear, tuple(nodes))
        )
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
    groups: dict[str, list[GraphLinear]] = {}
    for linear in find_linears(model):
        if linear.input in seen:
            groups.setdefault(linear.input, []).append(linear)

    def quantize(name: str) -> tuple[Fit, Sequence[StaticLinear]]:
        linears = [entry.linear for entry in groups[name]]
        weights = [linear.weight for linear in linears]
        smoothing = fit_smoothing(seen[name], weights, shifts=(0.0,))
        split = fit_outlier_split(seen[name], weights)
        fit: Fit = smoothing if smoothing.error <= split.error else split
        return fit, quantize_linears(linears, fit, seen[name].rows) if fit.error <= budget else ()

    # See bert.py for why BLAS gets one thread.
    with single_blas_thread(), ThreadPoolExecutor(available_cpus()) as workers:
        results = dict(zip(groups, workers.map(quantize, groups), strict=True))
    replaced = {
        entry.nodes[0]: (results[name][0], entry, static)
        for name, entries in groups.items()
        for entry, static in zip(entries, results[name][1], strict=False)
    }
    dropped = {name for _, entry, _ in replaced.values() for name in entry.nodes}
    _rewrite(model, replaced, dropped)
    return tuple(
        {groups[name][0].name: describe_fit(fit, budget)} for name, (fit, _) in results.items()
    )


def _rewrite(
    model: onnx.ModelProto,
    replaced: Mapping[str, tuple[Fit, GraphLinear, StaticLinear]],
    dropped: set[str],
) -> None:
    """Put int8 linears and int8 word embeddings in the place of float32 ones."""
    b = GraphBuilder(separator="::")
    tables = _matrices(model)
    for node in model.graph.node:
        name = node.output[0]
        if name in replaced:
            fit, entry, static = replaced[name]
            b.linear(static, _split_channels(b, fit, entry.input), entry.output)
        elif node.op_type == "Gather" and node.input[1] == "input_ids" and node.input[0] in tables:
            table = quantize_table(numpy_helper.to_array(tables[node.input[0]]))
            b.embedding(
                table, "input_ids", constant=f"{name}::words", prefix=f"{name}::", name=name
            )
        elif name not in dropped:
            b.nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in b.nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for graph in subgraphs(model.graph) for node in graph.node for name in node.input}
    used |= {entry.name for graph in subgraphs(model.graph) for entry in graph.output}
    constants = [*model.graph.initializer, *b.initializers.values()]
    constants = [
        onnx.TensorProto.FromString(t.SerializeToString()) for t in constants if t.name in used
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    if any(node.domain == MICROSOFT for node in nodes) and all(
        entry.domain != MICROSOFT for entry in model.opset_import
    ):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _split_channels(b: GraphBuilder, fit: Fit, x: str) -> str:
    """Add the split channels of an input, once for all linears that take it."""
    if not isinstance(fit, ChannelSplit) or not len(fit.columns):
        return x
    name = f"{x}::split"
    if f"{x}::columns" not in b.initializers:
        columns = b.constant(f"{x}::columns", fit.columns)
        outliers = b.op("Gather", x, columns, name=f"{x}::outliers", axis=-1)
        offsets = b.constant(f"{x}::offsets", fit.offsets)
        lowered = b.op("Sub", outliers, offsets, name=f"{x}::lowered")
        b.op("Concat", x, lowered, name=name, axis=-1)
    return name
