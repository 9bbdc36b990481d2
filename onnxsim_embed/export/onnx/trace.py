"""Architectures without a builder of their own: PyTorch's model -> ONNX, traced by optimum."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError, MissingExtraError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.onnx import files
from onnxsim_embed.export.onnx.builder import OPSET


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
    with _quiet():
        model = _load_model(checkpoint)
        _trace(model, architecture, raw)
    graph, source = files.load_graph(raw), f"the traced {architecture} model"
    files.check_inputs(graph, source)
    files.put_hidden_first(graph, source)
    data = files.simplify(raw, target)
    shutil.rmtree(work)
    return int(model.config.hidden_size), int(model.config.num_hidden_layers), data


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
            "onnx", model, task="feature-extraction", library_name="transformers"
        )
        _, outputs = export(model, onnx_config(model.config), target, opset=OPSET)
        if files.OUTPUT not in outputs:
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
    """Hide a trace's own warnings about Python branches and deprecations, and progress bars."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("optimum", "transformers")]
    levels = [logger.level for logger in loggers]
    progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if progress_bar:
            transformers_logging.enable_progress_bar()
