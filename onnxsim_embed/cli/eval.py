"""eval: correlation with human scores."""

from __future__ import annotations

from pathlib import Path

from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import print_table


def evaluate(
    file: Path = Argument(..., help="csv or tsv: text, text, score in the first three columns."),
    model: options.Model = options.DEFAULT_MODEL,
    precision: str = Option("", help="Comma-separated; default: all of the model."),
    threads: options.Threads = None,
) -> None:
    """Correlate cosine similarity with human scores, for each weight precision."""
    from onnxsim_embed.evaluation import evaluate_sts
    from onnxsim_embed.files.texts import read_scored_pairs
    from onnxsim_embed.runtime.embedder import Embedder

    left, right, scores = read_scored_pairs(file)
    first = Embedder.from_pretrained(model, precision="fp32", threads=threads)
    rows = []
    for name in options.split(precision) or first.artifact.manifest.precisions:
        embedder = first
        if name != "fp32":
            embedder = Embedder(first.artifact, precision=name, threads=threads)
        result = evaluate_sts(embedder, left, right, scores)
        values = (result.spearman, result.pearson)
        correlations = ["undefined" if value != value else f"{value:.2f}" for value in values]
        rate = f"{embedder.last_report.texts_per_second:,.0f}"
        rows.append([name, *correlations, str(result.pairs), rate])
    print_table(["precision", "Spearman x100", "Pearson x100", "pairs", "texts/s"], rows)
