"""Measures of fidelity: to the vectors of a reference, and to published results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.recipes import KnownAnswer
from onnxsim_embed.runtime.batching import TOKEN_BUDGET
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.similarity.unit_rows import unit_vectors
from onnxsim_embed.system.arrays import Float32

# Default minimum mean and worst-case cosine of a precision to its reference.
FIDELITY_THRESHOLDS = {
    "fp32": (0.999999, 0.99999),
    "int8": (0.999, 0.99),
    "bf16": (0.999, 0.99),
    "fp16": (0.9999, 0.999),
}

# What a report of int8 says of single texts.
LOW_COSINE, WORST_TEXTS = 0.99, 5

FIDELITY_HEADER = [
    "precision", "compared with", "texts", "min cosine", "1st percentile", "mean cosine",
    "Spearman of pairs", "top-10 overlap", "batch-variant",
]  # fmt: skip


@dataclass(frozen=True)
class Fidelity:
    """Agreement with a reference: cosines of each text's two vectors, rank correlation of pair scores, shared neighbours."""

    min_cosine: float
    p1_cosine: float
    mean_cosine: float
    spearman: float
    top10_overlap: float


def bundled_texts(name: str) -> list[str]:
    """Return the texts of a JSON lines file in the package's data folder."""
    lines = files("onnxsim_embed").joinpath("data", name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines if line]


def row_cosines(a: Float32, b: Float32) -> npt.NDArray[np.float64]:
    """Return the cosine of each row of `a` to the same row of `b`; 0 for zero and non-finite rows."""
    return np.asarray(np.einsum("ij,ij->i", _units(a), _units(b)))


def _units(vectors: Float32) -> npt.NDArray[np.float64]:
    return unit_vectors(np.nan_to_num(vectors, posinf=0, neginf=0)).astype(np.float64)


def compare_vectors(reference: Float32, vectors: Float32) -> Fidelity:
    """Compare two sets of vectors (n, dim) of the same texts, n at least 2."""
    from scipy.stats import spearmanr

    if reference.shape != vectors.shape or len(reference) < 2:
        raise ValueError(
            f"need two equal shapes of at least 2 rows, got {reference.shape} and {vectors.shape}"
        )
    cosines = row_cosines(reference, vectors)
    n, pairs, neighbours = len(vectors), [], []
    for units in map(_units, (reference, vectors)):
        scores = units @ units.T
        pairs.append(scores[np.triu_indices(n, 1)])
        np.fill_diagonal(scores, -np.inf)
        neighbours.append(np.argsort(-scores, axis=1, kind="stable")[:, : min(10, n - 1)])
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*neighbours, strict=True)]
    rank = 1.0
    if n > 2:
        constant = any(np.ptp(scores) == 0 for scores in pairs)
        rank = float("nan") if constant else float(spearmanr(pairs[0], pairs[1]).statistic)
    return Fidelity(
        min_cosine=float(cosines.min()),
        p1_cosine=float(np.percentile(cosines, 1)),
        mean_cosine=float(cosines.mean()),
        spearman=rank,
        top10_overlap=float(np.mean(shared)),
    )


def count_variant(model: Embedder, texts: Sequence[str], vectors: Float32) -> int:
    """Return the number of vectors that change, by a bit or more, with the batch composition.

    Texts are encoded alone on one thread, and shuffled in large batches on several.
    """
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = np.empty_like(vectors)
    with model.settings(threads=3, token_budget=8 * TOKEN_BUDGET):
        shuffled[order] = model.encode([texts[i] for i in order], prompt="")
    with model.settings(threads=1, token_budget=TOKEN_BUDGET):
        alone = model.encode(texts, prompt="", batch_size=1)
    return int(((shuffled != vectors) | (alone != vectors)).any(axis=1).sum())


def worst_texts(reference: Float32, vectors: Float32, texts: Sequence[str]) -> dict[str, Any]:
    """Return the share of texts with a cosine below LOW_COSINE, and the beginnings of the worst texts."""
    cosines = row_cosines(reference, vectors)
    worst = np.argsort(cosines, kind="stable")[:WORST_TEXTS]
    return {
        f"below_{LOW_COSINE}": round(float((cosines < LOW_COSINE).mean()), 6),
        "worst_texts": [
            {"cosine": round(float(cosines[row]), 6), "text": texts[row][:60]} for row in worst
        ],
    }


def check_known_answer(model: Embedder, answer: KnownAnswer) -> list[str]:
    """Return a line for each published quantity that a model misses by more than its tolerance."""
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


def fidelity_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a verification report as rows under FIDELITY_HEADER."""
    rows = []
    for precision, entry in report.items():
        cells = (
            f"{entry[key]:.6f}" for key in ("min_cosine", "p1_cosine", "mean_cosine", "spearman")
        )
        variant = "-" if entry["batch_variant"] is None else str(entry["batch_variant"])
        overlap = f"{entry['top10_overlap']:.3f}"
        rows.append([precision, entry["reference"], str(entry["texts"]), *cells, overlap, variant])
    return rows


def token_ids_note(report: Mapping[str, Any]) -> str | None:
    """Return how token ids of a verification report were compared, or None if it does not say."""
    entry = report.get("fp32", {}).get("token_ids")
    if entry is None:
        return None
    if entry["reference"] is None:
        return f"Token ids were not compared: {entry['reason']}."
    return f"Token ids were compared with those of {entry['reference']} on {entry['texts']} texts."
