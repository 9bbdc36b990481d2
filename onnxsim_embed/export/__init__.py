"""Checkpoint -> artifact. Needs the `export` extra; nothing at run time imports this package."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsim_embed import __version__
from onnxsim_embed.artifact import (
    CARD,
    MANIFEST,
    MODEL_FILES,
    PRECISIONS,
    Artifact,
    Manifest,
    PrecisionEntry,
    atomic_directory,
    check_target,
    list_files,
)
from onnxsim_embed.errors import MissingExtraError, VerificationError
from onnxsim_embed.recipes import Recipe

if TYPE_CHECKING:
    from onnxsim_embed.export.bert import Bert
    from onnxsim_embed.export.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def export_model(
    model: str | Path,
    target: str | Path,
    *,
    precisions: Sequence[str] = PRECISIONS,
    pooling: str | None = None,
    revision: str | None = None,
    recipe: Recipe | None = None,
    force: bool = False,
) -> Artifact:
    """Export a checkpoint to an artifact directory, and prove it faithful before it is published.

    :param model: recipe name, checkpoint directory or Hub id.
    :param target: the directory to write. It appears whole or not at all.
    :param precisions: "fp32" and "int8"; fp32 is always written, as it is the reference.
    :param pooling: pooling mode, for a checkpoint that states none or states it wrongly.
    :param revision: revision of a Hub id.
    :param recipe: what is known of the model, when the caller has looked it up.
    :param force: replace an artifact that is already there.
    :returns: the artifact.
    :raises CheckpointError: if the checkpoint cannot be read or its architecture not exported.
    :raises VerificationError: if the result is not faithful; nothing is written then.
    :raises FileExistsError: if the target exists and `force` is not set.
    :raises MissingExtraError: if the `export` extra is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("exporting a model", "export", "onnx")
    from onnxsim_embed.cache import locate_checkpoint
    from onnxsim_embed.export.bert import load_bert
    from onnxsim_embed.export.checkpoint import open_checkpoint

    target = Path(target)
    check_target(target, force)
    if unknown := [name for name in precisions if name not in MODEL_FILES]:
        raise ValueError(f"unknown precision {unknown[0]!r}; known are {', '.join(MODEL_FILES)}")
    directory, found = locate_checkpoint(model, revision)
    checkpoint = open_checkpoint(
        directory, pooling=pooling, recipe=recipe or found, revision=revision
    )
    tensors = checkpoint.tensors()
    bert = load_bert(checkpoint.config, tensors)
    wanted = ["fp32", *[name for name in dict.fromkeys(precisions) if name != "fp32"]]
    with atomic_directory(target) as work:
        _write(checkpoint, bert, wanted, work)
        _verify(checkpoint, tensors, recipe or found, work)
    return Artifact.open(target)


def _write(checkpoint: Checkpoint, bert: Bert, precisions: Sequence[str], work: Path) -> None:
    import onnx

    from onnxsim_embed.export import quantize
    from onnxsim_embed.export.card import write_card
    from onnxsim_embed.export.configs import write_configs
    from onnxsim_embed.export.graph import build_encoder, operator_counts

    dim = write_configs(checkpoint, bert.hidden, work)
    (work / "onnx").mkdir()
    entries = {}
    for precision in precisions:
        made = bert if precision == "fp32" else quantize.quantize_dynamic(bert)
        method = "float32 throughout" if precision == "fp32" else quantize.METHOD
        graph = build_encoder(made)
        onnx.checker.check_model(graph)
        onnx.save(graph, work / MODEL_FILES[precision])
        entries[precision] = PrecisionEntry(MODEL_FILES[precision], method, operator_counts(graph))
    manifest = Manifest(
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
        precisions=entries,
        tools={name: version(name) for name in ("onnx", "onnxruntime", "tokenizers", "numpy")}
        | {"onnxsim-embed": __version__},
    )
    write_card(manifest, work / CARD)
    publish_manifest(manifest, work)


def publish_manifest(manifest: Manifest, directory: Path) -> None:
    """Write the manifest with the digest of every file that stands in the directory."""
    from dataclasses import replace

    manifest = replace(manifest, files=list_files(directory))
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _verify(checkpoint: Checkpoint, tensors: dict, recipe: Recipe | None, work: Path) -> None:  # type: ignore[type-arg]
    from dataclasses import replace

    from onnxsim_embed.export.card import write_card
    from onnxsim_embed.export.verify import verify_export

    report = verify_export(checkpoint, tensors, recipe, Artifact.open(work))
    problems = [problem for part in report.values() for problem in part["problems"]]
    if problems:
        raise VerificationError("; ".join(problems) + ". Nothing was written")
    manifest = replace(Artifact.open(work).manifest, verification=report)
    write_card(manifest, work / CARD)
    publish_manifest(manifest, work)
