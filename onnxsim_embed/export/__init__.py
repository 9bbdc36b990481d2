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
    """Export a checkpoint to an artifact directory and verify it against its reference.

    The directory appears complete and verified, or not at all.

    :param model: recipe name, checkpoint directory or Hub id; or a directory of ONNX files.
    :param target: directory to write.
    :param precisions: "fp32", "int8", "fp16" (for GPUs); fp32 is always written.
    :param via: "direct" (built from the weights; model_type bert), "optimum" (traced; every
        architecture that optimum supports), "adopt" (the directory's own ONNX files, checked and
        copied), or "auto": adopt if there are ONNX files and no weights, else direct for bert and
        optimum for other architectures.
    :param pooling: pooling mode that overrides the checkpoint's; required if it states none.
    :param prompts: prompts by name, added to those of the checkpoint or replacing them.
    :param max_seq_length: maximum number of tokens of a text; None for the checkpoint's.
    :param matryoshka_dims: dims to which the model was trained to have its vectors truncated.
    :param revision: revision of a Hub id.
    :param token: access token for the Hub; None for the one that is logged in, False for none.
    :param local_files_only: take a Hub id from the local cache, without the network.
    :param recipe: known facts of the model; None to look them up.
    :param source: name of the source in the manifest, for a checkpoint that was downloaded before.
    :param calibration: at least 16 different texts that resemble those to be embedded, from which
        int8 quantization ranges are chosen; None for the bundled texts.
    :param min_fidelity: minimum mean and worst-case cosine of int8 against fp32; None for 0.995 and
        0.98.
    :param skip_unfaithful: omit int8 or fp16, with a warning, if it misses its threshold; otherwise
        the export fails.
    :param force: replace an existing artifact.
    :param bar: deprecated name of `min_fidelity`.
    :returns: the artifact.
    :raises CheckpointError: if the checkpoint cannot be read or its architecture not exported.
    :raises VerificationError: if the result is not faithful; nothing is written then.
    :raises FileExistsError: if the target exists and `force` is not set.
    :raises MissingExtraError: if the `export` or `optimum` extra is needed and not installed.
    :raises ValueError: for an unknown precision, `via` or pooling, invalid dims, or too few
        calibration texts.
    """
    _require_onnx()
    from onnxsim_embed.artifact.locate import locate_checkpoint
    from onnxsim_embed.export.build import Plan, build_artifact
    from onnxsim_embed.export.checkpoint import open_checkpoint
    from onnxsim_embed.export.quantization.calibration import check_calibration

    target = Path(target)
    check_target(target, force)
    if unknown := [name for name in precisions if name not in MODEL_FILES]:
        raise ValueError(f"unknown precision {unknown[0]!r}; known are {', '.join(MODEL_FILES)}")
    if via not in VIAS:
        raise ValueError(f"unknown via {via!r}; known are {', '.join(VIAS)}")
    if invalid := [dim for dim in matryoshka_dims if type(dim) is not int or dim < 1]:
        raise ValueError(f"matryoshka_dims must be positive integers, got {invalid[0]!r}")
    if calibration is not None:
        check_calibration(calibration)
    directory, known = locate_checkpoint(
        model, revision, token=token, local_files_only=local_files_only
    )
    recipe = recipe or known
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
        resolve_via(checkpoint, via),
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
    if bar is not None:
        warnings.warn("bar is deprecated; use min_fidelity", DeprecationWarning, stacklevel=3)
    return min_fidelity if bar is None else bar


def _require_onnx() -> None:
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("exporting a model", "export", "onnx")


