"""Bundled texts, and how close two sets of vectors of the same texts are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.similarity.unit_rows import unit_vectors

Float32 = npt.NDArray[np.float32]

# Default minimum mean and worst-case cosine of a precision to its reference.
FIDELITY_THRESHOLDS = {"fp32": (0.999999, 0.99999), "int8": (0.995, 0.98), "fp16": (0.9999, 0.999)}

FIDELITY_HEADER = [
    "precision", "compared with", "texts", "min cosine", "1st percentile", "mean cosine",
    "Spearman of pairs", "top-10 overlap", "batch-variant",
]  # fmt: skip


@dataclass(frozen=True)
class Fidelity:
    """Agreement of vectors with those of a reference.

    :param min_cosine: smallest cosine of a text's two vectors.
    :param p1_cosine: its first percentile.
    :param mean_cosine: its mean.
    :param spearman: rank correlation of all pair scores; NaN if those of one set are constant.
    :param top10_overlap: mean share of a text's ten nearest neighbours that both sets have.
    """

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
    units = (unit_vectors(np.nan_to_num(v, posinf=0, neginf=0)).astype(np.float64) for v in (a, b))
    return np.asarray(np.einsum("ij,ij->i", *units))


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
    cosines = row_cosines(reference, vectors)
    n, pairs, neighbours = len(vectors), [], []
    for rows in (reference, vectors):
        units = unit_vectors(np.nan_to_num(rows, posinf=0, neginf=0)).astype(np.float64)
        scores = units @ units.T
        pairs.append(scores[np.triu_indices(n, 1)])
        np.fill_diagonal(scores, -np.inf)
        neighbours.append(np.argsort(-scores, axis=1, kind="stable")[:, : min(10, n - 1)])
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*neighbours, strict=True)]
    rank = 1.0
    if n > 2:
        constant = any(np.ptp(scores) == 0 for scores in pairs)
        rank = float("nan") if constant else float(spearmanr(*pairs).statistic)
    return Fidelity(
        min_cosine=float(cosines.min()),
        p1_cosine=float(np.percentile(cosines, 1)),
        mean_cosine=float(cosines.mean()),
        spearman=rank,
        top10_overlap=float(np.mean(shared)),
    )


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
