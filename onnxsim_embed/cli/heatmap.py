"""heatmap: a picture of the similarities of all rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import counted
from onnxsim_embed.cli.texts import TextFile, encode_texts, load
from onnxsim_embed.files.atomic import check_output


def heatmap(
    file: str = Argument(..., help="File of texts, or vectors: .npy or .parquet."),
    output: Path = Option(..., "--output", "-o", help="Picture to write: .png, .svg or .pdf."),
    order: bool = Option(False, "--order", help="Sort rows so that similar ones are adjacent."),
    limit: int | None = Option(None, "--limit", "-n", min=1, help="Draw the first N rows only."),
    title: str | None = Option(None, help="Title of the picture."),
    texts: str | None = Option(None, help="Texts of the vectors, one per row, as labels."),
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
    """Draw the similarities of all texts (or vectors) of a file.

    With at most 16 rows, cells show their values; beyond 60, only some rows are labelled.
    """
    from onnxsim_embed.cli.graph_files import HEATMAP_ROWS
    from onnxsim_embed.files.vectors import holds_vectors, read_vectors
    from onnxsim_embed.plot import check_format
    from onnxsim_embed.plot import heatmap as draw
    from onnxsim_embed.similarity.compare import cos_sim

    check_output(output, force)
    check_format(output)
    source = TextFile(file, column, file_format, delimiter, no_header, on_error, quiet)
    labels = vectors = None
    if holds_vectors(file):
        vectors = read_vectors(file)
        rows = len(vectors)
        if texts is not None:
            labels = replace(source, path=texts).read(rows)
    else:
        if texts is not None:
            raise ValueError(f"--texts requires a file of vectors, and {file} holds texts")
        most = (limit or HEATMAP_ROWS) + 1  # one more shows that the file has more
        labels = list(islice(source.open(), most))
        source.print_problems()
        rows = len(labels)
    if not rows:
        raise ValueError(f"{file} holds no rows")
    if min(rows, limit or rows) > HEATMAP_ROWS:
        raise ValueError(
            f"a heatmap has at most {HEATMAP_ROWS:,} rows; draw the first with --limit {HEATMAP_ROWS}"
        )
    labels = None if labels is None else labels[:limit]
    if vectors is None:
        vectors = encode_texts(load(model, precision, threads), labels or [], quiet)
    vectors = vectors[:limit]
    draw(cos_sim(vectors, vectors), output, labels=labels, title=title, order=order)
    if not quiet:
        typer.echo(f"Drew {counted(len(vectors), 'row')} -> {output}")