def resolve_via(checkpoint: Checkpoint, via: str = "auto") -> str:
    """Return the method that exports a checkpoint: "direct", "optimum" or "adopted".

    :raises CheckpointError: if "direct" is requested and does not support the architecture.
    :raises MissingExtraError: if optimum is needed and not installed.
    """
    from onnxsim_embed.export.adopt import find_onnx
    from onnxsim_embed.export.onnx.trace import has_optimum
    from onnxsim_embed.export.weights import has_weights

    kind = checkpoint.config.get("model_type")
    if via == "auto":
        if find_onnx(checkpoint) and not has_weights(checkpoint.transformer):
            via = "adopt"
        else:
            via = "direct" if kind == "bert" or not isinstance(kind, str) else "optimum"
    if via == "adopt":
        return "adopted"
    if via == "direct" and kind != "bert":
        raise CheckpointError(
            f"architecture {kind!r} cannot be exported with via='direct', which is for 'bert' (MiniLM, "
            "BERT, BGE, E5, GTE v1); use via='optimum'"
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
    """Compare a finished artifact with its reference.

    :param against: checkpoint directory or model name with which fp32 is compared; "torch" for the
        model that the manifest names; None to compare only quantized files with the fp32 file.
    :param texts: at least two texts to compare on; None for the bundled ones.
    :param min_fidelity: minimum mean and worst-case cosine of int8; None for the default.
    :param bar: deprecated name of `min_fidelity`.
    :returns: for each precision a report; its "problems" is empty if the file is faithful.
    :raises ArtifactError: if a file of the artifact is damaged.
    :raises CheckpointError: if `against` cannot be found.
    :raises MissingExtraError: if "torch" is requested and not installed.
    """
    from onnxsim_embed.export.verify import verify_derived, verify_fp32

    min_fidelity = _renamed_bar(min_fidelity, bar)
    artifact.check()
    if texts is not None and len(texts) < 2:
        raise ValueError(f"verification needs at least 2 texts, got {len(texts)}")
    report: dict[str, Mapping[str, Any]] = {}
    if against is not None:
        from onnxsim_embed.artifact.locate import locate_checkpoint
        from onnxsim_embed.artifact.recipes import find_recipe
        from onnxsim_embed.export.checkpoint import open_checkpoint
        from onnxsim_embed.export.reference import has_torch

        if against == "torch" and not has_torch():
            raise MissingExtraError("verifying against PyTorch", "test", "torch")
        manifest = artifact.manifest
        directory, known = locate_checkpoint(manifest.source if against == "torch" else against)
        pooling = manifest.pooling[0] if len(manifest.pooling) == 1 else None
        checkpoint = open_checkpoint(directory, pooling=pooling, recipe=known)
        tensors = checkpoint.tensors() if checkpoint.architecture == "bert" else {}
        recipe = find_recipe(manifest.source)
        report["fp32"] = verify_fp32(artifact, checkpoint, tensors, recipe, texts)
    for precision in artifact.manifest.precisions:
        if precision != "fp32":
            report[precision] = verify_derived(precision, artifact, min_fidelity, texts)
    return report


def verify_recipe(
    recipe: Recipe, *, token: str | bool | None = None, local_files_only: bool = False
) -> Mapping[str, Any]:
    """Export a published model as fp32 to a temporary directory and check its known answers.

    :param token: access token for the Hub; None for the one that is logged in, False for none.
    :param local_files_only: take the weights from an installed package or the Hub's local cache only.
    :returns: the report of fp32; "problems" lists what is not faithful or differs from publications.
    :raises CheckpointError: if the weights are not available.
    :raises MissingExtraError: if the `export` extra is not installed.
    """
    _require_onnx()
    from onnxsim_embed.artifact.locate import locate_checkpoint
    from onnxsim_embed.export.build import Plan, build_artifact
    from onnxsim_embed.export.checkpoint import open_checkpoint

    directory, _ = locate_checkpoint(recipe.name, token=token, local_files_only=local_files_only)
    checkpoint = open_checkpoint(directory, recipe=recipe)
    with tempfile.TemporaryDirectory(prefix="onnxsim-embed-") as work:
        plan = Plan(resolve_via(checkpoint), (), recipe, report_only=True)
        manifest = build_artifact(checkpoint, Path(work), plan)
    return manifest.verification["fp32"]
