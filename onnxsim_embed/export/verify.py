"""Verification of an artifact against its checkpoint, against itself and against published results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.artifact.recipes import KnownAnswer, Recipe
from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.fidelity import (
    FIDELITY_THRESHOLDS,
    bundled_texts,
    compare_vectors,
    row_cosines,
)
from onnxsim_embed.export.reference import (
    has_torch,
    numpy_reference,
    reference_vectors,
    torch_reference,
)
from onnxsim_embed.runtime.batching import TOKEN_BUDGET
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.similarity.unit_rows import unit_vectors

Float32 = npt.NDArray[np.float32]
Report = dict[str, Any]

# The portable file computes what the run-path file does but for rounding (a mask, other matrix
# shapes), and int8 steps can fall either way on that.
PORTABLE_THRESHOLDS = {"fp32": FIDELITY_THRESHOLDS["fp32"][1], "int8": 0.999, "fp16": 0.999}
PORTABLE_STEP = 10

# Texts in a padded batch: enough for lengths to differ, few enough for a small machine.
PADDED_TEXTS = 16

# Every fourth verification text goes through the reference of fp32, which runs one text at a time.
REFERENCE_STEP = 4


def verification_texts() -> list[str]:
    """Return the texts that exports are verified on, none of which is used in calibration."""
    return bundled_texts("verification.jsonl")


def verify_fp32(
    artifact: Artifact,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Float32],
    recipe: Recipe | None = None,
    texts: Sequence[str] | None = None,
) -> Report:
    """Compare the fp32 file with the checkpoint it was exported from, and with published results.

    The reference is PyTorch if it is installed, else BERT written in numpy.

    :param tensors: weights of the checkpoint.
    :param recipe: recipe whose known answers are checked, or None.
    :param texts: texts to compare on; None for the bundled ones.
    :returns: the report; its "problems" is empty if the file is faithful.
    """
    texts = verification_texts()[::REFERENCE_STEP] if texts is None else list(texts)
    model = Embedder(artifact, precision="fp32", device="cpu")
    torch = has_torch()
    if not torch and checkpoint.architecture != "bert":
        raise MissingExtraError("verifying against PyTorch", "optimum", "torch")
    hidden = torch_reference(checkpoint) if torch else numpy_reference(checkpoint.config, tensors)
    reference = reference_vectors(hidden, model.head, model.token_ids(texts))
    report, vectors = _compare(
        "fp32", model, texts, reference, "PyTorch" if torch else "numpy BERT"
    )
    _add_portable(report, "fp32", model, texts, vectors)
    _add_known_answers(report, model, recipe)
    return report


def verify_adopted(
    artifact: Artifact, recipe: Recipe | None, texts: Sequence[str] | None = None
) -> Report:
    """Check an fp32 file that came without weights: against itself in padded batches.

    For arguments and result see `verify_fp32`.
    """
    texts = verification_texts() if texts is None else list(texts)
    model = Embedder(artifact, precision="fp32", device="cpu")
    session = Session(artifact.open_file("fp32"), "cpu")
    padded = padded_vectors(session, model, model.token_ids(texts))
    report, _ = _compare("fp32", model, texts, padded, "itself, padded")
    _add_known_answers(report, model, recipe)
    return report


def verify_derived(
    precision: str,
    artifact: Artifact,
    min_fidelity: tuple[float, float] | None = None,
    texts: Sequence[str] | None = None,
) -> Report:
    """Compare int8 or fp16 with the fp32 file of the same artifact.

    fp16 runs in padded batches, as on a GPU; its "batch_variant" is None, as those differ by rounding.

    :param min_fidelity: minimum mean and worst-case cosine of int8; None for the default.
    :returns: the report; its "problems" is empty if the file is faithful.
    """
    texts = verification_texts() if texts is None else list(texts)
    model = Embedder(artifact, precision="fp32", device="cpu")
    reference = model.encode(texts, prompt="")
    if precision != "fp16":
        model = Embedder(artifact, precision=precision, device="cpu")
        report, vectors = _compare(precision, model, texts, reference, "fp32", min_fidelity)
        _add_portable(report, precision, model, texts, vectors)
        return report
    session = Session(artifact.open_file("fp16"), "cpu")
    ids = model.token_ids(texts)
    vectors = padded_vectors(session, model, ids)
    report = _judge("fp16", reference, vectors, "fp32", None) | {"batch_variant": None}
    rows = list(range(0, len(ids), PORTABLE_STEP))
    alone = np.concatenate([padded_vectors(session, model, [ids[row]]) for row in rows])
    _require_equal(report, "fp16", vectors[rows], alone, "in a batch and alone")
    return report


def _compare(
    precision: str,
    model: Embedder,
    texts: Sequence[str],
    reference: Float32,
    name: str,
    min_fidelity: tuple[float, float] | None = None,
) -> tuple[Report, Float32]:
    """Compare a model's vectors with a reference, and with its own in other batches."""
    vectors = model.encode(texts, prompt="")
    report = _judge(precision, reference, vectors, name, min_fidelity)
    report["batch_variant"] = count = count_variant(model, texts, vectors)
    if count:
        report["problems"].append(
            f"{count} of {len(texts)} vectors depend on the batch they are encoded in"
        )
    return report, vectors


