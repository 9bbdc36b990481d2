"""Checks of the ONNX files that readers look for: their names, inputs and outputs."""

from __future__ import annotations

from typing import Any

from onnxsim_embed.doctor.place import FASTEMBED, JS, ST, TEI, Finding, Place, check_inside

ALL = (ST, FASTEMBED, TEI, JS)
MAIN = "onnx/model.onnx"
OTHERS = tuple(f"onnx/model_{kind}.onnx" for kind in ("fp16", "quantized", "int8", "uint8"))
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
OUTPUTS_OF_JS = (OUTPUT, "logits", "token_embeddings")


def check_graphs(place: Place) -> None:
    """Find ONNX files that are missing, damaged or of other inputs and outputs."""
    others = [name for name in OTHERS if place.has(name)]
    if place.has(MAIN):
        _check_graph(place, MAIN)
    elif place.has("model.onnx"):
        effect = f"does not find it: it looks for {MAIN}"
        place.findings.append(
            Finding("model.onnx", None, (JS,), effect, f"move it to {MAIN}, with its data file")
        )
        _check_graph(place, "model.onnx")
    elif others:
        effect = (
            f"{TEI} does not start, {JS} must be told the dtype, and {ST} exports the model anew with "
            "PyTorch, without a word"
        )
        remedy = f"put the float32 file there; {others[0]} alone is not enough"
        place.findings.append(Finding(MAIN, None, (ST, TEI, JS), effect, remedy))
    else:
        effect = f"there is no ONNX file ({ST} makes one with PyTorch, if told to use ONNX)"
        place.findings.append(Finding(MAIN, None, ALL, effect, place.export))
    for name in others:
        _check_graph(place, name)


def _check_graph(place: Place, name: str) -> None:
    from onnxsim_embed.system.hardware import CPU_PROVIDER

    try:
        check_inside(place.directory, name)
        inputs, outputs = _open(str(place.directory / name), CPU_PROVIDER)
    except Exception as error:  # onnxruntime's exceptions share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        effect = f"does not load: {lines[0]:.200}"
        place.findings.append(Finding(name, None, ALL, effect, place.export))
        return

    def add(key: str, readers: tuple[str, ...], effect: str) -> None:
        place.findings.append(Finding(name, key, readers, effect, place.export))

    for entry in inputs:
        if entry.name not in INPUTS:
            add(f"input {entry.name}", ALL, "fails: it feeds token ids, mask and types only")
        elif entry.type != "tensor(int64)":
            add(
                f"input {entry.name}",
                ALL,
                f"fails: it feeds int64, the file takes {entry.type}",
            )
    if all(entry.name != "input_ids" for entry in inputs):
        add("inputs", ALL, "fails: the file takes no input_ids")
    names = [entry.name for entry in outputs]
    if OUTPUT not in names:
        readers = (ST,) if set(OUTPUTS_OF_JS) & set(names) else (ST, JS)
        add("outputs", readers, f"fails: no output is called {OUTPUT}, but {', '.join(names)}")
    if len(outputs[0].shape) != 3:
        effect = f"takes the first output, {names[0]}, which holds no hidden states of three axes"
        add(f"output {names[0]}", (FASTEMBED,), effect)
    if name in (MAIN, "model.onnx") and outputs[0].type != "tensor(float)":
        add(
            f"output {names[0]}",
            (TEI,),
            f"fails: it reads float32, the file gives {outputs[0].type}",
        )


def _open(path: str, provider: str) -> tuple[list[Any], list[Any]]:
    """Return inputs and outputs of an ONNX file, which is loaded but not run."""
    from onnxsim_embed.system.onnx_session import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    return session.get_inputs(), session.get_outputs()
