"""The export job: checkpoint -> graphs -> verified artifact."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxsim_embed import __version__
from onnxsim_embed.artifact import (
    CARD,
    ENCODER_FILES,
    MANIFEST,
    MODEL_FILES,
    Artifact,
    Manifest,
    PrecisionEntry,
    list_files,
)
from onnxsim_embed.errors import VerificationError
from onnxsim_embed.export.bert import Bert, load_bert
from onnxsim_embed.export.builder import operator_counts, share_constants
from onnxsim_embed.export.calibrate import Activations, calibration_texts, collect_activations
from onnxsim_embed.export.card import write_card
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.configs import write_configs
from onnxsim_embed.export.graph import build_encoder
from onnxsim_embed.export.quantize import ERROR_BUDGET, METHOD, quantize_static
from onnxsim_embed.export.verify import verify_fp32, verify_quantized
from onnxsim_embed.recipes import Recipe
from onnxsim_embed.tokenization import Tokenizer

logger = logging.getLogger(__name__)

# Where int8 misses the bar, the worst quarter of the linears stays float32, then the worst half.
KEPT_SHARES = (0.0, 0.25, 0.5)


def build_artifact(
    checkpoint: Checkpoint,
    work: Path,
    int8: bool,
    recipe: Recipe | None,
    calibration: Sequence[str] | None,
    bar: tuple[float, float] | None,
) -> None:
    """Write and verify an artifact.

    :param work: an empty directory.
    :param int8: whether to quantize.
    :param calibration: texts for the ranges of int8, or None for those of the package.
    :param bar: least mean and min cosine of int8 to fp32, or None for the default.
    :raises VerificationError: with the numbers, if a precision is not faithful.
    """
    tensors = checkpoint.tensors()
    bert = load_bert(checkpoint.config, tensors)
    (work / "onnx").mkdir()
    manifest = _describe(checkpoint, bert, write_configs(checkpoint, bert.hidden, work))
    entry = _write_precision("fp32", bert, "float32 throughout", work)
    manifest = _publish(replace(manifest, precisions={"fp32": entry}), work)
    report = verify_fp32(checkpoint, tensors, recipe, Artifact(work, manifest))
    _demand(report)
    manifest = _publish(replace(manifest, verification={"fp32": report}), work)
    if int8:
        manifest = _add_int8(manifest, bert, calibration, bar, work)
    _publish(manifest, work)


def _add_int8(
    manifest: Manifest,
    bert: Bert,
    calibration: Sequence[str] | None,
    bar: tuple[float, float] | None,
    work: Path,
) -> Manifest:
    token_ids, about = _calibration_tokens(manifest, calibration, work)
    seen = collect_activations(bert, token_ids)
    budget = ERROR_BUDGET
    errors: list[float] = []
    for share in KEPT_SHARES:
        if share:
            budget = min(budget, float(np.quantile(errors, 1 - share, method="lower")))
        entry = _write_int8(bert, seen, budget, about, work)
        errors = [chosen["error"] for layer in entry.layers for chosen in layer.values()]
        made = replace(manifest, precisions={**manifest.precisions, "int8": entry})
        made = _publish(made, work)
        report = verify_quantized("int8", Artifact(work, made), bar)
        if not report["problems"]:
            return replace(made, verification={**manifest.verification, "int8": report})
        logger.warning("%s", "; ".join(report["problems"]))
    _demand(report)
    raise AssertionError("unreachable")


def _demand(report: dict[str, Any]) -> None:
    if report["problems"]:
        raise VerificationError("; ".join(report["problems"]) + ". Nothing was written")


def _write_int8(
    bert: Bert, seen: dict[str, Activations], budget: float, about: dict[str, Any], work: Path
) -> PrecisionEntry:
    made = quantize_static(bert, seen, budget)
    entry = _write_precision("int8", made.bert, METHOD, work)
    return replace(entry, layers=made.layers, calibration=about)


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


def _describe(checkpoint: Checkpoint, bert: Bert, dim: int) -> Manifest:
    tools = {name: version(name) for name in ("onnx", "onnxruntime", "tokenizers", "numpy")}
    return Manifest(
        name=checkpoint.name,
        source=checkpoint.source,
        revision=checkpoint.revision,
        architecture=checkpoint.architecture,
        hidden_size=bert.hidden,
        layers=len(bert.layers),
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
    )


def _publish(manifest: Manifest, directory: Path) -> Manifest:
    """Write the model card, and the manifest with the digest of every file of the directory."""
    write_card(manifest, directory / CARD)
    manifest = replace(manifest, files=list_files(directory))
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