def _judge(
    precision: str,
    reference: Float32,
    vectors: Float32,
    name: str,
    min_fidelity: tuple[float, float] | None,
) -> Report:
    fidelity = compare_vectors(reference, vectors)
    mean, worst = min_fidelity or FIDELITY_THRESHOLDS[precision]
    problems = []
    if not (fidelity.mean_cosine >= mean and fidelity.min_cosine >= worst):
        problems.append(
            f"{precision} is not faithful to {name}: mean cosine {fidelity.mean_cosine:.5f} "
            f"(threshold {mean}), min {fidelity.min_cosine:.5f} (threshold {worst}) over "
            f"{len(vectors)} texts"
        )
    rounded: Report = {key: round(value, 6) for key, value in asdict(fidelity).items()}
    return {"reference": name, "texts": len(vectors), **rounded, "problems": problems}


def padded_vectors(
    session: Session, model: Embedder, token_ids: Sequence[npt.NDArray[np.int64]]
) -> Float32:
    """Return the vectors of a portable file in padded batches, float32 array (n, dim).

    :param model: model whose pooling is applied.
    :param token_ids: int64 arrays (t,).
    """
    pad_id = model.artifact.manifest.pad_token_id
    vectors = []
    for start in range(0, len(token_ids), PADDED_TEXTS):
        batch = token_ids[start : start + PADDED_TEXTS]
        ids = np.full((len(batch), max(map(len, batch))), pad_id, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        vectors.append(model.head(session.run(ids, mask), mask))
    return np.concatenate(vectors)


def count_variant(model: Embedder, texts: Sequence[str], vectors: Float32) -> int:
    """Return the number of vectors that change, by a bit or more, with the batch composition.

    Texts are encoded alone, shuffled, in batches eight times the usual size, and on one thread and
    several.

    :param vectors: the result of `model.encode(texts, prompt="")`.
    """
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = np.empty_like(vectors)
    shuffled[order] = model.encode([texts[i] for i in order], prompt="")
    others = [shuffled, model.encode(texts, prompt="", batch_size=1)]
    for threads in (1, 3):
        with model.settings(threads=threads, token_budget=8 * TOKEN_BUDGET):
            others.append(model.encode(texts, prompt=""))
    return int(np.any([(other != vectors).any(axis=1) for other in others], axis=0).sum())


def _add_portable(
    report: Report, precision: str, model: Embedder, texts: Sequence[str], vectors: Float32
) -> None:
    """Compare the portable file, padded and masked, with the run-path file."""
    session = Session(model.artifact.open_file(precision), "cpu")
    rows = list(range(0, len(texts), PORTABLE_STEP))
    padded = padded_vectors(session, model, model.token_ids([texts[row] for row in rows]))
    _require_equal(report, precision, vectors[rows], padded, "of run path and padded batches")


def _require_equal(report: Report, precision: str, a: Float32, b: Float32, what: str) -> None:
    worst, threshold = float(row_cosines(a, b).min()), PORTABLE_THRESHOLDS[precision]
    report["portable_min_cosine"] = round(worst, 6)
    if not worst >= threshold:
        report["problems"].append(
            f"{precision} vectors {what} differ: min cosine {worst:.5f} (threshold {threshold})"
        )


def _add_known_answers(report: Report, model: Embedder, recipe: Recipe | None) -> None:
    if recipe is not None:
        report["known_answers"] = len(recipe.known_answers)
        for answer in recipe.known_answers:
            report["problems"] += check_known_answer(model, answer)


def check_known_answer(model: Embedder, answer: KnownAnswer) -> list[str]:
    """Compare a model with published results.

    :returns: one line for each quantity that is off by more than the published tolerance.
    """
    length = model.max_seq_length
    try:
        if answer.max_length is not None:  # a model exported with fewer tokens answers short texts
            model.max_seq_length = min(answer.max_length, length)
        vectors = model.encode(
            answer.texts, prompt_name=answer.prompt_name, normalize_embeddings=answer.normalize
        )
        prefix = model.prompt_text(answer.prompt_name)
        counts = [len(ids) for ids in model.token_ids([prefix + text for text in answer.texts])]
    finally:
        model.max_seq_length = length
    unit = unit_vectors(vectors).astype(np.float64)
    results: dict[str, npt.NDArray[Any]] = {
        "token_counts": np.array(counts),
        "cosine_matrix": unit @ unit.T,
        "cosine_of_first_to_rest": unit[0] @ unit[1:].T,
    }
    if not (answer.normalize is False and model.head.normalizes):
        results["norms"] = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if answer.vector_head is not None:
            head = np.shape(answer.vector_head)
            results["vector_head"] = vectors[: head[0], : head[1]]
        if answer.vector_tail is not None:
            tail = np.shape(answer.vector_tail)
            results["vector_tail"] = vectors[: tail[0], -tail[1] :]
    problems = []
    for name, value in results.items():
        published = getattr(answer, name)
        if published is None:
            continue
        error = float(np.abs(value - np.asarray(published)).max())
        if not error <= answer.tolerance:
            problems.append(
                f"{name} published by {answer.source} is off by {error:.2g} "
                f"(tolerance {answer.tolerance:.2g})"
            )
    return problems
