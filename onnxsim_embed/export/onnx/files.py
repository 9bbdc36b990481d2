"""ONNX files that other exporters made: their inputs, outputs and weight files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.system.hardware import CPU_PROVIDER
from onnxsim_embed.system.onnx_session import onnxruntime, start_session

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
OUTPUTS = (OUTPUT, "token_embeddings")  # of hidden states; the second is sentence-transformers'

# protobuf ends at 2 GB: above this, weights go to a file beside the graph.
MAX_FILE_BYTES = 1_900_000_000
DATA_SUFFIX = "_data"  # as optimum and transformers.js call it: model.onnx_data


def load_graph(path: Path, *, weights: bool = False) -> onnx.ModelProto:
    """Read an ONNX file, with the weights in its external data files if asked for."""
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node:
            raise ValueError("it has no graph")
        for node in (node for graph in subgraphs(model.graph) for node in graph.node):
            names = (node.name, node.op_type, *node.input, *node.output)
            if any(isinstance(name, bytes) for name in names):
                raise ValueError("it has names that are not UTF-8")
    except Exception as error:  # protobuf's exceptions share no base class
        raise CheckpointError(f"{path} is not a readable ONNX file: {error}") from None
    if data_files(model, path) and weights:
        load_external_data_for_model(model, str(path.parent))
    return model


def data_files(model: onnx.ModelProto, path: Path) -> list[str]:
    """Return the files beside an ONNX file that hold its weights; raise if one is elsewhere."""
    names: set[str] = set()
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        name = ExternalDataInfo(tensor).location
        if not name or "\\" in name or PurePosixPath(name).name != name or name == "..":
            raise CheckpointError(
                f"{path} keeps weights of {tensor.name!r} in {name!r}; only files in its own "
                "directory are read"
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: the weight file {name} is missing in its directory")
        names.add(name)
    return sorted(names)


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the graphs inside its nodes (branches and loop bodies)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                yield from subgraphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in subgraphs(graph):
        yield from inner.initializer
        for sparse in inner.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in inner.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)


def save_graph(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Write a model whose weights are in memory; return the name of its data file if it needs one."""
    if model.ByteSize() <= MAX_FILE_BYTES:
        onnx.save(model, path)
        return ()
    name = path.name + DATA_SUFFIX
    onnx.save(model, path, save_as_external_data=True, location=name, size_threshold=1024)
    return (name,)


def simplify(source: Path, target: Path) -> tuple[str, ...]:
    """Fold constants and remove idle nodes; standard operators remain. Returns as `save_graph`.

    onnxruntime makes further fusions when it loads the file; its fused attention measured no faster on
    the CPU, fused skip normalization slower.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    work = target.with_name(target.name + ".work")
    data = work.with_name(work.name + DATA_SUFFIX)
    options.optimized_model_filepath = str(work)
    if sum(path.stat().st_size for path in source.parent.iterdir()) > MAX_FILE_BYTES:
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, data.name)
    onnxruntime.InferenceSession(str(source), options, providers=[CPU_PROVIDER])
    model = load_graph(work, weights=True)
    for path in (work, data):
        path.unlink(missing_ok=True)
    remove_unused_domains(model)
    del model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]  # torch's stack traces
    return save_graph(model, target)


def remove_unused_domains(model: onnx.ModelProto) -> None:
    """Keep the operator sets that the graph uses; onnxruntime lists every one it knows."""
    used = {"", *(node.domain for graph in subgraphs(model.graph) for node in graph.node)}
    opsets = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)


def check_inputs(model: onnx.ModelProto, source: str) -> None:
    """Raise if a graph takes other inputs than token ids, attention mask and token types."""
    constants = {tensor.name for tensor in model.graph.initializer}
    types = {
        entry.name: entry.type.tensor_type.elem_type
        for entry in model.graph.input
        if entry.name not in constants
    }
    if not set(INPUTS[:2]) <= set(types) <= set(INPUTS):
        raise CheckpointError(
            f"{source} takes the inputs {', '.join(types) or 'none'}; supported are input_ids, "
            "attention_mask and, optionally, token_type_ids"
        )
    if wrong := [name for name, dtype in types.items() if dtype != TensorProto.INT64]:
        dtype = TensorProto.DataType.Name(types[wrong[0]])
        raise CheckpointError(f"{source}: input {wrong[0]} is {dtype}; expected INT64")


def put_hidden_first(
    model: onnx.ModelProto, source: str, hidden: int | None = None, output: str | None = None
) -> bool:
    """Make the hidden states the first output, named as readers expect; return if that changed it.

    :param hidden: their size, if it is known.
    :param output: their name; None for one of `OUTPUTS`, or the only output of their shape.
    """
    outputs = {entry.name: entry for entry in model.graph.output}
    shapes = {
        name: [d.dim_value or d.dim_param or "?" for d in entry.type.tensor_type.shape.dim]
        for name, entry in outputs.items()
    }
    output = output or next((name for name in OUTPUTS if name in outputs), None)
    chosen = [
        name
        for name, shape in shapes.items()
        if output in (None, name)
        and len(shape) == 3
        and (hidden is None or shape[2] == hidden or isinstance(shape[2], str))
    ]
    if len(chosen) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise CheckpointError(
            f"{source}: expected one output{f' {output}' if output else ''} of shape (batch, sequence, "
            f"{hidden or 'hidden'}), found {len(chosen)}; its outputs are {listed}. Pass onnx_output=NAME to "
            "choose the hidden states"
        )
    (name,) = chosen
    if outputs[name].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise CheckpointError(f"{source}: output {name} is not float32")
    if name == model.graph.output[0].name == OUTPUT:
        return False
    rename_value(model.graph, OUTPUT, f"{OUTPUT}_replaced")
    rename_value(model.graph, name, OUTPUT)
    entries = [outputs.pop(name), *outputs.values()]
    del model.graph.output[:]
    model.graph.output.extend(entries)
    return True


def rename_value(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a value of a graph, inside its subgraphs too."""
    for entry in (*graph.output, *graph.value_info):
        if entry.name == old:
            entry.name = new
    for node in (node for inner in subgraphs(graph) for node in inner.node):
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def start_beside(model: onnx.ModelProto, file: Path) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """Start a session of a graph whose weights may be in `file` or beside it."""
    work = file.with_name("observed.onnx")
    onnx.save(model, work)
    try:
        return start_session(str(work), [CPU_PROVIDER])
    finally:
        work.unlink()
