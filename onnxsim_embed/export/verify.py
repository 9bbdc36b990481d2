"""Artifact against reference: is the export faithful?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.artifact.recipes import KnownAnswer, Recipe
from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.reference import (
    has_torch,
    numpy_reference,
    reference_vectors,
    torch_reference,
)
from onnxsim_embed.export.texts import read_texts
from onnxsim_embed.runtime.batching import TOKEN_BUDGET
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.session import Session

Float32 = npt.NDArray[np.float32]
Report = dict[str, Any]

# The least mean and min cosine to the reference that is published, by precision.
FIDELITY_THRESHOLDS = {"fp32": (0.999999, 0.99999), "int8": (0.995, 0.98), "fp16": (0.9999, 0.999)}

# The portable file of a precision computes the same as the run-path file but for rounding (a mask,
# other matrix shapes), and int8 steps can fall either way on that.
PORTABLE_THRESHOLDS = {"fp32": FIDELITY_THRESHOLDS["fp32"][1], "int8": 0.999, "fp16": 0.999}
PORTABLE_STEP = 10

# Texts in a padded batch: enough for lengths to differ, few enough for a small machine.
PADDED_TEXTS = 16

# Every fourth verification text goes through the reference of fp32: it runs text by text, and shows a
# wrong graph with one text as well as with two hundred.
REFERENCE_STEP = 4


@dataclass(frozen=True)
class Fidelity:
    """How close vectors are to those of a reference.

    :param min_cosine: smallest cosine of a text's two vectors.
    :param p1_cosine: its first percentile.
    :param mean_cosine: its mean.
    :param spearman: rank correlation of all pair scores, artifact against reference.
    :param top10_overlap: mean share of a text's ten nearest that both agree on.
    """

    min_cosine: float
    p1_cosine: float
    mean_cosine: float
    spearman: float
    top10_overlap: float


def compare_vectors(reference: Float32, vectors: Float32) -> Fidelity:
    """Compare two sets of vectors of the same texts.

    :param reference: float32 array (n, dim), n at least 2.
    :param vectors: float32 array (n, dim).
    :raises ValueError: if the shapes differ or there are fewer than two rows.
    """
    from scipy.stats import spearmanr

    if reference.shape != vectors.shape or len(reference) < 2:
        raise ValueError(
            f"need two equal shapes of at least 2 rows, got {reference.shape} and {vectors.shape}"
        )
    a, b = (_unit(v.astype(np.float64)) for v in (reference, vectors))
    cosines = _cosines(a, b)
    scores_a, scores_b = a @ a.T, b @ b.T
    upper = np.triu_indices(len(a), 1)
    neighbours = min(10, len(a) - 1)
    for scores in (scores_a, scores_b):
        np.fill_diagonal(scores, -np.inf)
    near_a, near_b = (
        np.argsort(-s, axis=1, kind="stable")[:, :neighbours] for s in (scores_a, scores_b)
    )
    shared = [len(np.intersect1d(x, y)) / neighbours for x, y in zip(near_a, near_b, strict=True)]
    pairs = scores_a[upper], scores_b[upper]
    rank = 1.0
    if len(a) > 2:  # a constant has no ranks to agree with
        constant = any(np.ptp(scores) == 0 for scores in pairs)
        rank = float("nan") if constant else float(spearmanr(*pairs).statistic)
    return Fidelity(
        float(cosines.min()),
        float(np.percentile(cosines, 1)),
        float(cosines.mean()),
        rank,
        float(np.mean(shared)),
    )


def _cosines(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(
        np.einsum("ij,ij->i", _unit(a.astype(np.float64)), _unit(b.astype(np.float64)))
    )


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1))


def verification_texts() -> list[str]:
    """Return the texts that exports are verified on; calibration never sees them."""
    return read_texts("verification.jsonl")


def check_known_answer(model: Embedder, answer: KnownAnswer) -> list[str]:
    """Compare a model with published results.

    :returns: one line for each quantity that is off by more than the published tolerance.
    """
    length = model.max_seq_length
    try:
        if answer.max_length is not None:  # a model that was made shorter still answers short texts
            model.max_seq_length = min(answer.max_length, length)
        vectors = model.encode(
            answer.texts, prompt_name=answer.prompt_name, normalize_embeddings=answer.normalize
        ).astype(np.float64)
        prefix = model.prompt_text(answer.prompt_name)
        counts = [len(ids) for ids in model.token_ids([prefix + text for text in answer.texts])]
    finally:
        model.max_seq_length = length
    unit = _unit(vectors)
    got = {
        "token_counts": np.array(counts),
        "cosine_matrix": unit @ unit.T,
        "cosine_of_first_to_rest": unit[0] @ unit[1:].T,
    }
    if not (answer.normalize is False and model.head.normalizes):
        got["norms"] = np.linalg.norm(vectors, axis=1)
    if answer.vector_head is not None and "norms" in got:
        got["vector_head"] = vectors[: len(answer.vector_head), : len(answer.vector_head[0])]
    if answer.vector_tail is not None and "norms" in got:
        got["vector_tail"] = vectors[: len(answer.vector_tail), -len(answer.vector_tail[0]) :]
    problems = []
    for name, value in got.items():
        published = getattr(answer, name)
        if published is None:
            continue
        error = float(np.abs(value - np.asarray(published)).max())
        if not error <= answer.tolerance:
            problems.append(
                f"{name} published by {answer.source} is off by {error:.2g} (allowed {answer.tolerance:.2g})"
            )
    return problems


def verify_fp32(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Float32],
    recipe: Recipe | None,
    artifact: Artifact,
    texts: Sequence[str] | None = None,
) -> Report:
    """Compare the fp32 file with the checkpoint it came from, and with published results.

    The reference is PyTorch where it is installed, else BERT written in numpy.

    :param tensors: the checkpoint's weights.
    :param recipe: whose known answers to check, or None.
    :param texts: texts to compare on; None for those of the package.
    :returns: the report; its "problems" is empty if the file is faithful.
    """
    chosen = verification_texts()[::REFERENCE_STEP] if texts is None else list(texts)
    model = Embedder(artifact, precision="fp32", device="cpu")
    vectors = model.encode(chosen, prompt="")
    torch = has_torch()
    if not torch and checkpoint.architecture != "bert":
        raise MissingExtraError("verifying against PyTorch", "optimum", "torch")
    hidden = torch_reference(checkpoint) if torch else numpy_reference(checkpoint.config, tensors)
    reference = reference_vectors(hidden, model.head, model.token_ids(chosen))
    report = _judge("fp32", "PyTorch" if torch else "numpy BERT", reference, vectors, None)
    _add_invariance(report, model, chosen, vectors)
    _add_portable(report, artifact, "fp32", model, chosen, vectors)
    if recipe is not None:
        _add_known_answers(report, model, recipe)
    return report


def verify_quantized(
    precision: str,
    artifact: Artifact,
    bar: tuple[float, float] | None = None,
    texts: Sequence[str] | None = None,
) -> Report:
    """Compare a quantized file with the fp32 file of the same artifact.

    :param bar: least mean and min cosine; None for the default of the precision.
    :param texts: texts to compare on; None for those of the package.
    :returns: the report; its "problems" is empty if the file is faithful.
    """
    chosen = verification_texts() if texts is None else list(texts)
    reference = Embedder(artifact, precision="fp32", device="cpu").encode(chosen, prompt="")
    model = Embedder(artifact, precision=precision, device="cpu")
    vectors = model.encode(chosen, prompt="")
    report = _judge(precision, "fp32", reference, vectors, bar)
    _add_invariance(report, model, chosen, vectors)
    _add_portable(report, artifact, precision, model, chosen, vectors)
    return report


def verify_fp16(artifact: Artifact, texts: Sequence[str] | None = None) -> Report:
    """Compare the fp16 file, on the CPU and in padded batches as a GPU runs them, with the fp32 file.

    :param texts: texts to compare on; None for those of the package.
    :returns: the report; "batch_variant" is None, as padded batches differ by rounding.
    """
    chosen = verification_texts() if texts is None else list(texts)
    model = Embedder(artifact, precision="fp32", device="cpu")
    session = Session(artifact.open_file("fp16"), "cpu")
    ids = model.token_ids(chosen)
    vectors = padded_vectors(session, model, ids)
    report = _judge("fp16", "fp32", model.encode(chosen, prompt=""), vectors, None)
    report["batch_variant"] = None
    some = range(0, len(ids), PORTABLE_STEP)
    alone = np.concatenate([padded_vectors(session, model, [ids[i]]) for i in some])
    _demand_equal(report, "fp16", vectors[list(some)], alone, "of a text alone and in company")
    return report


def verify_adopted(
    artifact: Artifact, recipe: Recipe | None, texts: Sequence[str] | None = None
) -> Report:
    """Check an fp32 file that came without weights: against itself, padded, and published results.

    :returns: the report; its "problems" is empty if the file computes what a text's company and
        padding do not change.
    """
    chosen = verification_texts() if texts is None else list(texts)
    model = Embedder(artifact, precision="fp32", device="cpu")
    vectors = model.encode(chosen, prompt="")
    session = Session(artifact.open_file("fp32"), "cpu")
    padded = padded_vectors(session, model, model.token_ids(chosen))
    report = _judge("fp32", "itself, padded", padded, vectors, None)
    _add_invariance(report, model, chosen, vectors)
    if recipe is not None:
        _add_known_answers(report, model, recipe)
    return report


def padded_vectors(
    session: Session, model: Embedder, token_ids: Sequence[npt.NDArray[np.int64]]
) -> Float32:
    """Return the vectors of a portable file in padded batches, float32 array (n, dim).

    :param model: whose pooling follows.
    :param token_ids: int64 arrays (t,).
    """
    pad_id = model.artifact.manifest.pad_token_id
    vectors = []
    for start in range(0, len(token_ids), PADDED_TEXTS):
        ids = token_ids[start : start + PADDED_TEXTS]
        padded = np.full((len(ids), max(map(len, ids))), pad_id, np.int64)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        vectors.append(model.head(session.run(padded, mask), mask))
    return np.concatenate(vectors)


def count_variant(model: Embedder, texts: Sequence[str], vectors: Float32) -> int:
    """Return how many vectors change, by a bit or more, with the company a text is encoded in.

    Texts are encoded alone, shuffled, in batches eight times the usual size, and on one thread and
    several.

    :param vectors: what `model.encode(texts, prompt="")` gave.
    """
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = np.empty_like(vectors)
    shuffled[order] = model.encode([texts[i] for i in order], prompt="")
    others = [shuffled, model.encode(texts, prompt="", batch_size=1)]
    for threads in (1, 3):
        with model.settings(threads=threads, token_budget=8 * TOKEN_BUDGET):
            others.append(model.encode(texts, prompt=""))
    changed = np.zeros(len(texts), np.bool_)
    for other in others:
        changed |= (other != vectors).any(axis=1)
    return int(changed.sum())


def _add_invariance(
    report: Report, model: Embedder, texts: Sequence[str], vectors: Float32
) -> None:
    report["batch_variant"] = count_variant(model, texts, vectors)
    if report["batch_variant"]:
        report["problems"].append(
            f"{report['batch_variant']} of {len(texts)} vectors depend on the batch they are encoded in"
        )


def _add_portable(
    report: Report,
    artifact: Artifact,
    precision: str,
    model: Embedder,
    texts: Sequence[str],
    vectors: Float32,
) -> None:
    """Check that the portable file, padded and masked, gives what the run-path file gives."""
    session = Session(artifact.open_file(precision), "cpu")
    some = range(0, len(texts), PORTABLE_STEP)
    other = padded_vectors(session, model, model.token_ids([texts[i] for i in some]))
    _demand_equal(report, precision, vectors[list(some)], other, "of run path and padded batches")


def _demand_equal(report: Report, precision: str, a: Float32, b: Float32, what: str) -> None:
    least = float(_cosines(a, b).min())
    report["portable_min_cosine"] = round(least, 6)
    if not least >= PORTABLE_THRESHOLDS[precision]:
        report["problems"].append(
            f"{precision} vectors {what} differ: min cosine {least:.5f} (at least "
            f"{PORTABLE_THRESHOLDS[precision]})"
        )


def _add_known_answers(report: Report, model: Embedder, recipe: Recipe) -> None:
    report["known_answers"] = len(recipe.known_answers)
    for answer in recipe.known_answers:
        report["problems"] += check_known_answer(model, answer)


def _judge(
    precision: str,
    reference_name: str,
    reference: Float32,
    vectors: Float32,
    bar: tuple[float, float] | None,
) -> Report:
    fidelity = compare_vectors(reference, vectors)
    mean, least = bar or FIDELITY_THRESHOLDS[precision]
    problems = []
    if not (fidelity.mean_cosine >= mean and fidelity.min_cosine >= least):
        problems.append(
            f"{precision} is not faithful to {reference_name}: mean cosine {fidelity.mean_cosine:.5f} "
            f"(at least {mean}), min {fidelity.min_cosine:.5f} (at least {least}) over {len(vectors)} texts"
        )
    rounded: Report = {key: round(value, 6) for key, value in asdict(fidelity).items()}
    return {"reference": reference_name, "texts": len(vectors), **rounded, "problems": problems}
