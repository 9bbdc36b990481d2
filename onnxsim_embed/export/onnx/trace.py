"""Architectures without a builder of their own: PyTorch's model -> ONNX, traced by optimum."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError, MissingExtraError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.onnx import files
from onnxsim_embed.export.onnx.builder import OPSET
from onnxsim_embed.export.reference import first_line, load_model, quiet_transformers


def has_optimum() -> bool:
    """Return whether optimum's ONNX exporter is installed."""
    return bool(find_spec("optimum") and find_spec("optimum.exporters.onnx"))


def trace(checkpoint: Checkpoint, target: Path) -> tuple[int, int, tuple[str, ...]]:
    """Write an encoder as ONNX with standard operators, the inputs of `Session`, last_hidden_state.

    :param target: the ONNX file to write.
    :returns: hidden size, number of layers, and the files beside it that hold weights.
    :raises MissingExtraError: if optimum is not installed.
    :raises CheckpointError: if the weights are incomplete or broken, or optimum cannot trace the
        architecture.
    """
    architecture = checkpoint.architecture
    if not has_optimum():
        raise MissingExtraError(
            f"exporting architecture {architecture!r}", "optimum", "optimum-onnx"
        )
    work = target.parent / "traced"
    work.mkdir()
    raw = work / "model.onnx"
    with quiet_transformers():
        model = load_model(checkpoint)
        _trace(model, architecture, raw)
    graph, source = files.load_graph(raw), f"the traced {architecture} model"
    files.check_inputs(graph, source)
    files.put_hidden_first(graph, source)
    data = files.simplify(raw, target)
    shutil.rmtree(work)
    return int(model.config.hidden_size), int(model.config.num_hidden_layers), data


def _trace(model: Any, architecture: str, target: Path) -> None:  # noqa: ANN401
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.tasks import TasksManager

    try:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError("it has a decoder; only encoders are supported")
        onnx_config = TasksManager.get_exporter_config_constructor(
            "onnx", model, task="feature-extraction", library_name="transformers"
        )
        _, outputs = export(model, onnx_config(model.config), target, opset=OPSET)
        if files.OUTPUT not in outputs:
            raise ValueError(f"its outputs are {', '.join(outputs)}")
    except Exception as error:  # torch's, optimum's, and KeyError for unregistered architectures
        raise CheckpointError(
            f"architecture {architecture!r} can be exported neither directly (supported for 'bert') "
            f"nor through optimum: {first_line(error)}"
        ) from error
