"""dedupe: a file without its near-duplicate rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import VectorInputs, with_inputs
from onnxsim_embed.cli.output import check_table, counted
from onnxsim_embed.files.atomic import atomic_file


@with_inputs
def dedupe(
    inputs: VectorInputs,
    file: str = Argument(..., help="csv, tsv, jsonl, parquet or txt (also .gz)."),
    output: Path = Option(
        ..., "--output", "-o", help="Rows kept: .csv, .tsv, .jsonl, .parquet or .txt."
    ),
    threshold: float = Option(
        0.95, "--threshold", "-t", min=-1, max=1, help="Drop rows with a score above it."
    ),
    groups: Path | None = Option(None, help="groups.csv or .tsv: row, kept, score, text."),
    drop_unseen: options.DropUnseen = False,
) -> None:
    """Remove near-duplicate rows of a file, keeping the first of each group."""
    check_table(output, inputs.force, ".csv", ".tsv", ".jsonl", ".parquet", ".txt")
    if file == "-":
        raise ValueError("dedupe reads a file twice and cannot read standard input")
    if groups is not None:
        check_table(groups, inputs.force, ".csv", ".tsv")
        if groups.absolute() == output.absolute():
            raise ValueError(f"{output} is the target of two outputs")
    from onnxsim_embed.cli.graph_files import digits
    from onnxsim_embed.files.tables import row_writer, write_rows
    from onnxsim_embed.similarity.clustering import deduplicate, unseen_rows

    started = time.perf_counter()
    source = inputs.open(file)
    texts = source.read()
    write = row_writer(
        file, inputs.kind, output.suffix[1:], len(texts), delimiter=inputs.delimiter,
        header=not inputs.no_header, skipped=source.report.skipped,
    )  # fmt: skip
    compared = source.vectors_to_group(texts, inputs.vectors)
    result = deduplicate(compared, threshold, texts=texts, drop_unseen=drop_unseen)
    with atomic_file(output) as work:
        write(work, result.kept)
    message = f"Kept {len(result.kept):,} of {counted(len(texts), 'row')} -> {output}"
    if groups is not None:
        members, names = result.groups(), source.names
        chosen = [row for group in members for row in group]
        columns: dict[str, Any] = {
            "row": [names[row] for row in chosen],
            "kept": [names[result.first[row]] for row in chosen],
            "score": digits(result.scores[[int(row) for row in chosen]]),
        }
        if not inputs.no_text:
            columns["text"] = [texts[row] for row in chosen]
        write_rows(columns, groups)
        message += f", {counted(len(members), 'group')} -> {groups}"
    unseen = unseen_rows(compared, texts)
    source.warn_unseen(unseen, drop_unseen)
    cut = [row for row in source.truncated if texts[row] != texts[result.first[row]]]
    alike = "as duplicates of others up to the model's maximum length"
    source.warn(np.setdiff1d(cut, unseen), "dropped", alike)
    if not inputs.quiet:
        typer.echo(f"{message}, in {time.perf_counter() - started:.2f} s.")
