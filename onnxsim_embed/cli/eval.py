"""eval: correlation with human scores."""

from __future__ import annotations

from pathlib import Path

from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import print_table


def evaluate(
    file: Path = Argument(
        ..., help="Text, text, score in the first three columns of csv, tsv, jsonl or parquet."
    ),
    model: options.Model = options.DEFAULT_MODEL,
    precision: str = Option("", help="Comma-separated; default: all of the model."),
    device: options.Device = "auto",
    max_seq_length: options.MaxSeqLength = None,
    threads: options.Threads = None,
    delimiter: options.Delimiter = None,
    no_header: bool = Option(False, "--no-header", help="The first row is a pair."),
    on_error: str = Option("fail", help="Rows without a pair: fail or skip."),
) -> None:
    """Correlate cosine similarity with human scores, for each weight precision."""
    from onnxsim_embed.evaluation import evaluate_sts
    from onnxsim_embed.files.texts import read_scored_pairs
    from onnxsim_embed.runtime.embedder import Embedder

    left, right, scores = read_scored_pairs(
        file, delimiter=delimiter, header=not no_header, on_error=on_error
    )
    first = Embedder.from_pretrained(model, precision="fp32", threads=threads, device=device)
    rows = []
    for name in options.split(precision) or first.artifact.manifest.precisions:
        embedder = first
        if name != "fp32":
            embedder = Embedder(first.artifact, precision=name, threads=threads, device=device)
        if max_seq_length is not None:
            embedder.max_seq_length = max_seq_length
        result = evaluate_sts(embedder, left, right, scores)
        values = (result.spearman, result.pearson)
        correlations = ["undefined" if value != value else f"{value:.2f}" for value in values]
        rate = f"{embedder.last_report.texts_per_second:,.0f}"
        rows.append([name, *correlations, str(result.pairs), rate])
    print_table(["precision", "Spearman x100", "Pearson x100", "pairs", "texts/s"], rows)
