"""Any float32 ONNX encoder -> int8 with static ranges, linear by linear.

For graphs that we did not build. The same choices as in quantize.py, made without knowing what lies
between the linears: smoothing becomes a Mul before the quantizer, and outlier channels are split on the
input itself. With a range [low, R], a channel x that reaches beyond R gets copies x - k (R - low): copy
k leaves `low` exactly where copy k - 1 saturates at R, so that all of them, less `low` each, add up to
x. What the copies add while they rest at `low` the bias takes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnxsim_embed.export.bert import Linear
from onnxsim_embed.export.onnx.builder import MICROSOFT
from onnxsim_embed.export.quantization.bert import bias_of, describe_fit
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.gptq import round_table, round_weight
from onnxsim_embed.export.quantization.ranges import (
    COLUMNS_PER_COPY,
    COPY_HEADROOM,
    RANGE_STEPS,
    SEARCH_ROWS,
    Range,
    Smoothing,
    fit_smoothing,
    output_error,
    plan_split_columns,
    spread_rows,
)
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import single_blas_thread

Float32 = npt.NDArray[np.float32]

# Weights smaller than this gain nothing.
LEAST_WEIGHT = 256


@dataclass(frozen=True)
class GraphLinear:
    """A MatMul with a constant weight, and the Add of its bias where there is one.

    :param nodes: the nodes that it replaces.
    :param output: the value that it computes.
    """

    name: str
    input: str
    output: str
    linear: Linear
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class InputSplit:
    """A range [low, top] for an input, and copies of the channels that reach beyond it.

    :param columns: int64 array (copies,), the channel that each copy repeats.
    :param offsets: float32 array (copies,), by how much it is lowered.
    """

    error: float
    range: Range
    columns: npt.NDArray[np.int64]
    offsets: Float32

    @property
    def low(self) -> np.float32:
        """The smallest value that the range holds."""
        return np.float32(-float(self.range.zero_point) * float(self.range.scale))

    def apply(self, rows: Float32) -> Float32:
        """Return what the linears see of an input, float32 array (tokens, channels + copies)."""
        return self.range.round_trip(
            np.concatenate([rows, rows[:, self.columns] - self.offsets], axis=1)
        )


@dataclass
class _Rewrite:
    """What becomes of a graph: nodes by the node they replace, and new constants."""

    instead: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        self.constants.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name


def find_linears(model: onnx.ModelProto) -> list[GraphLinear]:
    """Return the linear layers of a graph, in its order."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {entry.name for entry in model.graph.output}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights or node.input[0] in weights:
            continue
        tensor = weights[node.input[1]]
        if (
            len(tensor.dims) != 2
            or tensor.data_type != onnx.TensorProto.FLOAT
            or np.prod(tensor.dims) < LEAST_WEIGHT
        ):
            continue
        weight = numpy_helper.to_array(tensor)
        output, nodes, bias = node.output[0], [node.output[0]], None
        after = users.get(output, [])
        if len(after) == 1 and after[0].op_type == "Add" and output not in outputs:
            other = next((name for name in after[0].input if name != output), output)
            if other in weights and list(weights[other].dims) == [weight.shape[1]]:
                bias = numpy_helper.to_array(weights[other])
                output = after[0].output[0]
                nodes.append(output)
        found.append(
            GraphLinear(
                node.name or output, node.input[0], output, Linear(weight, bias), tuple(nodes)
            )
        )
    return found


def quantize_graph(
    model: onnx.ModelProto, seen: Mapping[str, Activations], budget: float
) -> tuple[dict[str, Any], ...]:
    """Quantize every linear layer and the word embeddings.

    :param model: float32, its weights in memory; changed in place.
    :param seen: activations of the linears' inputs, by name; a linear whose input is not there stays
        float32.
    :param budget: relative squared output error above which a linear stays float32.
    :returns: for each input what was chosen.
    """
    groups: dict[str, list[GraphLinear]] = {}
    for linear in find_linears(model):
        if linear.input in seen:
            groups.setdefault(linear.input, []).append(linear)

    def fit(group: tuple[str, list[GraphLinear]]) -> tuple[Smoothing | InputSplit, list[Any]]:
        name, linears = group
        return _fit(seen[name], [entry.linear for entry in linears], budget)

    # See quantize.py for why BLAS gets one thread.
    with single_blas_thread(), ThreadPoolExecutor(available_cpus()) as workers:
        fits = list(workers.map(fit, groups.items()))
    rewrite = _Rewrite()
    notes = []
    for (_, linears), (chosen, made) in zip(groups.items(), fits, strict=True):
        if made:
            _replace(rewrite, linears, chosen, made)
        notes.append({linears[0].name: describe_fit(chosen, bool(made))})
    _quantize_words(model, rewrite)
    _apply(model, rewrite)
    return tuple(notes)


def _fit(
    seen: Activations, linears: Sequence[Linear], budget: float
) -> tuple[Smoothing | InputSplit, list[tuple[npt.NDArray[np.int8], Float32, Float32]]]:
    """Choose how an input is quantized, and round the weights of its linears for that.

    :returns: the choice; weight, scales and bias of each linear, none where the error is too large.
    """
    weights = [entry.weight for entry in linears]
    smoothing = fit_smoothing(seen, weights, shifts=(0.0,))
    split = fit_input_split(seen, weights)
    fit: Smoothing | InputSplit = smoothing if smoothing.error <= split.error else split
    if not fit.error <= budget:
        return fit, []
    inputs = fit.apply(seen.rows)
    made = []
    for entry in linears:
        bias = bias_of(entry)
        if isinstance(fit, Smoothing):
            weight = np.asarray(entry.weight / fit.multiplier[:, None], np.float32)
        else:
            weight = np.concatenate([entry.weight, entry.weight[fit.columns]])
            bias = bias - fit.low * entry.weight[fit.columns].sum(axis=0)
        values, scales = round_weight(weight, inputs)
        made.append((values, scales, bias.astype(np.float32)))
    return fit, made


