"""cluster: groups of similar rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.dedupe import row_vectors
from onnxsim_embed.cli.output import check_table
from onnxsim_embed.cli.texts import TextFile


def cluster(
    file: str = Argument(
        ..., help="csv, tsv, jsonl, parquet or txt (also .gz); - for standard input."
    ),
    output: Path = Option(
        ..., "--output", "-o", help="clusters.csv or .tsv: row, cluster, rank, text."
    ),
    threshold: float = Option(
        0.75, "--threshold", "-t", min=-1, max=1, help="Similarity within a cluster."
    ),
    min_size: int = Option(10, min=1, help="Minimum rows of a cluster."),
    method: str = Option(
        "communities", help="communities (around a central row) or components (chains)."
    ),
    show: int = Option(5, min=0, help="Number of the largest clusters to print."),
    vectors: options.Vectors = None,
    column: options.Column = None,
    model: options.Model = options.DEFAULT_MODEL,
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    file_format: options.Format = None,
    delimiter: options.Delimiter = None,
    no_header: options.NoHeader = False,
    on_error: options.OnError = "fail",
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Find clusters of similar rows.

    Communities are rows whose score with a central row is at least the threshold; components are rows
    connected by scores above it. Clusters and rows are numbered from 0, the largest cluster first; rank 1
    is the central row of a cluster. Rows in no cluster are not written.
    """
    if method not in ("communities", "components"):
        raise ValueError(f"unknown --method {method!r}; allowed are communities and components")
    check_table(output, force, ".csv", ".tsv")
    from onnxsim_embed.cli.graph_files import shorten
    from onnxsim_embed.files.tables import write_rows
    from onnxsim_embed.similarity.clustering import communities, component_groups

    started = time.perf_counter()
    source = TextFile(file, column, file_format, delimiter, no_header, on_error, quiet)
    texts = source.read()
    rows = source.rows
    find = communities if method == "communities" else component_groups
    groups = find(
        row_vectors(vectors, texts, model, precision, threads, quiet), threshold, min_size
    )
    members = [row for group in groups for row in group]
    columns: dict[str, Any] = {
        "row": [rows[row] for row in members],
        "cluster": [number for number, group in enumerate(groups) for _ in group],
        "rank": [rank for group in groups for rank in range(1, len(group) + 1)],
        "text": [texts[row] for row in members],
    }
    write_rows(columns, output)
    if not quiet:
        typer.echo(
            f"Found {len(groups):,} clusters of {len(members):,} of {len(texts):,} rows -> {output}, "
            f"in {time.perf_counter() - started:.2f} s."
        )
        for group in groups[:show]:
            typer.echo(f"{len(group):>7,} rows  {rows[group[0]]}: {shorten(texts[group[0]])}")
