"""The export job: checkpoint -> graphs -> verified artifact."""

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
from onnxsim_embed.export.onnx.fp16 import METHOD as HALF_METHOD
from onnxsim_embed.export.onnx.fp16 import write_fp16
from onnxsim_embed.export.onnx.trace import trace
from onnxsim_embed.export.quantization.bert import ERROR_BUDGET, METHOD, quantize_static
from onnxsim_embed.export.quantization.calibration import calibration_texts, collect_activations
from onnxsim_embed.export.reference import has_torch
from onnxsim_embed.export.verify import (
    verify_adopted,
    verify_fp16,
    verify_fp32,
    verify_quantized,
)
from onnxsim_embed.export.weights import Tensors, has_weights
from onnxsim_embed.runtime.tokenization import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What an export is asked for.

    :param via: "direct", "optimum" or "adopted".
    :param precisions: beside fp32.
    :param recipe: whose known answers to check, or None.
    :param calibration: texts for the ranges of int8, or None for those of the package.
    :param min_fidelity: minimum mean and worst-case cosine of int8 to fp32, or None for the default.
    :param matryoshka_dims: widths to which vectors may be cut.
    :param report_only: whether an unfaithful fp32 file is reported rather than an error.
    :param skip_unfaithful: whether a precision that is not faithful is left out, rather than an error.
    """

    via: str
    precisions: Sequence[str]
    recipe: Recipe | None = None
    calibration: Sequence[str] | None = None
    min_fidelity: tuple[float, float] | None = None
    matryoshka_dims: Sequence[int] = ()
    skip_unfaithful: bool = False
    report_only: bool = False


# Where int8 misses the bar, the worst quarter of the linears stays float32, then the worst half.
KEPT_SHARES = (0.0, 0.25, 0.5)


@dataclass(frozen=True)
class DirectEncoder:
    """BERT, built from its weights."""

    bert: Bert
    via: str = "direct"

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
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
        """Run the calibration texts; return what quantizes below a budget and writes the files."""
        seen = collect_activations(self.bert, token_ids)

        def write(budget: float) -> PrecisionEntry:
            made = quantize_static(self.bert, seen, budget)
            return replace(_write_precision("int8", made.bert, METHOD, work), layers=made.layers)

        return write


Encoder = DirectEncoder | GraphEncoder


def build_artifact(checkpoint: Checkpoint, work: Path, plan: Plan) -> Manifest:
    """Write and verify an artifact.

    :param work: an empty directory.
    :returns: what was written.
    :raises VerificationError: with the numbers, if a precision is not faithful.
    """
    (work / "onnx").mkdir()
    tensors = checkpoint.tensors() if plan.via == "direct" else {}
    encoder = _make_encoder(checkpoint, tensors, work, plan.via)
    dim = write_configs(checkpoint, encoder.hidden, work)
    manifest = _describe(checkpoint, encoder, dim, plan.matryoshka_dims)
    entry = encoder.write_fp32(work)
    manifest = _publish(replace(manifest, precisions={"fp32": entry}), work)
    artifact = Artifact(work, manifest)
    if plan.via == "adopted" and not (has_weights(checkpoint.transformer) and has_torch()):
        report = verify_adopted(artifact, plan.recipe)
    else:
        report = verify_fp32(checkpoint, tensors, plan.recipe, artifact)
    if report["problems"] and not plan.report_only:
        _refuse(report)
    manifest = _publish(replace(manifest, verification={"fp32": report}), work)
    for precision, add in (("fp16", _add_fp16), ("int8", _add_int8)):
        if precision in plan.precisions:
            manifest = add(manifest, encoder, plan, work)
    return _publish(manifest, work)


def _make_encoder(checkpoint: Checkpoint, tensors: Tensors, work: Path, via: str) -> Encoder:
    target = work / MODEL_FILES["fp32"]
    if via == "direct":
        return DirectEncoder(load_bert(checkpoint.config, tensors))
    if via == "adopted":
        return adopt(checkpoint, target)
    traced = trace(checkpoint, target)
    method = "float32, traced from PyTorch by optimum"
    return GraphEncoder(traced.hidden, traced.layers, method, "optimum", traced.data)


def _add_fp16(manifest: Manifest, encoder: Encoder, plan: Plan, work: Path) -> Manifest:
    source, file = MODEL_FILES["fp32"], MODEL_FILES["fp16"]
    model, data = write_fp16(work / source, work / file)
    beside = tuple(f"onnx/{name}" for name in data)
    entry = PrecisionEntry(file, None, HALF_METHOD, operator_counts(model), data=beside)
    made = replace(manifest, precisions={**manifest.precisions, "fp16": entry})
    made = _publish(made, work)
    report = verify_fp16(Artifact(work, made))
    return _settle(manifest, made, "fp16", report, plan, work)


def _add_int8(manifest: Manifest, encoder: Encoder, plan: Plan, work: Path) -> Manifest:
    token_ids, about = _calibration_tokens(manifest, plan.calibration, work)
    write = encoder.prepare_int8(work, token_ids)
    budget = ERROR_BUDGET
    errors: list[float] = []
    for share in KEPT_SHARES:
        if share:
            budget = min(budget, float(np.quantile(errors, 1 - share, method="lower")))
        entry = replace(write(budget), calibration=about)
        errors = [chosen["error"] for layer in entry.layers for chosen in layer.values()]
        made = replace(manifest, precisions={**manifest.precisions, "int8": entry})
        made = _publish(made, work)
        report = verify_quantized("int8", Artifact(work, made), plan.min_fidelity)
        if not report["problems"]:
            break
        logger.warning("%s", "; ".join(report["problems"]))
    return _settle(manifest, made, "int8", report, plan, work)


def _settle(
    before: Manifest,
    made: Manifest,
    precision: str,
    report: dict[str, Any],
    plan: Plan,
    work: Path,
) -> Manifest:
    """Keep a precision that is faithful; refuse another, or leave it out where the plan says so."""
    verification = {**before.verification, precision: report}
    if not report["problems"]:
        return replace(made, verification=verification)
    if not plan.skip_unfaithful:
        _refuse(report)
    entry = made.precisions[precision]
    for name in (entry.file, entry.encoder, *entry.data):
        if name is not None:
            (work / name).unlink()
    return replace(before, verification=verification)


def _refuse(report: dict[str, Any]) -> NoReturn:
    raise VerificationError("; ".join(report["problems"]) + ". Nothing was written")


def _write_precision(precision: str, bert: Bert, method: str, work: Path) -> PrecisionEntry:
    """Write the portable file, and beside it the run-path graph that points into its weights."""
    portable, run = build_encoder(bert, "portable"), build_encoder(bert, "run")
    for model in (portable, run):
        onnx.checker.check_model(model)
    file, encoder = MODEL_FILES[precision], ENCODER_FILES[precision]
    onnx.save(portable, work / file)
    share_constants(run, work / file)
    onnx.save(run, work / encoder)
    return PrecisionEntry(file, encoder, method, operator_counts(portable))


def _calibration_tokens(
    manifest: Manifest, texts: Sequence[str] | None, work: Path
) -> tuple[list[npt.NDArray[np.int64]], dict[str, Any]]:
    chosen = calibration_texts() if texts is None else list(texts)
    tokenizer = Tokenizer(work / "tokenizer.json", manifest.max_seq_length, manifest.do_lower_case)
    tokens = tokenizer(chosen)
    about = {
        "source": "onnxsim-embed" if texts is None else "user",
        "texts": len(chosen),
        "tokens": len(tokens.ids),
        "sha256": hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
    }
    return np.split(tokens.ids, tokens.offsets[1:-1]), about


def _describe(
    checkpoint: Checkpoint, encoder: Encoder, dim: int, matryoshka_dims: Sequence[int]
) -> Manifest:
    if too_wide := [width for width in matryoshka_dims if width > dim]:
        raise ValueError(f"matryoshka_dims: the model has {dim} dimensions, got {too_wide[0]}")
    names = ["onnx", "onnxruntime", "tokenizers", "numpy"]
    if encoder.via == "optimum":
        names += ["torch", "transformers", "optimum-onnx"]
    tools = {name: version(name) for name in names}
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
        tools=tools | {"onnxsim-embed": __version__},
        via=encoder.via,
        matryoshka_dims=tuple(sorted(set(matryoshka_dims), reverse=True)),
    )


def _publish(manifest: Manifest, directory: Path) -> Manifest:
    """Write the model card, and the manifest with the digest of every file of the directory."""
    write_card(manifest, directory / CARD)
    manifest = replace(manifest, files=list_files(directory))
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
