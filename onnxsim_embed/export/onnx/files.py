"""ONNX files that somebody else's exporter made: what they take and give, their weights beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.system.hardware import CPU_PROVIDER
from onnxsim_embed.system.onnx_session import onnxruntime

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"

# protobuf ends at 2 GB: above this, weights go to a file beside the graph.
LARGEST_FILE = 1_900_000_000
DATA_SUFFIX = "_data"  # as optimum and transformers.js call it: model.onnx_data


def load_graph(path: Path, *, weights: bool = False) -> onnx.ModelProto:
    """Read an ONNX file.

    :param weights: whether to read those that lie in files beside it.
    :raises CheckpointError: if it is none, or its weights lie outside its directory.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no graph")
    except Exception as error:  # protobuf's exceptions share no base class
        raise CheckpointError(f"{path} is not a readable ONNX file: {error}") from None
    names = data_files(model, path)
    if weights and names:
        onnx.load_external_data_for_model(model, str(path.parent))
    return model


def data_files(model: onnx.ModelProto, path: Path) -> list[str]:
    """Return the names of the files beside an ONNX file that hold its weights.

    :raises CheckpointError: naming one that is missing, or not in the same directory.
    """
    names: set[str] = set()
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        name = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if not name or "\\" in name or PurePosixPath(name).name != name or name == "..":
            raise CheckpointError(
                f"{path} keeps weights of {tensor.name!r} in {name!r}; only files in its own "
                "directory are read"
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} keeps weights in {name}, which is not beside it")
        names.add(name)
    return sorted(names)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a graph, those of inner graphs and of node attributes included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(
                attribute.graphs
            ):
                yield from _tensors(inner)


def save_graph(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Write a model whose weights are in memory.

    :returns: the file beside it that holds its weights, if it is too large for one.
    """
    if model.ByteSize() <= LARGEST_FILE:
        onnx.save(model, path)
        return ()
    name = path.name + DATA_SUFFIX
    onnx.save(model, path, save_as_external_data=True, location=name, size_threshold=1024)
    return (name,)


def simplify(source: Path, target: Path) -> tuple[str, ...]:
    """Fold constants and drop what computes nothing (onnxruntime's basic optimizations).

    What remains are standard operators. The fusions beyond that are made by onnxruntime when it loads
    the file; its fused attention measured no faster on the CPU, fused skip normalization slower.

    :returns: see `save_graph`.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    work = target.with_name(target.name + ".work")
    options.optimized_model_filepath = str(work)
    large = sum(path.stat().st_size for path in source.parent.iterdir()) > LARGEST_FILE
    if large:
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, work.name + DATA_SUFFIX)
    onnxruntime.InferenceSession(str(source), options, providers=[CPU_PROVIDER])
    model = load_graph(work, weights=True)
    for path in (work, work.with_name(work.name + DATA_SUFFIX)):
        path.unlink(missing_ok=True)
    drop_unused_domains(model)
    return save_graph(model, target)


def drop_unused_domains(model: onnx.ModelProto) -> None:
    """Keep the operator sets that the graph uses; onnxruntime lists every one it knows."""
    used = {""} | {node.domain for node in _nodes(model.graph)}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(
                attribute.graphs
            ):
                yield from _nodes(inner)


def check_inputs(model: onnx.ModelProto, where: str) -> None:
    """Refuse a graph that wants other inputs than token ids, mask and types.

    :raises CheckpointError: naming them.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    kinds = {
        entry.name: entry.type.tensor_type.elem_type
        for entry in model.graph.input
        if entry.name not in constants
    }
    if "input_ids" not in kinds or set(kinds) - set(INPUTS):
        raise CheckpointError(
            f"{where} takes the inputs {', '.join(kinds) or 'none'}; supported are input_ids and, "
            "where it has them, attention_mask and token_type_ids"
        )
    if wrong := [name for name, kind in kinds.items() if kind != TensorProto.INT64]:
        kind = TensorProto.DataType.Name(kinds[wrong[0]])
        raise CheckpointError(f"{where}: input {wrong[0]} is {kind}, not INT64")


def put_hidden_first(model: onnx.ModelProto, where: str) -> bool:
    """Make the hidden states the first output, under the name that readers look for.

    They are `last_hidden_state` where there is one, else the first output of three axes.

    :param model: changed in place.
    :returns: whether it was changed.
    :raises CheckpointError: if no output has three axes, or they are not float32.
    """
    outputs = list(model.graph.output)
    ranks = [len(entry.type.tensor_type.shape.dim) for entry in outputs]
    chosen = next((i for i, entry in enumerate(outputs) if entry.name == OUTPUT), None)
    if chosen is None:
        chosen = next((i for i, rank in enumerate(ranks) if rank == 3), None)
    if chosen is None or ranks[chosen] != 3:
        told = ", ".join(f"{e.name} ({r} axes)" for e, r in zip(outputs, ranks, strict=True))
        raise CheckpointError(
            f"{where} has no hidden states of (batch, sequence, hidden) among its outputs: {told}"
        )
    if outputs[chosen].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise CheckpointError(f"{where}: output {outputs[chosen].name} is not float32")
    old = outputs[chosen].name
    if chosen == 0 and old == OUTPUT:
        return False
    if old != OUTPUT:
        rename_value(model.graph, old, OUTPUT)
    ordered = [outputs[chosen], *(e for i, e in enumerate(outputs) if i != chosen)]
    copies = [onnx.ValueInfoProto.FromString(entry.SerializeToString()) for entry in ordered]
    del model.graph.output[:]
    model.graph.output.extend(copies)
    return True


def rename_value(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a value of a graph, inside its inner graphs too."""
    for entry in (*graph.output, *graph.value_info):
        if entry.name == old:
            entry.name = new
    for node in _nodes(graph):
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.generic]]:
    """Return the initializers of a model by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
