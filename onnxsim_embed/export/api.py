"""The public functions that export models."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.artifact.manifest import MODEL_FILES, PRECISIONS, Artifact, check_target
from onnxsim_embed.artifact.recipes import Recipe
from onnxsim_embed.errors import CheckpointError, MissingExtraError
from onnxsim_embed.export.architectures import ARCHITECTURES
from onnxsim_embed.export.build import INT8_EFFORT, Builder, fail
from onnxsim_embed.export.checkpoint import Checkpoint, open_checkpoint
from onnxsim_embed.export.graph_encoder import find_onnx
from onnxsim_embed.export.onnx.trace import REQUIREMENTS, missing_package
from onnxsim_embed.export.quantization.calibration import check_calibration
from onnxsim_embed.export.verify import renamed_bar
from onnxsim_embed.export.weights import has_weights
from onnxsim_embed.files.atomic import atomic_directory
from onnxsim_embed.files.uris import local_path

VIAS = ("auto", "direct", *REQUIREMENTS, "adopt")


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
    onnx_output: str | None = None,
    pooled: bool = False,
    bar: tuple[float, float] | None = None,
    int8_effort: float = INT8_EFFORT,
) -> Artifact:
    """Export a checkpoint to an artifact directory and verify it against its reference.

    The directory appears complete and verified, or not at all.

    :param model: recipe name, checkpoint directory or Hub id; or a directory of ONNX files.
    :param target: directory to write.
    :param precisions: "fp32", "int8", "fp16" (for GPUs); fp32 is always written.
    :param via: "direct" (built from the weights; see `export/architectures.py`), "torch" (traced by
        torch.onnx; every encoder of transformers that torch.export can trace), "optimum" (traced by
        optimum; every encoder that it supports), "adopt" (the directory's own ONNX files, checked
        and copied), or "auto": adopt if there are ONNX files and no weights, else direct for its
        architectures, else torch or optimum, whichever is installed.
    :param pooling: pooling mode that overrides the checkpoint's; required if it states none.
    :param prompts: prompts by name, added to those of the checkpoint or replacing them.
    :param max_seq_length: maximum number of tokens of a text; None for the checkpoint's.
    :param matryoshka_dims: dims to which the model was trained to have its vectors truncated.
    :param revision: as are `token` and `local_files_only`, for a Hub id; see `Embedder.from_pretrained`.
    :param recipe: known facts of the model; None to look them up.
    :param source: name of the source in the manifest, for a checkpoint that was downloaded before.
    :param calibration: at least 16 different texts that resemble those to be embedded, from which
        int8 quantization ranges are chosen; None for the bundled texts.
    :param min_fidelity: minimum mean and worst-case cosine of int8 against fp32; None for 0.999 and
        0.99. Where int8 misses it, more is computed in float32, and a warning says how much.
    :param skip_unfaithful: omit int8 or fp16, with a warning, if it misses its threshold; otherwise
        the export fails.
    :param force: replace an existing artifact.
    :param onnx_output: name of the hidden states among the outputs of adopted ONNX files; None to detect it.
    :param pooled: also write, for each precision, a file such as onnx/model_pooled.onnx whose first
        output is `sentence_embedding`, float32 (batch, dim), for readers without pooling.
    :param bar: deprecated name of `min_fidelity`.
    :param int8_effort: time that float32 parts of int8 may add, as a share of the time without them.
    :returns: the artifact.
    :raises CheckpointError: if the checkpoint cannot be read or its architecture not exported.
    :raises VerificationError: if the result is not faithful; nothing is written then.
    :raises FileExistsError: if the target exists and `force` is not set.
    :raises MissingExtraError: if the `export`, `torch` or `optimum` extra is needed and not installed.
    :raises ValueError: for an unknown precision, `via` or pooling, invalid dims, or too few
        calibration texts.
    """
    target = local_path(target)
    min_fidelity = renamed_bar(min_fidelity, bar)
    check_target(target, force)
    if unknown := [name for name in precisions if name not in MODEL_FILES]:
        raise ValueError(f"unknown precision {unknown[0]!r}; known are {', '.join(MODEL_FILES)}")
    if via not in VIAS:
        raise ValueError(f"unknown via {via!r}; known are {', '.join(VIAS)}")
    _check_numbers(matryoshka_dims, int8_effort)
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
    via = resolve_via(checkpoint, via)
    if onnx_output is not None and via != "adopted":
        raise ValueError(
            "onnx_output names an output of adopted ONNX files; pass via='adopt' with it"
        )
    with atomic_directory(target) as work:
        builder = Builder(checkpoint, work, via, matryoshka_dims, onnx_output, pooled)
        report = builder.add_fp32(recipe)
        if report["problems"]:
            fail(report)
        if "fp16" in precisions:
            builder.add_fp16(skip_unfaithful)
        if "int8" in precisions:
            builder.add_int8(calibration, min_fidelity, skip_unfaithful, int8_effort)
    return Artifact.open(target)


def _check_numbers(matryoshka_dims: Sequence[int], int8_effort: float) -> None:
    if invalid := [dim for dim in matryoshka_dims if type(dim) is not int or dim < 1]:
        raise ValueError(f"matryoshka_dims must be positive integers, got {invalid[0]!r}")
    if not 0 <= int8_effort <= 1:
        raise ValueError(f"int8_effort must be between 0 and 1, got {int8_effort}")


def verify_recipe(
    recipe: Recipe, *, token: str | bool | None = None, local_files_only: bool = False
) -> Mapping[str, Any]:
    """Export a published model as fp32 to a temporary directory and check its known answers.

    For arguments and errors see `export_model`.

    :returns: the report of fp32; "problems" lists what is not faithful or differs from publications.
    """
    directory, _ = locate_checkpoint(recipe.name, token=token, local_files_only=local_files_only)
    checkpoint = open_checkpoint(directory, recipe=recipe)
    with tempfile.TemporaryDirectory(prefix="onnxsim-embed-") as work:
        return Builder(checkpoint, Path(work), resolve_via(checkpoint)).add_fp32(recipe)


def resolve_via(checkpoint: Checkpoint, via: str = "auto") -> str:
    """Return the method that exports a checkpoint: "direct", "torch", "optimum" or "adopted"."""
    kind = checkpoint.config.get("model_type")
    if via == "auto":
        if find_onnx(checkpoint) and not has_weights(checkpoint.transformer):
            via = "adopt"
        elif kind in ARCHITECTURES or not isinstance(kind, str):
            via = "direct"
        else:
            via = next((way for way in REQUIREMENTS if missing_package(way) is None), "torch")
    if via == "adopt":
        return "adopted"
    if via == "direct" and kind not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture {kind!r} cannot be exported with via='direct', which is for "
            f"{', '.join(ARCHITECTURES)}; use via='torch'"
        )
    if via in REQUIREMENTS and (package := missing_package(via)):
        raise MissingExtraError(f"exporting architecture {kind!r} with via={via!r}", via, package)
    return via
