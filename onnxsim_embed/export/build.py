"""Builds an artifact from a checkpoint: graphs, configuration, verification, manifest."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import (
    CARD,
    ENCODER_FILES,
    MANIFEST,
    MODEL_FILES,
    Artifact,
    Manifest,
    PrecisionEntry,
    list_files,
)
from onnxsim_embed.artifact.recipes import Recipe
from onnxsim_embed.errors import VerificationError
from onnxsim_embed.export.adopt import adopt
from onnxsim_embed.export.bert import Bert, load_bert
from onnxsim_embed.export.card import write_card
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.configs import write_configs
from onnxsim_embed.export.onnx.bert_graph import build_encoder
from onnxsim_embed.export.onnx.builder import operator_counts, share_constants
from onnxsim_embed.export.onnx.encoder import GraphEncoder
from onnxsim_embed.export.onnx.fp16 import METHOD as FP16_METHOD
from onnxsim_embed.export.onnx.fp16 import write_fp16
from onnxsim_embed.export.onnx.trace import trace
from onnxsim_embed.export.quantization.bert import METHOD, quantize_static
from onnxsim_embed.export.quantization.calibration import calibration_texts, collect_activations
from onnxsim_embed.export.quantization.ranges import ERROR_BUDGET
from onnxsim_embed.export.reference import has_torch
from onnxsim_embed.export.verify import verify_adopted, verify_derived, verify_fp32
from onnxsim_embed.export.weights import Tensors, has_weights
from onnxsim_embed.runtime.tokenization import Tokenizer

logger = logging.getLogger(__name__)

# Where int8 misses its threshold, the worst quarter of the linear layers stays float32, then half.
KEPT_SHARES = (0.0, 0.25, 0.5)


@dataclass(frozen=True)
class Plan:
    """What to export; for fields that are not explained here see `export_model`.

    :param via: "direct", "optimum" or "adopted".
    :param report_only: whether an unfaithful fp32 file is reported instead of raised.
    """

    via: str
    precisions: Sequence[str]
    recipe: Recipe | None = None
    calibration: Sequence[str] | None = None
    min_fidelity: tuple[float, float] | None = None
    matryoshka_dims: Sequence[int] = ()
    skip_unfaithful: bool = False
    report_only: bool = False


@dataclass(frozen=True)
class DirectEncoder:
    """BERT, built from its weights."""

    bert: Bert
    via: str = "direct"

    @property
    def hidden(self) -> int:
        """Dim of the hidden states."""
        return self.bert.hidden

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.bert.layers)

    def write_fp32(self, work: Path) -> PrecisionEntry:
        """Write the fp32 files."""
        return _write_precision("fp32", self.bert, "float32 throughout", work)

    def prepare_int8(
        self, work: Path, token_ids: Sequence[npt.NDArray[np.int64]]
    ) -> Callable[[float], PrecisionEntry]:
        """Run the calibration texts; return a function from an error budget to the int8 files."""
        activations = collect_activations(self.bert, token_ids)

        def write(budget: float) -> PrecisionEntry:
            quantized = quantize_static(self.bert, activations, budget)
            entry = _write_precision("int8", quantized.bert, METHOD, work)
            return replace(entry, layers=quantized.layers)

        return write


def _write_precision(precision: str, bert: Bert, method: str, work: Path) -> PrecisionEntry:
    """Write the portable file, and beside it the run-path graph that refers to its weights."""
    portable, run = build_encoder(bert, "portable"), build_encoder(bert, "run")
    for model in (portable, run):
        onnx.checker.check_model(model)
    file, encoder = MODEL_FILES[precision], ENCODER_FILES[precision]
    onnx.save(portable, work / file)
    share_constants(run, work / file)
    onnx.save(run, work / encoder)
    return PrecisionEntry(file, encoder, method, operator_counts(portable))


def build_artifact(checkpoint: Checkpoint, work: Path, plan: Plan) -> Manifest:
    """Write and verify an artifact.

    :param work: an empty directory.
    :raises VerificationError: with the numbers, if a precision is not faithful.
    """
    (work / "onnx").mkdir()
    tensors: Tensors = {}
    encoder: DirectEncoder | GraphEncoder
    if plan.via == "direct":
        tensors = checkpoint.tensors()
        encoder = DirectEncoder(load_bert(checkpoint.config, tensors))
    elif plan.via == "adopted":
        encoder = adopt(checkpoint, work / MODEL_FILES["fp32"])
    else:
        traced = trace(checkpoint, work / MODEL_FILES["fp32"])
        method = "float32, traced from PyTorch by optimum"
        encoder = GraphEncoder(traced.hidden, traced.layers, method, "optimum", traced.data)
    dim = write_configs(checkpoint, encoder.hidden, work)
    manifest = _describe(checkpoint, encoder, dim, plan.matryoshka_dims)
    manifest = replace(manifest, precisions={"fp32": encoder.write_fp32(work)})
    artifact = _publish(manifest, work)
    if plan.via == "adopted" and not (has_weights(checkpoint.transformer) and has_torch()):
        report = verify_adopted(artifact, plan.recipe)
    else:
        report = verify_fp32(artifact, checkpoint, tensors, plan.recipe)
    if report["problems"] and not plan.report_only:
        _fail(report)
    manifest = replace(manifest, verification={"fp32": report})
    _publish(manifest, work)
    if "fp16" in plan.precisions:
        manifest = _add_fp16(manifest, plan, work)
    if "int8" in plan.precisions:
        manifest = _add_int8(manifest, encoder, plan, work)
    return _publish(manifest, work).manifest


def _add_fp16(manifest: Manifest, plan: Plan, work: Path) -> Manifest:
    file = MODEL_FILES["fp16"]
    model, names = write_fp16(work / MODEL_FILES["fp32"], work / file)
    data = tuple(f"onnx/{name}" for name in names)
    entry = PrecisionEntry(file, None, FP16_METHOD, operator_counts(model), data=data)
    report = verify_derived("fp16", _publish(_with(manifest, "fp16", entry), work))
    return _accept(manifest, "fp16", entry, report, plan, work)


def _add_int8(
    manifest: Manifest, encoder: DirectEncoder | GraphEncoder, plan: Plan, work: Path
) -> Manifest:
    token_ids, calibration = _calibration_tokens(manifest, plan.calibration, work)
    write = encoder.prepare_int8(work, token_ids)
    budget = ERROR_BUDGET
    errors: list[float] = []
    for share in KEPT_SHARES:
        if share:
            budget = min(budget, float(np.quantile(errors, 1 - share, method="lower")))
        entry = replace(write(budget), calibration=calibration)
        errors = [choice["error"] for layer in entry.layers for choice in layer.values()]
        artifact = _publish(_with(manifest, "int8", entry), work)
        report = verify_derived("int8", artifact, plan.min_fidelity)
        if not report["problems"]:
            break
        logger.warning("%s", "; ".join(report["problems"]))
    return _accept(manifest, "int8", entry, report, plan, work)


def _with(manifest: Manifest, precision: str, entry: PrecisionEntry) -> Manifest:
    return replace(manifest, precisions={**manifest.precisions, precision: entry})


def _accept(
    manifest: Manifest,
    precision: str,
    entry: PrecisionEntry,
    report: dict[str, Any],
    plan: Plan,
    work: Path,
) -> Manifest:
    """Add a precision that is faithful; otherwise raise, or delete its files if the plan allows it."""
    manifest = replace(manifest, verification={**manifest.verification, precision: report})
    if not report["problems"]:
        return _with(manifest, precision, entry)
    if not plan.skip_unfaithful:
        _fail(report)
    for name in (entry.file, entry.encoder, *entry.data):
        if name is not None:
            (work / name).unlink()
    return manifest


def _fail(report: dict[str, Any]) -> NoReturn:
    raise VerificationError("; ".join(report["problems"]) + ". Nothing was written")


def _calibration_tokens(
    manifest: Manifest, texts: Sequence[str] | None, work: Path
) -> tuple[list[npt.NDArray[np.int64]], dict[str, Any]]:
    """Return token ids of the calibration texts, and their provenance for the manifest."""
    source = "onnxsim-embed" if texts is None else "user"
    texts = calibration_texts() if texts is None else list(texts)
    tokenizer = Tokenizer(work / "tokenizer.json", manifest.max_seq_length, manifest.do_lower_case)
    tokens = tokenizer(texts)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    provenance = {"source": source, "texts": len(texts), "tokens": len(tokens.ids)}
    return np.split(tokens.ids, tokens.offsets[1:-1]), provenance | {"sha256": digest}


def _describe(
    checkpoint: Checkpoint,
    encoder: DirectEncoder | GraphEncoder,
    dim: int,
    matryoshka_dims: Sequence[int],
) -> Manifest:
    if too_large := [n for n in matryoshka_dims if n > dim]:
        raise ValueError(f"matryoshka_dims: the model has {dim} dimensions, got {too_large[0]}")
    tools = ["onnx", "onnxruntime", "tokenizers", "numpy"]
    if encoder.via == "optimum":
        tools += ["torch", "transformers", "optimum-onnx"]
    return Manifest(
        name=checkpoint.name,
        source=checkpoint.source,
        revision=checkpoint.revision,
        architecture=checkpoint.architecture,
        hidden_size=encoder.hidden,
        layers=encoder.layers,
        dim=dim,
        max_seq_length=checkpoint.max_seq_length,
        do_lower_case=checkpoint.do_lower_case,
        pad_token_id=int(checkpoint.config.get("pad_token_id") or 0),
        pooling=tuple(mode.value for mode in checkpoint.pooling),
        dense=checkpoint.dense,
        normalize=checkpoint.normalize,
        prompts=checkpoint.prompts,
        default_prompt_name=checkpoint.default_prompt_name,
        similarity_fn_name=checkpoint.similarity_fn_name,
        precisions={},
        tools={name: version(name) for name in tools} | {"onnxsim-embed": __version__},
        via=encoder.via,
        matryoshka_dims=tuple(sorted(set(matryoshka_dims), reverse=True)),
    )


def _publish(manifest: Manifest, directory: Path) -> Artifact:
    """Write the model card, and the manifest with the digest of every file of the directory."""
    write_card(manifest, directory / CARD)
    manifest = replace(manifest, files=list_files(directory))
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact(directory, manifest)
