"""What was measured on texts, as it is written: with machine, model, texts, and shares of the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.conditions import machine, today
from lab.corpus import Corpus
from lab.text_plan import TextPlan, count_tokens, linear_operations, most_tokens
from lab.workers import rounded
from onnxsim_embed.artifact.manifest import Artifact

CLOCK = (
    "inside the process that holds the system, from the list of texts to the array of unit vectors: "
    "tokenization, model, pooling, normalization"
)


@dataclass(frozen=True)
class Measured:
    """What a run measured.

    :param rows: for each system.
    :param failed: systems that could not run, and why.
    :param rates: of matrix products, 1e9 operations a second.
    :param load: of the machine, for each case.
    :param ratios: by their names.
    """

    rows: Mapping[str, dict[str, Any]]
    failed: Mapping[str, str]
    rates: Mapping[str, Any]
    load: Mapping[str, Any]
    ratios: Mapping[str, Mapping[str, Any]]


def ratio_of(artifact: Artifact, corpus: Corpus) -> str:
    """Return the key by which ratios of other texts, or of another model, differ."""
    return f"{artifact.manifest.name}, {corpus.digest}"


def text_result(plan: TextPlan, artifact: Artifact, measured: Measured) -> dict[str, Any]:
    """Return what is written as JSON."""
    manifest, operations = artifact.manifest, linear_operations(artifact)
    corpora = {
        corpus.kind: {
            "source": corpus.source,
            "texts": len(corpus.texts),
            "tokens": count_tokens(artifact, corpus),
            "most_tokens": most_tokens(artifact, corpus.kind),
            "sha256": corpus.digest,
        }
        for corpus in plan.corpora
    }
    ratios, shares = dict(measured.ratios), {}
    for name, row in measured.rows.items():
        for kind, cell in row["throughput"].items():
            texts, tokens = corpora[kind]["texts"], corpora[kind]["tokens"]
            cell["tokens_per_second"] = cell["texts_per_second"] * tokens / texts
        roof = measured.rates.get(name.removeprefix("ours-"))
        if roof is not None:
            most = roof["median"] * 1e9 / operations
            shares[name] = {k: c["tokens_per_second"] / most for k, c in row["throughput"].items()}
        for corpus in plan.corpora if roof is not None else ():
            key = f"share of the roofline, {corpus.kind}: {name}"
            share, of = shares[name][corpus.kind], ratio_of(artifact, corpus)
            ratios[key] = {"value": share, "of": of}
    result: dict[str, Any] = rounded(
        {
            "date": today(),
            "clock": CLOCK,
            "machine": machine(plan.threads),
            "model": {
                "name": manifest.name,
                "source": manifest.source,
                "max_seq_length": manifest.max_seq_length,
                "linear_operations_per_token": operations,
            },
            "corpora": corpora,
            "sts": plan.sts.name if plan.sts is not None else None,
            "rounds": plan.rounds,
            "load": measured.load,
            "systems": measured.rows,
            "failed": dict(measured.failed),
            "products_1e9_per_second": dict(measured.rates),
            "share_of_roofline": shares,
            "ratios": ratios,
        }
    )
    return result


def stages(reports: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Return the median of each stage's seconds, and what is left of the whole; None without reports."""
    known = [report for report in reports if report is not None]
    if not known:
        return None
    shares = {name: float(np.median([report[name] for report in known])) for name in known[0]}
    rest = shares["all"] - shares["tokenize"] - shares["run"] - shares["pool"]
    return shares | {"rest": max(0.0, rest)}
