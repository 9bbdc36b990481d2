"""dedupe: a file without its near-duplicate rows."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import Rows, VectorInputs
from onnxsim_embed.cli.output import check_table, counted
from onnxsim_embed.files.atomic import atomic_file


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
    report: Path | None = Option(
        None, help="report.csv or .tsv: each row dropped, the least similar to the kept one first."
    ),
    reference: str | None = Option(
        None, help="Texts or vectors: also drop rows similar to one of these, such as a test set."
    ),
    drop_unseen: options.DropUnseen = False,
    max_memory: options.MaxMemory = None,
) -> None:
    """Remove near-duplicate rows of a file, keeping the first of each group.

    The report names the row that stands for each dropped row, in the column kept, and the file of it.
    """
    check_table(output, inputs.force, ".csv", ".tsv", ".jsonl", ".parquet", ".txt")
    if file == "-":
        raise ValueError("dedupe reads a file twice and cannot read standard input")
    targets = {output.absolute()}
    for table in (groups, report):
        if table is not None:
            check_table(table, inputs.force, ".csv", ".tsv")
            if table.absolute() in targets:
                raise ValueError(f"{table} is the target of two outputs")
            targets.add(table.absolute())
    memory = options.parse_memory(max_memory)
    from onnxsim_embed.cli.graph_files import digits
    from onnxsim_embed.files.tables import row_writer, write_rows
    from onnxsim_embed.similarity.duplicates import deduplicate, unseen_rows

    started = time.perf_counter()
    source = inputs.open(file)
    texts = source.read()
    write = row_writer(
        file, inputs.kind, output.suffix[1:], len(texts), delimiter=inputs.delimiter,
        header=not inputs.no_header, skipped=source.report.skipped,
    )  # fmt: skip
    compared = source.vectors_to_group(texts, inputs.vectors)
    others = replace(inputs, vectors=None).read(reference) if reference is not None else None
    result = deduplicate(
        compared, threshold, texts=texts, drop_unseen=drop_unseen,
        reference=None if others is None else others.vectors, max_memory=memory,
    )  # fmt: skip
    with atomic_file(output) as work:
        write(work, result.kept)
    message = f"Kept {len(result.kept):,} of {counted(len(texts), 'row')} -> {output}"
    names = source.names
    if groups is not None:
        members = result.groups()
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
    if report is not None:
        keepers, rows, scores = result.dropped()
        own = Rows(compared, texts, names, source)
        sides = [others if others and result.first[row] < 0 else own for row in rows]
        kept = list(zip(sides, keepers, strict=True))
        columns = {
            "row": [names[row] for row in rows],
            "kept": [side.names[row] for side, row in kept],
            "file": [side.source.path for side in sides],
            "score": digits(scores),
        }
        if not inputs.no_text:
            columns["text"] = [texts[row] for row in rows]
            columns["kept_text"] = [side.texts[row] if side.texts else "" for side, row in kept]
        write_rows(columns, report)
        message += f", {counted(len(rows), 'dropped row')} -> {report}"
    unseen = unseen_rows(compared, texts)
    source.warn_unseen(unseen, drop_unseen)
    cut = [row for row in source.truncated if 0 <= result.first[row] != row]
    cut = [row for row in cut if texts[row] != texts[result.first[row]]]
    alike = "as duplicates of others up to the model's maximum length"
    source.warn(np.setdiff1d(cut, unseen), "dropped", alike)
    inputs.say(f"{message}, in {time.perf_counter() - started:.2f} s.")
