"""dedupe: a file without its near-duplicate rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import check_table, counted
from onnxsim_embed.cli.texts import TextFile, encode_texts, load
from onnxsim_embed.files.atomic import atomic_file

if TYPE_CHECKING:
    import numpy.typing as npt


def dedupe(
    file: str = Argument(..., help="csv, tsv, jsonl, parquet or txt (also .gz)."),
    output: Path = Option(
        ..., "--output", "-o", help="Rows kept: .csv, .tsv, .jsonl, .parquet or .txt."
    ),
    threshold: float = Option(
        0.95, "--threshold", "-t", min=-1, max=1, help="Drop rows with a score above it."
    ),
    groups: Path | None = Option(None, help="groups.csv or .tsv: row, kept, score, text."),
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
    """Remove near-duplicate rows of a file, keeping the first of each group."""
    check_table(output, force, ".csv", ".tsv", ".jsonl", ".parquet", ".txt")
    if file == "-":
        raise ValueError("dedupe reads a file twice and cannot read standard input")
    if groups is not None:
        check_table(groups, force, ".csv", ".tsv")
        if groups.absolute() == output.absolute():
            raise ValueError(f"{output} is the target of two outputs")
    from onnxsim_embed.cli.graph_files import digits
    from onnxsim_embed.files.tables import row_writer, write_rows
    from onnxsim_embed.similarity.clustering import deduplicate

    started = time.perf_counter()
    source = TextFile(file, column, file_format, delimiter, no_header, on_error, quiet)
    texts = source.read()
    write = row_writer(
        file, file_format, output.suffix[1:], len(texts), delimiter=delimiter, header=not no_header,
        skipped=source.report.skipped,
    )  # fmt: skip
    result = deduplicate(row_vectors(vectors, texts, model, precision, threads, quiet), threshold)
    with atomic_file(output) as work:
        write(work, result.kept)
    message = f"Kept {len(result.kept):,} of {len(texts):,} rows -> {output}"
    if groups is not None:
        members, numbers = result.groups(), source.rows
        rows = [int(row) for group in members for row in group]
        columns: dict[str, Any] = {
            "row": [numbers[row] for row in rows],
            "kept": [numbers[row] for row in result.first[rows]],
            "score": digits(result.scores[rows]),
            "text": [texts[row] for row in rows],
        }
        write_rows(columns, groups)
        message += f", {counted(len(members), 'group')} -> {groups}"
    if not quiet:
        typer.echo(f"{message}, in {time.perf_counter() - started:.2f} s.")


def row_vectors(
    path: Path | None,
    texts: list[str],
    model: str,
    precision: str,
    threads: int | None,
    quiet: bool,
) -> npt.NDArray[Any]:
    """Return the vectors of all rows, from a file or by encoding their texts."""
    if path is None:
        return encode_texts(load(model, precision, threads), texts, quiet)
    from onnxsim_embed.files.vectors import read_vectors

    vectors = read_vectors(path)
    if len(vectors) != len(texts):
        raise ValueError(f"{path} holds {len(vectors):,} vectors for {len(texts):,} rows")
    return vectors
