"""An encoder that exists only as an ONNX file, traced or adopted: its precisions."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsim_embed.artifact.manifest import MODEL_FILES, Artifact, PrecisionEntry, outside
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.fidelity import FIDELITY_THRESHOLDS, bundled_texts, row_cosines
from onnxsim_embed.export.onnx.builder import operator_counts
from onnxsim_embed.export.onnx.files import (
    check_inputs,
    data_files,
    load_graph,
    put_hidden_first,
    save_graph,
    start_beside,
)
from onnxsim_embed.export.quantization.calibration import Activations, TokenIds, observe
from onnxsim_embed.export.quantization.encoder import METHOD, Quantizer, describe_fit
from onnxsim_embed.export.quantization.onnx import find_linears, fit_graph, quantize_graph
from onnxsim_embed.export.quantization.search import Choice, Search
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.session import Session, encoder_inputs
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import CPU_PROVIDER
from onnxsim_embed.system.onnx_session import start_session

logger = logging.getLogger(__name__)

# Names of exporters' fp32 files in order of preference.
ONNX_FILES = ("onnx/model.onnx", "model.onnx")

# Operators that take quantization ranges from the batch, so that vectors depend on it.
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class GraphEncoder:
    """The fp32 file of an artifact that is being written, and `data` files beside it."""

    hidden: int
    layers: int
    method: str
    via: str
    data: tuple[str, ...]

    def write_fp32(self, work: Path) -> PrecisionEntry:
        """Describe the fp32 file, which exists already."""
        counts = operator_counts(load_graph(work / MODEL_FILES["fp32"]))
        return _entry("fp32", self.method, counts, self.data)

    def prepare_int8(
        self, work: Path, token_ids: TokenIds, file_loss: Callable[[Path], float]
    ) -> tuple[Search, Callable[[Choice], PrecisionEntry]]:
        """Run the calibration texts; return the search, and a function that writes a choice."""
        path, target = work / MODEL_FILES["fp32"], work / MODEL_FILES["int8"]
        seen = observe_linears(path, token_ids)
        model = load_graph(path, weights=True)
        linears = {entry.input: entry.name for entry in reversed(find_linears(model))}
        groups = fit_graph(model, seen)
        quantize = Quantizer(groups)

        def save(choice: Choice, final: bool) -> PrecisionEntry:
            int8 = onnx.ModelProto()
            int8.CopyFrom(model)
            quantize_graph(int8, choice, quantize(choice, final))
            return _entry("int8", METHOD, operator_counts(int8), save_graph(int8, target))

        def loss(choice: Choice) -> float:
            save(choice, final=False)
            return file_loss(target)

        def write(choice: Choice) -> PrecisionEntry:
            fits = [(linears[name], groups[name], fit) for name, fit in choice.items()]
            layers = tuple({name: describe_fit(group, fit)} for name, group, fit in fits)
            return replace(save(choice, final=True), layers=layers)

        return Search(groups, loss), write


def _entry(
    precision: str, method: str, counts: dict[str, int], data: Sequence[str]
) -> PrecisionEntry:
    file = MODEL_FILES[precision]
    beside = tuple(Path(file).with_name(name).as_posix() for name in data)
    return PrecisionEntry(file, None, method, counts, data=beside)


def observe_linears(path: Path, token_ids: TokenIds) -> dict[str, Activations]:
    """Return the activations of the linears' inputs in an ONNX file, by the input's name."""
    linears = find_linears(load_graph(path, weights=True))
    dims = {entry.input: len(entry.linear.weight) for entry in linears}
    if not dims:
        raise CheckpointError(
            f"{path.name} has no float32 linear layers to quantize; export fp32 only"
        )
    model = load_graph(path)
    names = dims.keys() - {entry.name for entry in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    session = start_beside(model, path)

    def run(ids: Int64) -> dict[str, Float32]:
        rows = np.ascontiguousarray(ids.T)
        values = zip(dims, _run(session, list(dims), rows), strict=True)
        # Some graphs flatten the tokens; a value of another size (relative positions) has none.
        return {
            name: value.reshape(*rows.shape, -1).swapaxes(0, 1)
            for name, value in values
            if value.size == rows.size * dims[name] and np.isfinite(value).all()
        }

    seen = observe(run, sum(dims.values()), token_ids)
    if skipped := [entry.name for entry in linears if entry.input not in seen]:
        message = (
            f"{len(skipped)} linear layers have no finite input for each token, {skipped[0]} first"
        )
        if not seen:
            raise CheckpointError(f"{path.name}: {message}; export fp32 only")
        logger.warning("%s; they stay float32", message)
    return seen


def _run(session: Any, names: list[str], ids: Int64) -> list[Float32]:  # noqa: ANN401
    """Return values of a graph for rows of equal length."""
    feed, _ = encoder_inputs({entry.name for entry in session.get_inputs()}, ids, None)
    values: list[Float32] = session.run(names, feed)
    return values


def compare_sentence_embedding(artifact: Artifact) -> list[str]:
    """Return how vectors differ from those that an adopted graph computes itself, if it does."""
    name = "sentence_embedding"
    session = start_session(str(artifact.open_file("fp32")), [CPU_PROVIDER])
    if name not in {entry.name for entry in session.get_outputs()}:
        return []
    model = Embedder(artifact, precision="fp32", device="cpu")
    texts = bundled_texts("verification.jsonl")[:16]
    vectors = model.encode(texts, prompt="")
    own = np.concatenate([_run(session, [name], ids[None])[0] for ids in model.token_ids(texts)])
    if own.shape != vectors.shape:
        return [f"vectors have shape {vectors.shape}, the graph's own {name} {own.shape}"]
    if (least := float(row_cosines(own, vectors).min())) >= FIDELITY_THRESHOLDS["fp32"][1]:
        return []
    return [
        f"vectors differ from the graph's own {name}: min cosine {least:.5f}; check the pooling"
    ]


def find_onnx(checkpoint: Checkpoint) -> Path | None:
    """Return the fp32 ONNX file of a checkpoint, or None."""
    paths = (
        d / name for d in (checkpoint.transformer, checkpoint.directory) for name in ONNX_FILES
    )
    return next((path for path in paths if path.is_file()), None)


def adopt(checkpoint: Checkpoint, target: Path, output: str | None = None) -> GraphEncoder:
    """Copy an ONNX file and its external weights; outputs may be renamed or reordered.

    :param output: name of the hidden states among the file's outputs; None to detect it.
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


def hidden_size(path: Path) -> int:
    """Return the hidden size of a file, by running three tokens."""
    ids = np.array([[1, 2, 3]], np.int64)
    try:
        hidden = Session(path, "cpu").run(ids, np.ones_like(ids))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise CheckpointError(f"onnxruntime cannot run {path.name}: {error}") from error
    if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
        raise CheckpointError(
            f"{path.name} returns shape {hidden.shape} for one text of 3 tokens; expected (1, 3, hidden)"
        )
    if not np.isfinite(hidden).all():
        raise CheckpointError(f"{path.name} returns NaN or infinite values")
    return int(hidden.shape[2])
