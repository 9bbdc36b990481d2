"""Checkpoint -> artifact. Needs the `export` extra; nothing at run time imports this package."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsim_embed.artifact.manifest import MODEL_FILES, PRECISIONS, Artifact, check_target
from onnxsim_embed.artifact.recipes import Recipe
from onnxsim_embed.errors import CheckpointError, MissingExtraError
from onnxsim_embed.files.atomic import atomic_directory

if TYPE_CHECKING:
    from onnxsim_embed.export.checkpoint import Checkpoint


VIAS = ("auto", "direct", "optimum", "adopt")


def export_model(
    model: str | Path,
    target: str | Path,
    *,
    precisions: Sequence[str] = PRECISIONS,
    via: str = "auto",
    pooling: str | None = None,
    prompts: Mapping[str, str] | None = None,
    max_seq_length: int | None = None,
    matryoshka_dims: Sequence[int] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    recipe: Recipe | None = None,
    source: str | None = None,
    calibration: Sequence[str] | None = None,
    min_fidelity: tuple[float, float] | None = None,
    skip_unfaithful: bool = False,
    force: bool = False,
    bar: tuple[float, float] | None = None,
) -> Artifact:
    """Export a checkpoint to an artifact directory, and prove it faithful before it is published.

    :param model: recipe name, checkpoint directory or Hub id; or a directory of ONNX files.
    :param target: the directory to write. It appears whole or not at all.
    :param precisions: "fp32", "int8", "fp16" (for GPUs); fp32 is always written, as it is the
        reference.
    :param via: "direct" (built from the weights; model_type bert), "optimum" (traced; every
        architecture that optimum knows), "adopt" (the directory's own ONNX files, checked and
        copied), or "auto": direct for bert, optimum for others, adopt where there are ONNX files and
        no weights.
    :param pooling: pooling mode, for a checkpoint that states none or states it wrongly.
    :param prompts: texts by name, beside those of the checkpoint or in their place.
    :param max_seq_length: tokens kept of a text, in place of what the checkpoint says.
    :param matryoshka_dims: widths to which the model was trained to have its vectors cut.
    :param revision: revision of a Hub id.
    :param token: access token for the Hub; None for the one that is logged in, False for none.
    :param local_files_only: take a Hub id from the local cache, without the network.
    :param recipe: what is known of the model, when the caller has looked it up.
    :param source: what the manifest names as the source, when the caller has fetched the checkpoint.
    :param calibration: texts like those to be embedded, at least 16 different ones, on which int8
        ranges are chosen; None for the texts that ship with the package.
    :param min_fidelity: minimum mean and worst-case cosine of int8 against fp32; None for 0.995 and
        0.98.
    :param skip_unfaithful: omit int8 or fp16, with a warning, if it misses the threshold; otherwise
        the export fails.
    :param force: replace an existing artifact.
    :param bar: deprecated name of `min_fidelity`.
    :returns: the artifact.
    :raises CheckpointError: if the checkpoint cannot be read or its architecture not exported.
    :raises VerificationError: if the result is not faithful; nothing is written then.
    :raises FileExistsError: if the target exists and `force` is not set.
    :raises MissingExtraError: if the `export` or `optimum` extra is needed and not installed.
    :raises ValueError: for an unknown precision, way or pooling, impossible widths, or too few
        calibration texts.
    """
    _demand_onnx()
    from onnxsim_embed.artifact.cache import locate_checkpoint
    from onnxsim_embed.export.build import Plan, build_artifact
    from onnxsim_embed.export.checkpoint import open_checkpoint
    from onnxsim_embed.export.quantization.calibration import check_calibration

    target = Path(target)
    check_target(target, force)
    if unknown := [name for name in precisions if name not in MODEL_FILES]:
        raise ValueError(f"unknown precision {unknown[0]!r}; known are {', '.join(MODEL_FILES)}")
    if via not in VIAS:
        raise ValueError(f"unknown way {via!r}; known are {', '.join(VIAS)}")
    if wrong := [width for width in matryoshka_dims if not _is_positive(width)]:
        raise ValueError(f"matryoshka_dims must be positive integers, got {wrong[0]!r}")
    if calibration is not None:
        check_calibration(calibration)
    directory, found = locate_checkpoint(
        model, revision, token=token, local_files_only=local_files_only
    )
    recipe = recipe or found
    if source is None and recipe is None and not Path(model).is_dir():
        source = str(model)  # a Hub id; the directory is named after a commit
    checkpoint = open_checkpoint(
        directory,
        pooling=pooling,
        recipe=recipe,
        source=source,
        revision=revision,
        prompts=prompts,
        max_seq_length=max_seq_length,
    )
    plan = Plan(
        choose_way(checkpoint, via),
        precisions,
        recipe,
        calibration,
        _renamed_bar(min_fidelity, bar),
        matryoshka_dims,
        skip_unfaithful,
    )
    with atomic_directory(target) as work:
        build_artifact(checkpoint, work, plan)
    return Artifact.open(target)


def _renamed_bar(
    min_fidelity: tuple[float, float] | None, bar: tuple[float, float] | None
) -> tuple[float, float] | None:
    if bar is None:
        return min_fidelity
    warnings.warn("bar is deprecated; use min_fidelity", DeprecationWarning, stacklevel=3)
    return bar


def _demand_onnx() -> None:
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("exporting a model", "export", "onnx")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def choose_way(checkpoint: Checkpoint, via: str = "auto") -> str:
    """Return how a checkpoint is exported: "direct", "optimum" or "adopted".

    :raises CheckpointError: if its architecture is not built directly and that was asked for.
    :raises MissingExtraError: if it takes optimum, which is not installed.
    """
    from onnxsim_embed.export.adopt import find_onnx
    from onnxsim_embed.export.onnx.trace import has_optimum
    from onnxsim_embed.export.weights import has_weights

    kind = checkpoint.config.get("model_type")
    if via == "auto":
        onnx = find_onnx(checkpoint.transformer) or find_onnx(checkpoint.directory)
        if onnx is not None and not has_weights(checkpoint.transformer):
            via = "adopt"
        else:
            via = "direct" if kind == "bert" or not isinstance(kind, str) else "optimum"
    if via == "adopt":
        return "adopted"
    if via == "direct" and kind != "bert":
        raise CheckpointError(
            f"architecture {kind!r} is not built directly, which is for 'bert' (MiniLM, BERT, BGE, E5, "
            "GTE v1); other architectures are traced with --via optimum"
        )
    if via == "optimum" and not has_optimum():
        raise MissingExtraError(f"exporting architecture {kind!r}", "optimum", "optimum-onnx")
    return via


def verify_artifact(
    artifact: Artifact,
    *,
    against: str | Path | None = None,
    texts: Sequence[str] | None = None,
    min_fidelity: tuple[float, float] | None = None,
    bar: tuple[float, float] | None = None,
) -> Mapping[str, Mapping[str, Any]]:
    """Compare a finished artifact with what it was made from.

    :param against: checkpoint directory or model name that fp32 is compared with; "torch" for the
        model that the manifest names; None compares quantized files with the fp32 file only.
    :param texts: texts to compare on, at least two; None for those of the package.
    :param min_fidelity: minimum mean and worst-case cosine of int8; None for the default.
    :param bar: deprecated name of `min_fidelity`.
    :returns: for each precision a report; "problems" lists what is not faithful.
    :raises ArtifactError: if a file of the artifact is damaged.
    :raises CheckpointError: if `against` cannot be found.
    :raises MissingExtraError: if "torch" is asked for and not installed.
    """
    from onnxsim_embed.export.verify import verify_fp16, verify_fp32, verify_quantized

    min_fidelity = _renamed_bar(min_fidelity, bar)
    artifact.check()
    if texts is not None and len(texts) < 2:
        raise ValueError(f"verifying needs at least 2 texts, got {len(texts)}")
    report: dict[str, Mapping[str, Any]] = {}
    if against is not None:
        from onnxsim_embed.artifact.cache import locate_checkpoint
        from onnxsim_embed.artifact.recipes import find_recipe
        from onnxsim_embed.export.checkpoint import open_checkpoint
        from onnxsim_embed.export.reference import has_torch

        if against == "torch" and not has_torch():
            raise MissingExtraError("verifying against PyTorch", "test", "torch")
        manifest = artifact.manifest
        directory, found = locate_checkpoint(manifest.source if against == "torch" else against)
        pooling = manifest.pooling[0] if len(manifest.pooling) == 1 else None
        checkpoint = open_checkpoint(directory, pooling=pooling, recipe=found)
        recipe = find_recipe(manifest.source)
        tensors = checkpoint.tensors() if checkpoint.architecture == "bert" else {}
        report["fp32"] = verify_fp32(checkpoint, tensors, recipe, artifact, texts)
    for precision in artifact.manifest.precisions:
        if precision == "fp16":
            report[precision] = verify_fp16(artifact, texts)
        elif precision != "fp32":
            report[precision] = verify_quantized(precision, artifact, min_fidelity, texts)
    return report


def verify_recipe(
    recipe: Recipe, *, token: str | bool | None = None, local_files_only: bool = False
) -> Mapping[str, Any]:
    """Export a published model (fp32, into a directory that does not stay) and run its known answers.

    :param token: access token for the Hub; None for the one that is logged in, False for none.
    :param local_files_only: take the weights from an installed package or the Hub's local cache only.
    :returns: the report of fp32; "problems" lists what is not faithful or not as published.
    :raises CheckpointError: if the weights cannot be had.
    :raises MissingExtraError: if the `export` extra is not installed.
    """
    _demand_onnx()
    from onnxsim_embed.artifact.cache import locate_checkpoint
    from onnxsim_embed.export.build import Plan, build_artifact
    from onnxsim_embed.export.checkpoint import open_checkpoint

    directory, _ = locate_checkpoint(recipe.name, token=token, local_files_only=local_files_only)
    checkpoint = open_checkpoint(directory, recipe=recipe)
    with tempfile.TemporaryDirectory(prefix="onnxsim-embed-") as work:
        plan = Plan(choose_way(checkpoint), (), recipe, report_only=True)
        manifest = build_artifact(checkpoint, Path(work), plan)
    return manifest.verification["fp32"]
