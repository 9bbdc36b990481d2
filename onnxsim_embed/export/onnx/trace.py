"""Architectures without a builder of their own: PyTorch's model -> ONNX, traced by optimum."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError, MissingExtraError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.onnx.builder import OPSET
from onnxsim_embed.export.onnx.files import (
    OUTPUT,
    check_inputs,
    load_graph,
    put_hidden_first,
    simplify,
)

TASK = "feature-extraction"


@dataclass(frozen=True)
class Traced:
    """A traced encoder; `data` names the external data files beside the ONNX file."""

    hidden: int
    layers: int
    data: tuple[str, ...]


def has_optimum() -> bool:
    """Return whether optimum's ONNX exporter is installed."""
    if importlib.util.find_spec("optimum") is None:
        return False
    return importlib.util.find_spec("optimum.exporters.onnx") is not None


def trace(checkpoint: Checkpoint, target: Path) -> Traced:
    """Write an encoder as ONNX with standard operators, the inputs of `Session`, last_hidden_state.

    :param target: the ONNX file to write.
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
    with _quiet():
        model = _load_model(checkpoint)
        _trace(model, architecture, raw)
    graph, source = load_graph(raw), f"the traced {architecture} model"
    check_inputs(graph, source)
    put_hidden_first(graph, source)
    data = simplify(raw, target)
    shutil.rmtree(work)
    config = model.config
    return Traced(int(config.hidden_size), int(config.num_hidden_layers), data)


def _load_model(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 - transformers is untyped
    """Load the model; all weights must be in the file, as transformers initializes others at random."""
    import torch
    from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(
            checkpoint.transformer,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # configuration, OS and unpickling errors share no base class
        raise CheckpointError(
            f"transformers cannot load {checkpoint.transformer}: {_first_line(error)}"
        ) from error
    missing = [name for name in sorted(report["missing_keys"]) if "pooler" not in name]
    if missing:
        raise CheckpointError(
            f"the weights lack {len(missing)} tensors, {missing[0]!r} first; is this a complete "
            f"{checkpoint.architecture} model?"
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"tensor {name!r} in {checkpoint.transformer} contains NaN or infinite values: the "
                "checkpoint is broken (a diverged training run?)"
            )
    return model.eval()


def _trace(model: Any, architecture: str, target: Path) -> None:  # noqa: ANN401
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.tasks import TasksManager

    try:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError("it has a decoder; only encoders are supported")
        onnx_config = TasksManager.get_exporter_config_constructor(
            "onnx", model, task=TASK, library_name="transformers"
        )
        _, outputs = export(model, onnx_config(model.config), target, opset=OPSET)
        if OUTPUT not in outputs:
            raise ValueError(f"its outputs are {', '.join(outputs)}")
    except Exception as error:  # torch's, optimum's, and KeyError for unregistered architectures
        raise CheckpointError(
            f"architecture {architecture!r} can be exported neither directly (supported for 'bert') "
            f"nor through optimum: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide a trace's own warnings about Python branches and deprecations."""
    from transformers.utils import logging as transformers_logging

    progress_bar = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    optimum_logger = logging.getLogger("optimum")
    level = optimum_logger.level
    optimum_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optimum_logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()
