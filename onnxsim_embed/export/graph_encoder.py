"""An encoder that exists only as an ONNX file, traced or adopted: its precisions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxsim_embed.artifact.manifest import MODEL_FILES, Artifact, PrecisionEntry
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.fidelity import FIDELITY_THRESHOLDS, bundled_texts, row_cosines
from onnxsim_embed.export.onnx.builder import operator_counts
from onnxsim_embed.export.onnx.files import OUTPUT, load_graph, save_graph, start_beside
from onnxsim_embed.export.quantization.calibration import Activations, TokenIds, observe
from onnxsim_embed.export.quantization.encoder import METHOD, Quantizer, describe_fit
from onnxsim_embed.export.quantization.onnx import find_linears, fit_graph, quantize_graph
from onnxsim_embed.export.quantization.search import Choice, Search, hold_out, vector_loss
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.pooling import Head
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.hardware import CPU_PROVIDER
from onnxsim_embed.system.onnx_session import start_session
from onnxsim_embed.system.threads import map_chunks

logger = logging.getLogger(__name__)


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
        self, work: Path, token_ids: TokenIds, head: Head
    ) -> tuple[Search, Callable[[Choice], PrecisionEntry]]:
        """Run the calibration texts; return the search, and a function that writes a choice."""
        path, target = work / MODEL_FILES["fp32"], work / MODEL_FILES["int8"]
        rest, held_out = hold_out(token_ids)
        seen = observe_linears(path, rest)
        model = load_graph(path, weights=True)
        linears = {entry.input: entry.name for entry in reversed(find_linears(model))}
        groups = fit_graph(model, seen)
        quantize = Quantizer(groups)

        def vectors(path: Path) -> list[Float32]:
            session = start_session(str(path), [CPU_PROVIDER])
            return list(
                map_chunks(lambda ids: head(_run(session, [OUTPUT], ids[None])[0]), held_out)
            )

        def save(choice: Choice, final: bool) -> PrecisionEntry:
            int8 = onnx.ModelProto()
            int8.CopyFrom(model)
            quantize_graph(int8, choice, quantize(choice, final))
            return _entry("int8", METHOD, operator_counts(int8), save_graph(int8, target))

        def loss(choice: Choice) -> float:
            save(choice, final=False)
            return vector_loss(reference, vectors(target))

        def write(choice: Choice) -> PrecisionEntry:
            layers = [
                {linears[name]: describe_fit(groups[name], fit)} for name, fit in choice.items()
            ]
            return replace(save(choice, final=True), layers=tuple(layers))

        reference = vectors(path)
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

    def run(ids: npt.NDArray[np.int64]) -> list[Float32 | None]:
        rows = np.ascontiguousarray(ids.T)
        values = _run(session, list(dims), rows)
        # Some graphs flatten the tokens; a value of another size (relative positions) has none.
        return [
            value.reshape(*rows.shape, -1).swapaxes(0, 1)
            if value.size == rows.size * dim and np.isfinite(value).all()
            else None
            for value, dim in zip(values, dims.values(), strict=True)
        ]

    seen = observe(run, list(dims), sum(dims.values()), token_ids)
    if skipped := [entry.name for entry in linears if entry.input not in seen]:
        message = (
            f"{len(skipped)} linear layers have no finite input for each token, {skipped[0]} first"
        )
        if not seen:
            raise CheckpointError(f"{path.name}: {message}; export fp32 only")
        logger.warning("%s; they stay float32", message)
    return seen


def _run(session: Any, names: list[str], ids: npt.NDArray[np.int64]) -> list[Float32]:  # noqa: ANN401
    """Return values of a graph for rows of equal length."""
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    inputs["token_type_ids"] = np.zeros_like(ids)
    feed = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
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
