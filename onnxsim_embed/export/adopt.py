"""Existing ONNX files -> fp32 file of an artifact: checked and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from onnxsim_embed.artifact.manifest import outside
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.graph_encoder import GraphEncoder, hidden_size
from onnxsim_embed.export.onnx.files import (
    check_inputs,
    data_files,
    load_graph,
    put_hidden_first,
)

# Names of exporters' fp32 files in order of preference.
ONNX_FILES = ("onnx/model.onnx", "model.onnx")

# Operators that take quantization ranges from the batch, so that vectors depend on it.
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def find_onnx(checkpoint: Checkpoint) -> Path | None:
    """Return the fp32 ONNX file of a checkpoint, or None."""
    paths = (
        d / name for d in (checkpoint.transformer, checkpoint.directory) for name in ONNX_FILES
    )
    return next((path for path in paths if path.is_file()), None)


def adopt(checkpoint: Checkpoint, target: Path, output: str | None = None) -> GraphEncoder:
    """Copy an ONNX file and its external weights; outputs may be renamed or reordered.

    :param target: the ONNX file to write.
    :param output: name of the hidden states among the file's outputs; None to detect it.
    :raises CheckpointError: if there is none, or it does not compute hidden states from token ids.
    """
    path = find_onnx(checkpoint)
    if path is None:
        raise CheckpointError(
            f"{checkpoint.directory} has no ONNX file: expected {' or '.join(ONNX_FILES)}"
        )
    model = load_graph(path)
    check_inputs(model, str(path))
    if dynamic := [node.op_type for node in model.graph.node if node.op_type in DYNAMIC]:
        raise CheckpointError(
            f"{path} is quantized dynamically ({dynamic[0]}), which makes vectors depend on the batch; "
            "adopt the float32 file, from which precisions=['int8'] makes a static one"
        )
    names = data_files(model, path)
    for file in (path, *map(path.with_name, names)):
        if (real := outside(file, checkpoint.directory)) is not None:
            raise CheckpointError(f"{file} is a link to {real}, outside {checkpoint.directory}")
    for name in names:
        shutil.copyfile(path.with_name(name), target.with_name(name))
    config = checkpoint.config
    sizes = [config[key] for key in ("hidden_size", "dim", "d_model") if key in config]
    expected = None if output or not sizes else int(sizes[0])
    if put_hidden_first(model, str(path), expected, output):
        onnx.save(model, target)
    else:
        shutil.copyfile(path, target)
    hidden = hidden_size(target)
    if expected not in (None, hidden):
        raise CheckpointError(
            f"{path} computes hidden states of size {hidden}, config.json states {expected}; pass "
            "onnx_output=NAME to choose another output, or the same one if it is right"
        )
    layers = config.get("num_hidden_layers", config.get("n_layers", 0))
    method = f"adopted: {path.relative_to(checkpoint.directory).as_posix()} of the source"
    return GraphEncoder(hidden, int(layers), method, "adopted", tuple(names))
