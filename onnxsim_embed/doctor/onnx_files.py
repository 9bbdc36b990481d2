"""The ONNX files that readers look for, with their inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

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
    first_output: str = ""
    first_axes: int = 3
    error: str = ""


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
        session = onnxruntime.InferenceSession(
            str(path / name),
            options,
            providers=[CPU_PROVIDER],
            enable_fallback=0,  # which prints and tries the same provider again
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return OnnxFile(name, path, error=f"{lines[0]:.200}")
    inputs, outputs = session.get_inputs(), session.get_outputs()
    types = [{entry.name: entry.type for entry in entries} for entries in (inputs, outputs)]
    return OnnxFile(name, path, types[0], types[1], outputs[0].name, len(outputs[0].shape))
