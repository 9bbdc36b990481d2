"""Checkpoint -> artifact. Needs the `export` extra; nothing at run time imports this package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact import MODEL_FILES, PRECISIONS, Artifact, atomic_directory, check_target
from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.recipes import Recipe


def export_model(
    model: str | Path,
    target: str | Path,
    *,
    precisions: Sequence[str] = PRECISIONS,
    pooling: str | None = None,
    revision: str | None = None,
    recipe: Recipe | None = None,
    source: str | None = None,
    calibration: Sequence[str] | None = None,
    bar: tuple[float, float] | None = None,
    force: bool = False,
) -> Artifact:
    """Export a checkpoint to an artifact directory, and prove it faithful before it is published.

    :param model: recipe name, checkpoint directory or Hub id.
    :param target: the directory to write. It appears whole or not at all.
    :param precisions: "fp32" and "int8"; fp32 is always written, as it is the reference.
    :param pooling: pooling mode, for a checkpoint that states none or states it wrongly.
    :param revision: revision of a Hub id.
    :param recipe: what is known of the model, when the caller has looked it up.
    :param source: what the manifest names as the source, when the caller has fetched the checkpoint.
    :param calibration: texts like those to be embedded, at least 16 different ones, on which int8
        ranges are chosen; None for the texts that ship with the package.
    :param bar: least mean and min cosine of int8 to fp32; None for 0.995 and 0.98.
    :param force: replace an artifact that is already there.
    :returns: the artifact.
    :raises CheckpointError: if the checkpoint cannot be read or its architecture not exported.
    :raises VerificationError: if the result is not faithful; nothing is written then.
    :raises FileExistsError: if the target exists and `force` is not set.
    :raises MissingExtraError: if the `export` extra is not installed.
    :raises ValueError: for an unknown precision or pooling, or too few calibration texts.
    """
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("exporting a model", "export", "onnx")
    from onnxsim_embed.cache import locate_checkpoint
    from onnxsim_embed.export.build import build_artifact
    from onnxsim_embed.export.calibrate import check_calibration
    from onnxsim_embed.export.checkpoint import open_checkpoint

    target = Path(target)
    check_target(target, force)
    if unknown := [name for name in precisions if name not in MODEL_FILES]:
        raise ValueError(f"unknown precision {unknown[0]!r}; known are {', '.join(MODEL_FILES)}")
    if calibration is not None:
        check_calibration(calibration)
    directory, found = locate_checkpoint(model, revision)
    recipe = recipe or found
    if source is None and recipe is None and not Path(model).is_dir():
        source = str(model)  # a Hub id; the directory is named after a commit
    checkpoint = open_checkpoint(
        directory, pooling=pooling, recipe=recipe, source=source, revision=revision
    )
    with atomic_directory(target) as work:
        build_artifact(checkpoint, work, "int8" in precisions, recipe, calibration, bar)
    return Artifact.open(target)


def verify_artifact(
    artifact: Artifact,
    *,
    against: str | Path | None = None,
    texts: Sequence[str] | None = None,
    bar: tuple[float, float] | None = None,
) -> Mapping[str, Mapping[str, Any]]:
    """Compare a finished artifact with what it was made from.

    :param against: checkpoint directory or model name that fp32 is compared with; "torch" for the
        model that the manifest names; None compares quantized files with the fp32 file only.
    :param texts: texts to compare on, at least two; None for those of the package.
    :param bar: least mean and min cosine of quantized files; None for the default.
    :returns: for each precision a report; "problems" lists what is not faithful.
    :raises ArtifactError: if a file of the artifact is damaged.
    :raises CheckpointError: if `against` cannot be found.
    :raises MissingExtraError: if "torch" is asked for and not installed.
    """
    from onnxsim_embed.export.verify import verify_fp32, verify_quantized

    artifact.check()
    if texts is not None and len(texts) < 2:
        raise ValueError(f"verifying needs at least 2 texts, got {len(texts)}")
    report: dict[str, Mapping[str, Any]] = {}
    if against is not None:
        from onnxsim_embed.cache import locate_checkpoint
        from onnxsim_embed.export.checkpoint import open_checkpoint
        from onnxsim_embed.export.reference import has_torch
        from onnxsim_embed.recipes import find_recipe

        if against == "torch" and not has_torch():
            raise MissingExtraError("verifying against PyTorch", "test", "torch")
        manifest = artifact.manifest
        directory, found = locate_checkpoint(manifest.source if against == "torch" else against)
        pooling = manifest.pooling[0] if len(manifest.pooling) == 1 else None
        checkpoint = open_checkpoint(directory, pooling=pooling, recipe=found)
        recipe = find_recipe(manifest.source)
        report["fp32"] = verify_fp32(checkpoint, checkpoint.tensors(), recipe, artifact, texts)
    for precision in artifact.manifest.precisions:
        if precision != "fp32":
            report[precision] = verify_quantized(precision, artifact, bar, texts)
    return report
