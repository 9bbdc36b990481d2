"""Artifact against reference: is the export faithful?"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact import Artifact
from onnxsim_embed.embedder import Embedder
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.reference import (
    has_torch,
    numpy_reference,
    reference_vectors,
    torch_reference,
)
from onnxsim_embed.recipes import KnownAnswer, Recipe

Float32 = npt.NDArray[np.float32]

# The least mean and min cosine to the reference that is published, by precision.
BARS = {"fp32": (0.999999, 0.99999), "int8": (0.98, 0.90)}

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
    cosines = np.einsum("ij,ij->i", a, b)
    scores_a, scores_b = a @ a.T, b @ b.T
    upper = np.triu_indices(len(a), 1)
    neighbours = min(10, len(a) - 1)
    for scores in (scores_a, scores_b):
        np.fill_diagonal(scores, -np.inf)
    near_a, near_b = (
        np.argsort(-s, axis=1, kind="stable")[:, :neighbours] for s in (scores_a, scores_b)
    )
    shared = [len(np.intersect1d(x, y)) / neighbours for x, y in zip(near_a, near_b, strict=True)]
    rank = float(spearmanr(scores_a[upper], scores_b[upper]).statistic) if len(a) > 2 else 1.0
    return Fidelity(
        float(cosines.min()),
        float(np.percentile(cosines, 1)),
        float(cosines.mean()),
        rank,
        float(np.mean(shared)),
    )


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1))


def verification_texts() -> list[str]:
    """Return the texts that exports are verified on; calibration never sees them."""
    return read_texts("verification.jsonl")


def read_texts(name: str) -> list[str]:
    """Return the texts of a JSON lines file that ships with the package."""
    lines = files("onnxsim_embed").joinpath("data", name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines if line]


def check_known_answer(model: Embedder, answer: KnownAnswer) -> list[str]:
    """Compare a model with published results.

    :returns: one line for each quantity that is off by more than the published tolerance.
    """
    length = model.max_seq_length
    try:
        if answer.max_length is not None:
            model.max_seq_length = answer.max_length
        vectors = model.encode(answer.texts, prompt_name=answer.prompt_name).astype(np.float64)
    finally:
        model.max_seq_length = length
    unit = _unit(vectors)
    got = {
        "cosine_matrix": unit @ unit.T,
        "cosine_of_first_to_rest": unit[0] @ unit[1:].T,
        "norms": np.linalg.norm(vectors, axis=1),
    }
    if answer.vector_head is not None:
        got["vector_head"] = vectors[: len(answer.vector_head), : len(answer.vector_head[0])]
    if answer.vector_tail is not None:
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


def verify_export(
    checkpoint: Checkpoint, tensors: dict[str, Float32], recipe: Recipe | None, artifact: Artifact
) -> dict[str, dict[str, Any]]:
    """Compare every precision of an artifact with its reference.

    fp32 is compared with PyTorch where it is installed, else with BERT written in numpy; the other
    precisions with fp32.

    :returns: for each precision a report; its "problems" is empty if it may be published.
    """
    texts = verification_texts()
    fp32 = Embedder(artifact, precision="fp32", device="cpu")
    vectors = fp32.encode(texts)
    some = texts[::REFERENCE_STEP]
    hidden = (
        torch_reference(checkpoint) if has_torch() else numpy_reference(checkpoint.config, tensors)
    )
    ids = fp32.token_ids(some)
    reference = reference_vectors(hidden, fp32.head, ids)
    name = "PyTorch" if has_torch() else "numpy BERT"
    report = {"fp32": _judge("fp32", name, reference, vectors[::REFERENCE_STEP])}
    if recipe is not None:
        answers = [check_known_answer(fp32, answer) for answer in recipe.known_answers]
        report["fp32"]["known_answers"] = len(answers)
        report["fp32"]["problems"] += [problem for answer in answers for problem in answer]
    for precision in artifact.manifest.precisions:
        if precision != "fp32":
            other = Embedder(artifact, precision=precision, device="cpu").encode(texts)
            report[precision] = _judge(precision, "fp32", vectors, other)
    return report


def _judge(
    precision: str, reference_name: str, reference: Float32, vectors: Float32
) -> dict[str, Any]:
    fidelity = compare_vectors(reference, vectors)
    mean, least = BARS[precision]
    problems = []
    if not (fidelity.mean_cosine >= mean and fidelity.min_cosine >= least):
        problems.append(
            f"{precision} is not faithful to {reference_name}: mean cosine {fidelity.mean_cosine:.5f} "
            f"(at least {mean}), min {fidelity.min_cosine:.5f} (at least {least}) over {len(vectors)} texts"
        )
    rounded: dict[str, Any] = {key: round(value, 6) for key, value in asdict(fidelity).items()}
    return {"reference": reference_name, "texts": len(vectors), **rounded, "problems": problems}
