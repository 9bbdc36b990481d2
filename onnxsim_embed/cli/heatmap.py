"""heatmap: a picture of the similarities of all rows."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import typer
from typer import Argument, Option

from onnxsim_embed.cli.inputs import Inputs, read_components, with_inputs
from onnxsim_embed.cli.output import counted
from onnxsim_embed.files.atomic import check_output


@with_inputs
def heatmap(
    inputs: Inputs,
    file: str = Argument(..., help="File of texts, or vectors: .npy or .parquet."),
    output: Path = Option(..., "--output", "-o", help="Picture to write: .png, .svg or .pdf."),
    order: bool = Option(False, "--order", help="Sort rows so that similar ones are adjacent."),
    limit: int | None = Option(None, "--limit", "-n", min=1, help="Draw the first N rows only."),
    title: str | None = Option(None, help="Title of the picture."),
    texts: str | None = Option(None, help="Texts of the vectors, one per row, as labels."),
) -> None:
    """Draw the similarities of all texts (or vectors) of a file.

    With at most 16 rows, cells show their values; beyond 60, only some rows are labelled.
    """
    from onnxsim_embed.cli.graph_files import HEATMAP_ROWS
    from onnxsim_embed.files.vectors import holds_vectors
    from onnxsim_embed.plot import check_format
    from onnxsim_embed.plot import heatmap as draw
    from onnxsim_embed.similarity.compare import cos_sim

    check_output(output, inputs.force)
    check_format(output)
    labels = vectors = None
    if holds_vectors(file):
        vectors = read_components(file)
        rows = len(vectors)
        if texts is not None:
            labels = inputs.open(texts).read(rows)
    else:
        if texts is not None:
            raise ValueError(f"--texts requires a file of vectors, and {file} holds texts")
        source = inputs.open(file)
        labels = list(
            islice(source, (limit or HEATMAP_ROWS) + 1)
        )  # one more shows that there are more
        source.print_problems()
        rows = len(labels)
    if not rows:
        raise ValueError(f"{file} holds no rows")
    if min(rows, limit or rows) > HEATMAP_ROWS:
        raise ValueError(
            f"a heatmap has at most {HEATMAP_ROWS:,} rows; draw the first with --limit {HEATMAP_ROWS}"
        )
    labels = None if labels is None else labels[:limit]
    vectors = inputs.encode(labels or []) if vectors is None else vectors[:limit]
    draw(cos_sim(vectors, vectors), output, labels=labels, title=title, order=order)
    if not inputs.quiet:
        typer.echo(f"Drew {counted(len(vectors), 'row')} -> {output}")
