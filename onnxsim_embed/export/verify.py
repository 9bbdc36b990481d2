"""Verification of an artifact against its checkpoint, against itself and against published results."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.artifact.recipes import Recipe, find_recipe
from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.export import fidelity
from onnxsim_embed.export import reference as references
from onnxsim_embed.export.architectures import ARCHITECTURES
from onnxsim_embed.export.checkpoint import Checkpoint, open_checkpoint
from onnxsim_embed.export.weights import has_weights
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.hardware import bf16_supported
from onnxsim_embed.system.memory import release_memory

Report = dict[str, Any]

logger = logging.getLogger(__name__)

# The portable file computes what the run-path file does but for rounding (a mask, other matrix
# shapes), and int8 steps can fall either way on that.
PORTABLE_THRESHOLDS = {
    "fp32": fidelity.FIDELITY_THRESHOLDS["fp32"][1],
    "int8": 0.999,
    "fp16": 0.999,
}
PORTABLE_STEP = 10

# Every sixth verification text goes through the reference of fp32, which runs one text at a time.
REFERENCE_STEP = 6


def verification_texts() -> list[str]:
    """Return the texts that exports are verified on, none of which is used in calibration."""
    return fidelity.bundled_texts("verification.jsonl")


def renamed_bar(
    min_fidelity: tuple[float, float] | None, bar: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Return `min_fidelity`, or the deprecated `bar` with a warning."""
    if bar is not None:
        warnings.warn("bar is deprecated; use min_fidelity", DeprecationWarning, stacklevel=3)
    return min_fidelity if bar is None else bar


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
    :param min_fidelity: minimum mean and worst-case cosine of int8 and bf16; None for the default.
    :param bar: deprecated name of `min_fidelity`.
    :returns: for each precision, and for bf16 where it runs, a report; its "problems" is empty if the file is faithful.
    :raises ArtifactError: if a file of the artifact is damaged.
    :raises CheckpointError: if `against` cannot be found.
    :raises MissingExtraError: if "torch" is requested and not installed.
    """
    min_fidelity = renamed_bar(min_fidelity, bar)
    artifact.check()
    if texts is not None and len(texts) < 2:
        raise ValueError(f"verification needs at least 2 texts, got {len(texts)}")
    report: dict[str, Mapping[str, Any]] = {}
    if against is not None:
        if against == "torch" and not references.has_torch():
            raise MissingExtraError("verifying against PyTorch", "torch", "torch")
        manifest = artifact.manifest
        directory, known = locate_checkpoint(manifest.source if against == "torch" else against)
        pooling = manifest.pooling[0] if len(manifest.pooling) == 1 else None
        checkpoint = open_checkpoint(
            directory, pooling=pooling, recipe=known, max_seq_length=manifest.max_seq_length
        )
        direct = checkpoint.architecture in ARCHITECTURES
        if not direct and not references.has_torch():
            raise MissingExtraError("verifying against PyTorch", "torch", "torch")
        recipe = find_recipe(manifest.source)
        report["fp32"] = verify_fp32(artifact, checkpoint, direct, recipe, texts)
    for precision in artifact.manifest.precisions:
        if precision != "fp32":
            report[precision] = verify_derived(precision, artifact, min_fidelity, texts)
    if bf16_runs():
        report["bf16"] = verify_derived("bf16", artifact, min_fidelity, texts)
    return report


def bf16_runs() -> bool:
    """Return whether this machine can run bf16: it is no file of an artifact, but a way to compute fp32."""
    return bf16_supported()[0] and find_spec("openvino") is not None


def verify_fp32(
    artifact: Artifact,
    checkpoint: Checkpoint,
    direct: bool = False,
    recipe: Recipe | None = None,
    texts: Sequence[str] | None = None,
) -> Report:
    """Compare token ids and fp32 vectors with those of the checkpoint, and with published results.

    The references are loaded from the checkpoint alone: transformers' tokenizer, and
    sentence-transformers' vectors, else PyTorch's or numpy's hidden states with this package's pooling. Without
    weights, as of an adopted ONNX file, the file is compared with itself in padded batches.

    :param direct: whether the file was built from the weights, which numpy can compute too.
    """
    logger.info("verifying fp32")
    model = Embedder(artifact, precision="fp32", device="cpu")
    weights = direct or (references.has_torch() and has_weights(checkpoint.transformer))
    if texts is None:
        texts = verification_texts()[:: REFERENCE_STEP if weights else 1]
    everything = [*texts, *references.probe_texts(model)]
    own = model.token_ids(everything)
    token_ids, ids, problems = references.compare_token_ids(checkpoint, everything, own)
    name, expected = "itself, padded", None
    if weights:
        lengths = references.length_probes(own[: len(texts)], model.max_seq_length)
        name, reference, expected = references.checkpoint_vectors(
            checkpoint, model.head, everything, ids, lengths, token_ids
        )
        release_memory()  # the reference holds the weights as often as this export does
    else:
        session = Session(artifact.open_file("fp32"), "cpu")
        reference = references.padded_vectors(session, model, ids)
        del session
    vectors = model.encode(everything, prompt="")
    n = len(texts)
    report = _judge("fp32", reference[:n], vectors[:n], name)
    report["token_ids"] = token_ids
    report["problems"] = problems + report["problems"]
    _require_equal(report, "fp32", reference[n:], vectors[n:], "of unusual texts", "probe")
    _count_variant(report, model, texts, vectors[:n])
    _check_files(report, "fp32", model, texts, vectors[:n], expected)
    if recipe is not None:
        report["known_answers"] = len(recipe.known_answers)
        for answer in recipe.known_answers:
            report["problems"] += fidelity.check_known_answer(model, answer)
    return report


def verify_derived(
    precision: str,
    artifact: Artifact,
    min_fidelity: tuple[float, float] | None = None,
    texts: Sequence[str] | None = None,
    reference: Float32 | None = None,
) -> Report:
    """Compare int8, bf16 or fp16 with the fp32 file of the same artifact.

    fp16 runs in padded batches, as on a GPU; its "batch_variant" is None, as those differ by rounding.

    :param reference: vectors of fp32, if they are known.
    """
    logger.info("verifying %s", precision)
    texts = verification_texts() if texts is None else list(texts)
    if reference is None or precision == "fp16":
        model = Embedder(artifact, precision="fp32", device="cpu")
    if reference is None:
        reference = model.encode(texts, prompt="")
    if precision != "fp16":
        model = Embedder(artifact, precision=precision, device="cpu")
        vectors = model.encode(texts, prompt="")
        report = _judge(precision, reference, vectors, "fp32", min_fidelity)
        report |= fidelity.worst_texts(reference, vectors, texts)
        if not report["problems"]:  # the export tries again and again
            _count_variant(report, model, texts, vectors)
        if precision == "int8":
            _check_files(report, precision, model, texts, vectors)
        return report
    session = Session(artifact.open_file("fp16"), "cpu")
    n, ids = len(texts), model.token_ids(texts)
    ids += references.length_probes(ids, model.max_seq_length)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        vectors = references.padded_vectors(session, model, ids)
    report = _judge("fp16", reference, vectors[:n], "fp32")
    if not np.isfinite(vectors).all():
        problem = "values of the model exceed float16's largest number, 65,504: use fp32"
        return report | {"problems": [problem]}
    rows = [*range(0, n, PORTABLE_STEP), *range(n, len(ids))]
    alone = np.concatenate([references.padded_vectors(session, model, [ids[row]]) for row in rows])
    _require_equal(report, "fp16", vectors[rows], alone, "in a batch and alone")
    if encoder := artifact.manifest.precisions["fp16"].encoder:
        session = Session(artifact.file(encoder), "cpu")
        own = references.padded_vectors(session, model, [ids[row] for row in rows])
        _require_equal(report, "fp16", alone, own, "of run path and portable file", "run_path")
    _check_pooled(report, "fp16", model, [ids[row] for row in rows], alone)
    return report


def _judge(
    precision: str,
    reference: Float32,
    vectors: Float32,
    name: str,
    min_fidelity: tuple[float, float] | None = None,
) -> Report:
    """Compare vectors with a reference."""
    measured = fidelity.compare_vectors(reference, vectors)
    mean, worst = min_fidelity or fidelity.FIDELITY_THRESHOLDS[precision]
    problems = []
    if not (measured.mean_cosine >= mean and measured.min_cosine >= worst):
        problems.append(
            f"{precision} is not faithful to {name}: mean cosine {measured.mean_cosine:.5f} "
            f"(threshold {mean}), min {measured.min_cosine:.5f} (threshold {worst}) over "
            f"{len(vectors)} texts"
        )
    rounded: Report = {key: round(value, 6) for key, value in asdict(measured).items()}
    return {
        "reference": name, "texts": len(vectors), **rounded, "batch_variant": None,
        "problems": problems,
    }  # fmt: skip


def _count_variant(report: Report, model: Embedder, texts: Sequence[str], vectors: Float32) -> None:
    report["batch_variant"] = count = fidelity.count_variant(model, texts, vectors)
    if count:
        report["problems"].append(f"{count} of {len(texts)} vectors depend on the batch")


def _check_files(
    report: Report,
    precision: str,
    model: Embedder,
    texts: Sequence[str],
    vectors: Float32,
    expected: Float32 | None = None,
) -> None:
    """Compare the portable file, and the pooled one if there is one, with the run-path file.

    :param expected: the reference's vectors of `length_probes`, if there is one.
    """
    entry = model.artifact.manifest.precisions[precision]
    file = model.artifact.open_file(precision)
    session = Session(model.artifact.file(entry.encoder) if entry.encoder else file, "cpu")
    ids = model.token_ids(texts)
    lengths = references.length_probes(ids, model.max_seq_length)
    alone = np.concatenate([model.head(session.run(tokens[None])) for tokens in lengths])
    del session
    if expected is not None:
        _require_equal(report, precision, expected, alone, "of 1, 2 or most tokens", "lengths")
    ids = [*ids[::PORTABLE_STEP], *lengths]
    padded = references.padded_vectors(Session(file, "cpu"), model, ids)
    alone = np.concatenate([vectors[::PORTABLE_STEP], alone])
    _require_equal(report, precision, alone, padded, "of run path and padded batches")
    _check_pooled(report, precision, model, ids, alone)


def _check_pooled(
    report: Report, precision: str, model: Embedder, ids: Sequence[Int64], vectors: Float32
) -> None:
    """Compare the vectors that a pooled file computes, in padded batches, and their norms."""
    file = model.artifact.manifest.precisions[precision].pooled
    if file is None:
        return
    session = Session(model.artifact.file(file), "cpu")  # whose first output is the vectors
    own = references.padded_vectors(session, model, ids, lambda vectors, mask: vectors)
    _require_equal(report, precision, vectors, own, "of the pooled file and ours", "pooled")
    norms = [np.linalg.norm(v, axis=1) for v in (vectors, own)]
    if not np.allclose(norms[0], norms[1], rtol=0.01):
        report["problems"].append(f"{precision} vectors of the pooled file have other norms")


def _require_equal(
    report: Report, precision: str, a: Float32, b: Float32, what: str, key: str = "portable"
) -> None:
    worst, threshold = float(fidelity.row_cosines(a, b).min()), PORTABLE_THRESHOLDS[precision]
    report[f"{key}_min_cosine"] = round(worst, 6)
    if not worst >= threshold:
        report["problems"].append(
            f"{precision} vectors {what} differ: min cosine {worst:.5f} (threshold {threshold})"
        )
