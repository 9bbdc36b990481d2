"""encode: the texts of a file into a file of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxsim_embed.cli.options import (
    DEFAULT_MODEL,
    ColumnOption,
    ForceOption,
    FormatOption,
    ModelOption,
    PrecisionOption,
    QuietOption,
    ThreadsOption,
)
from onnxsim_embed.cli.output import check_output
from onnxsim_embed.cli.texts import encode_texts, load, read_texts


def encode(
    file: Annotated[
        str,
        typer.Argument(help="csv, tsv, jsonl, parquet or txt (also .gz); - for standard input."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="vectors.npy or vectors.parquet.")],
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    prompt_name: Annotated[
        str | None, typer.Option("--prompt-name", help="One of the model's prompts, e.g. query.")
    ] = None,
    file_format: FormatOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn the texts of a file into vectors."""
    from onnxsim_embed.tables import write_vectors

    if output.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{output}: vectors are written as .npy or .parquet")
    check_output(output, force)
    texts = read_texts(file, column, file_format)
    embedder = load(model, precision, threads)
    vectors = encode_texts(embedder, texts, prompt_name, quiet)
    write_vectors(vectors, output)
    if not quiet:
        typer.echo(f"Wrote {output}: {vectors.shape[0]:,} x {vectors.shape[1]} {vectors.dtype}.")
