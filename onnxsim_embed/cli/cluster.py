"""cluster: groups of similar rows."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import VectorInputs
from onnxsim_embed.cli.output import check_table, counted


def cluster(
    inputs: VectorInputs,
    file: str = Argument(..., help="csv, tsv, jsonl, parquet or txt (also .gz); - for stdin."),
    output: Path = Option(
        ..., "--output", "-o", help="clusters.csv or .tsv: row, cluster, rank, least, text."
    ),
    threshold: float = Option(
        0.75, "--threshold", "-t", min=-1, max=1, help="Similarity within a cluster."
    ),
    min_size: int = Option(10, min=1, help="Minimum rows of a cluster."),
    method: str = Option(
        "communities", help="communities (around a central row) or components (chains)."
    ),
    show: int = Option(5, min=0, help="Number of the largest clusters to print."),
    drop_unseen: options.DropUnseen = False,
) -> None:
    """Find clusters of similar rows.

    Communities are rows whose score with a central row is at least the threshold; components are rows
    connected by scores above it. Clusters and rows are numbered from 0, the largest cluster first; rank 1
    is the central row of a cluster; least is the least score of two of its rows. Rows in no cluster are
    not written.
    """
    if method not in ("communities", "components"):
        raise ValueError(f"unknown --method {method!r}; allowed are communities and components")
    check_table(output, inputs.force, ".csv", ".tsv")
    from onnxsim_embed.cli.graph_files import digits, shorten
    from onnxsim_embed.files.tables import write_rows
    from onnxsim_embed.similarity.clustering import (
        communities,
        component_groups,
        least_similarities,
    )
    from onnxsim_embed.similarity.duplicates import unseen_rows

    started = time.perf_counter()
    source = inputs.open(file)
    texts = source.read()
    names, compared = source.names, source.vectors_to_group(texts, inputs.vectors)
    unseen = unseen_rows(compared, texts)
    source.warn_unseen(unseen, drop_unseen)
    seen = np.arange(len(texts))
    if drop_unseen:
        seen = np.delete(seen, unseen)
    find = communities if method == "communities" else component_groups
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = [seen[group] for group in find(compared[seen], threshold, min_size)]
    for warning in caught:
        typer.echo(f"{file}: {warning.message}.", err=True)
    least = digits(least_similarities(compared, groups))
    members = [row for group in groups for row in group]
    columns: dict[str, Any] = {
        "row": [names[row] for row in members],
        "cluster": [number for number, group in enumerate(groups) for _ in group],
        "rank": [rank for group in groups for rank in range(1, len(group) + 1)],
        "least": [score for group, score in zip(groups, least, strict=True) for _ in group],
    }
    if not inputs.no_text:
        columns["text"] = [texts[row] for row in members]
    write_rows(columns, output)
    inputs.say(
        f"Found {counted(len(groups), 'cluster')} of {len(members):,} of "
        f"{counted(len(texts), 'row')} -> {output}, in {time.perf_counter() - started:.2f} s."
    )
    for group, score in zip(groups[:show], least, strict=False):
        text = shorten(texts[group[0]])
        size = counted(len(group), "row")
        inputs.say(f"{size:>12}  {float(score):.2f}  {names[group[0]]}: {text}")