def fit_input_split(seen: Activations, weights: Sequence[Float32]) -> InputSplit:
    """Choose the range of an input, and copies of its outlier channels.

    :param weights: float32 arrays (in_features, out_features) of the linears that take it.
    """
    rows = spread_rows(seen.rows, SEARCH_ROWS)
    exact = [rows @ weight for weight in weights]
    low = min(0.0, float(seen.low.min()))
    top = max(float(seen.high.max()) * COPY_HEADROOM, -low / 16, 1e-6)

    def measured(made: InputSplit, final: bool = False) -> InputSplit:
        stacked = [np.concatenate([weight, weight[made.columns]]) for weight in weights]
        targets = [
            target + made.low * weight[made.columns].sum(axis=0)
            for target, weight in zip(exact, weights, strict=True)
        ]
        return replace(made, error=output_error(made.apply(rows), targets, stacked, final=final))

    def trial(bound: float) -> InputSplit | None:
        span = Range.of(low, bound)
        made = InputSplit(0.0, span, np.zeros(0, np.int64), np.zeros(0, np.float32))
        reach = span.top - float(made.low)
        columns, offsets = plan_split_columns(
            np.maximum(seen.high * np.float32(COPY_HEADROOM) - made.low - span.scale / 2, 0), reach
        )
        if len(columns) > max(1, len(rows[0]) // COLUMNS_PER_COPY):
            return None
        return measured(replace(made, columns=columns, offsets=offsets))

    trials = [trial(float(bound)) for bound in np.geomspace(top / 8, top, RANGE_STEPS)]
    best = min((t for t in trials if t is not None), key=lambda t: t.error)
    # Comparable with a smoothing's error: rounded as the export rounds.
    return measured(best, final=True)


def _replace(
    rewrite: _Rewrite,
    linears: Sequence[GraphLinear],
    fit: Smoothing | InputSplit,
    made: Sequence[tuple[npt.NDArray[np.int8], Float32, Float32]],
) -> None:
    """Put a quantizer of the input and integer products where linears were."""
    value = linears[0].input
    before: list[onnx.NodeProto] = []

    def op(kind: str, inputs: list[str], output: str, **attributes: int) -> str:
        before.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    source = value
    if isinstance(fit, InputSplit) and len(fit.columns):
        columns = rewrite.constant(f"{value}::columns", fit.columns)
        offsets = rewrite.constant(f"{value}::offsets", fit.offsets)
        copies = op("Gather", [value, columns], f"{value}::outliers", axis=-1)
        lowered = op("Sub", [copies, offsets], f"{value}::lowered")
        source = op("Concat", [value, lowered], f"{value}::split", axis=-1)
    elif isinstance(fit, Smoothing) and fit.exponent:
        factors = rewrite.constant(f"{value}::multiplier", fit.multiplier)
        source = op("Mul", [value, factors], f"{value}::smoothed")
    scale = rewrite.constant(f"{value}::scale", fit.range.scale)
    zero = rewrite.constant(f"{value}::zero_point", fit.range.zero_point)
    quantized = op("QuantizeLinear", [source, scale, zero], f"{value}::quantized")
    for linear, (values, scales, bias) in zip(linears, made, strict=True):
        name = linear.output
        inputs = [quantized, rewrite.constant(f"{name}::weight", values), scale]
        inputs += [rewrite.constant(f"{name}::scales", scales), zero, ""]
        inputs += [rewrite.constant(f"{name}::bias", bias)]
        node = helper.make_node(
            "MatMulIntegerToFloat", inputs, [name], name=f"{name}::int8", domain=MICROSOFT
        )
        rewrite.instead[linear.nodes[0]] = [*before, node]
        rewrite.instead |= {old: [] for old in linear.nodes[1:]}
        before = []


def _quantize_words(model: onnx.ModelProto, rewrite: _Rewrite) -> None:
    """Keep the word embeddings, by far the largest table, as int8 with a scale for each row."""
    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gather" or list(node.input[1:]) != ["input_ids"]:
            continue
        tensor = tables.get(node.input[0])
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        table = round_table(numpy_helper.to_array(tensor))
        name = node.output[0]
        values = rewrite.constant(f"{name}::values", table.values)
        scales = rewrite.constant(f"{name}::scales", table.scales[:, None])
        rewrite.instead[name] = [
            helper.make_node("Gather", [values, "input_ids"], [f"{name}::int8"]),
            helper.make_node(
                "Cast", [f"{name}::int8"], [f"{name}::float"], to=onnx.TensorProto.FLOAT
            ),
            helper.make_node("Gather", [scales, "input_ids"], [f"{name}::row_scales"]),
            helper.make_node("Mul", [f"{name}::float", f"{name}::row_scales"], [name]),
        ]


def _apply(model: onnx.ModelProto, rewrite: _Rewrite) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += rewrite.instead.get(node.output[0], [node])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in _all_inputs(node)}
    kept = [t for t in (*model.graph.initializer, *rewrite.constants) if t.name in used]
    copies = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
    if rewrite.instead and all(entry.domain != MICROSOFT for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _all_inputs(node: onnx.NodeProto) -> list[str]:
    """Return what a node reads, its inner graphs included."""
    names = list(node.input)
    for attribute in node.attribute:
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            names += [name for part in inner.node for name in _all_inputs(part)]
            names += [entry.name for entry in inner.output]
    return names
