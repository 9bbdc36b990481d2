"""A directory of somebody else's ONNX files -> fp32 file of an artifact: checked and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from onnxsim_embed.artifact.manifest import outside
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.onnx.encoder import GraphEncoder, hidden_size
from onnxsim_embed.export.onnx.files import (
    check_inputs,
    data_files,
    load_graph,
    put_hidden_first,
)

# Where exporters put their fp32 file, first choice first.
PLACES = ("onnx/model.onnx", "model.onnx")

# What makes a vector depend on its batch: ranges taken from the data as it comes.
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def find_onnx(directory: Path) -> Path | None:
    """Return the fp32 ONNX file of a directory, or None."""
    return next((directory / p for p in PLACES if (directory / p).is_file()), None)


def adopt(checkpoint: Checkpoint, target: Path) -> GraphEncoder:
    """Copy an ONNX file and the weights beside it; only outputs are renamed or reordered.

    :param target: the ONNX file to write.
    :raises CheckpointError: if there is none, or it does not compute hidden states of token ids.
    """
    path = find_onnx(checkpoint.transformer) or find_onnx(checkpoint.directory)
    if path is None:
        raise CheckpointError(
            f"{checkpoint.directory} holds no ONNX file to adopt: neither {' nor '.join(PLACES)} is there"
        )
    model = load_graph(path)
    where = str(path)
    check_inputs(model, where)
    if dynamic := [node.op_type for node in model.graph.node if node.op_type in DYNAMIC]:
        raise CheckpointError(
            f"{where} is quantized dynamically ({dynamic[0]}): its vectors change with the batch; "
            "give the float32 file, --precision int8 makes a static one of it"
        )
    names = data_files(model, path)
    for name in (path.name, *names):
        _check_link(path.with_name(name), checkpoint.directory)
    for name in names:
        shutil.copyfile(path.with_name(name), target.with_name(name))
    if put_hidden_first(model, where):
        onnx.save(model, target)
    else:
        shutil.copyfile(path, target)
    layers = checkpoint.config.get("num_hidden_layers", checkpoint.config.get("n_layers", 0))
    method = f"adopted: {path.relative_to(checkpoint.directory).as_posix()} of the source"
    return GraphEncoder(hidden_size(target), int(layers), method, "adopted", tuple(names))


def _check_link(path: Path, directory: Path) -> None:
    """Refuse a link that leads out of the directory, but for the Hub's cache, which is made of them."""
    if (real := outside(path, directory)) is not None:
        raise CheckpointError(f"{path} is a link to {real}, outside {directory}")
