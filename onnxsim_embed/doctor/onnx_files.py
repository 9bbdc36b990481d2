"""The ONNX files that readers look for, with their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxsim_embed.doctor.directory import Directory, check_inside

MAIN = "onnx/model.onnx"
ROOT = "model.onnx"
OTHERS = tuple(f"onnx/model_{kind}.onnx" for kind in ("fp16", "quantized", "int8", "uint8"))
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
JS_OUTPUTS = (OUTPUT, "logits", "token_embeddings")


@dataclass(frozen=True)
class OnnxFile:
    """Types of an ONNX file's inputs and outputs, or the error that loading it raises."""

    name: str
    path: Path
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    first_axes: int | None = None
    error: str = ""

    @property
    def first_output(self) -> str | None:
        """Name of the first output."""
        return next(iter(self.outputs), None)

    @property
    def first_type(self) -> str | None:
        """Type of the first output."""
        return next(iter(self.outputs.values()), None)


def open_onnx_files(directory: Directory) -> list[OnnxFile]:
    """Load the ONNX files of a directory, without running them."""
    main = MAIN if directory.has(MAIN) else ROOT
    return [_open(directory.path, name) for name in (main, *OTHERS) if directory.has(name)]


def _open(path: Path, name: str) -> OnnxFile:
    from onnxsim_embed.system.hardware import CPU_PROVIDER
    from onnxsim_embed.system.onnx_session import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        check_inside(path, name)
        session = onnxruntime.InferenceSession(str(path / name), options, providers=[CPU_PROVIDER])
    except Exception as error:  # onnxruntime's exceptions share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return OnnxFile(name, path, error=f"{lines[0]:.200}")
    inputs, outputs = session.get_inputs(), session.get_outputs()
    axes = len(outputs[0].shape) if outputs else None
    return OnnxFile(name, path, _types(inputs), _types(outputs), axes)


def _types(entries: Iterable[Any]) -> dict[str, str]:
    return {entry.name: entry.type for entry in entries}
