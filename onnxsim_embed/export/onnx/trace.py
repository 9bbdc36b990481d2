"""Architectures without a builder of their own: PyTorch's model -> ONNX, traced by torch.onnx or optimum."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.onnx import files
from onnxsim_embed.export.onnx.builder import OPSET
from onnxsim_embed.export.reference import first_line, load_model, quiet_transformers

# What each way of tracing needs, with the first major and minor version, in order of preference.
REQUIREMENTS = {
    "torch": {"torch": (2, 6), "transformers": (5, 0), "onnxscript": (0, 0)},
    "optimum": {"torch": (2, 6), "transformers": (4, 56), "optimum-onnx": (0, 0)},
}
DYNAMO_OPSET = 18  # that of torch's own translations; a conversion to another may fail


def missing_package(via: str) -> str | None:
    """Return the first package that a way of tracing lacks or needs in a later version, or None."""
    for name, least in REQUIREMENTS[via].items():
        try:
            major, minor = version(name).split(".")[:2]
        except PackageNotFoundError:
            return name
        if (int(major), int(minor)) < least:
            return f"{name}>={'.'.join(map(str, least))}"
    return None


def trace(checkpoint: Checkpoint, via: str, target: Path) -> tuple[int, int, tuple[str, ...]]:
    """Write an encoder as ONNX with standard operators, the inputs of `Session`, last_hidden_state.

    :param via: key of REQUIREMENTS.
    :returns: hidden size, number of layers, and the files beside it that hold weights.
    """
    import torch  # noqa: F401 - sets the levels of its loggers, which are silenced below

    architecture = checkpoint.architecture
    work = target.parent / "traced"
    work.mkdir()
    raw = work / "model.onnx"
    with quiet_transformers():
        model = load_model(checkpoint)
        try:
            if getattr(model.config, "is_encoder_decoder", False):
                raise ValueError("it has a decoder; only encoders are supported")
            TRACERS[via](model, raw)
            graph = files.load_graph(raw)
            for entry in graph.graph.input:
                if any(axis.dim_value for axis in entry.type.tensor_type.shape.dim):
                    raise ValueError("its graph would take texts of one length only")
        # torch's, optimum's, and KeyError for unregistered architectures
        except Exception as error:
            raise CheckpointError(
                f"architecture {architecture!r} cannot be exported with via={via!r}: {first_line(error)}"
            ) from error
    source = f"the traced {architecture} model"
    files.check_inputs(graph, source)
    files.put_hidden_first(graph, source)
    data = files.simplify(raw, target)
    shutil.rmtree(work)
    return int(model.config.hidden_size), int(model.config.num_hidden_layers), data


def _trace_torch(model: Any, target: Path) -> None:  # noqa: ANN401
    """Trace with torch.export; the older TorchScript exporter gives wrong graphs."""
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:  # noqa: ANN401
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    ids = torch.arange(14).reshape(2, 7) % model.config.vocab_size
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        Encoder().eval(),
        (ids, torch.ones_like(ids)),
        target,
        input_names=files.INPUTS[:2],
        output_names=[files.OUTPUT],
        dynamic_shapes={name: axes for name in files.INPUTS[:2]},
        opset_version=DYNAMO_OPSET,
        dynamo=True,
        verbose=False,
        external_data=model.num_parameters() * 4 > files.MAX_FILE_BYTES,
    )


def _trace_optimum(model: Any, target: Path) -> None:  # noqa: ANN401
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.tasks import TasksManager

    onnx_config = TasksManager.get_exporter_config_constructor(
        "onnx", model, task="feature-extraction", library_name="transformers"
    )
    export(model, onnx_config(model.config), target, opset=OPSET)


TRACERS: dict[str, Callable[[Any, Path], None]] = {
    "torch": _trace_torch,
    "optimum": _trace_optimum,
}
