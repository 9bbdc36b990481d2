"""heatmap: a picture of how close the rows of a file are to each other."""

from __future__ import annotations

from itertools import islice
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
from onnxsim_embed.cli.texts import counted, encode_texts, load, open_texts, read_labels
from onnxsim_embed.files.atomic import check_output


def heatmap(
    file: Annotated[
        str,
        typer.Argument(
            help="A file of texts, or vectors (.npy, or .parquet with a column vector)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf.")
    ],
    order: Annotated[
        bool, typer.Option("--order", help="Put similar rows side by side, so that groups show.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Draw the first so many rows.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="A line above the picture.")] = None,
    texts: Annotated[
        str | None, typer.Option("--texts", help="Texts of the vectors, as labels; one a row.")
    ] = None,
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    file_format: FormatOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the similarities of all texts (or vectors) of a file.

    Up to 16 rows have their values in the cells; beyond 60, only some have their texts beside them.
    """
    from onnxsim_embed.cli.graph_files import HEATMAP_ROWS
    from onnxsim_embed.files.vectors import holds_vectors, read_vectors
    from onnxsim_embed.plot import check_format
    from onnxsim_embed.plot import heatmap as draw
    from onnxsim_embed.similarity.compare import cos_sim

    check_output(output, force)
    check_format(output)
    most = (limit or HEATMAP_ROWS) + 1  # one more than fits tells that there are more
    if holds_vectors(file):
        vectors = read_vectors(file)
        labels = None
        if texts is not None:
            labels = read_labels(texts, column, file_format, vectors, file)
        _check_rows(len(vectors), limit, HEATMAP_ROWS, file)
        vectors = vectors[:limit]
    else:
        if texts is not None:
            raise ValueError(f"{file} holds texts already: leave out --texts, or give vectors")
        labels = list(islice(open_texts(file, column, file_format), most))
        _check_rows(len(labels), limit, HEATMAP_ROWS, file)
        labels = labels[:limit]
        vectors = encode_texts(load(model, precision, threads), labels, None, quiet)
    draw(
        cos_sim(vectors, vectors),
        output,
        labels=None if labels is None else labels[:limit],
        title=title,
        order=order,
    )
    if not quiet:
        typer.echo(f"Drew {counted(len(vectors), 'row')} -> {output}")


def _check_rows(rows: int, limit: int | None, most: int, file: str) -> None:
    if not rows:
        raise ValueError(f"{file} holds no rows")
    if min(rows, limit or rows) > most:
        raise ValueError(
            f"a heatmap takes at most {most:,} rows; draw the first ones with --limit {most}"
        )
