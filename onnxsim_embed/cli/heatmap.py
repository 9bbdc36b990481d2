"""heatmap: a picture of the similarities of all rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import VectorInputs
from onnxsim_embed.cli.output import counted
from onnxsim_embed.files.atomic import check_output

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.cli.texts import Texts


def heatmap(
    inputs: VectorInputs,
    file: str = Argument(..., help="File of texts, or vectors: .npy or .parquet."),
    output: Path = Option(..., "--output", "-o", help="Picture to write: .png, .svg or .pdf."),
    order: bool = Option(False, "--order", help="Sort rows so that similar ones are adjacent."),
    limit: int | None = Option(None, "--limit", "-n", min=1, help="Draw the first N rows only."),
    title: str | None = Option(None, help="Title of the picture."),
    texts: options.OldTexts = None,
) -> None:
    """Draw the similarities of all texts (or vectors) of a file.

    Texts label the rows, or with --no-text their ids or numbers. With at most 16 rows, cells show their
    values; beyond 60, only some rows are labelled.
    """
    from onnxsim_embed.cli.graph_files import HEATMAP_ROWS, check_heatmap, draw_heatmap
    from onnxsim_embed.plot import check_format

    check_output(output, inputs.force)
    check_format(output)
    inputs, file = inputs.swapped(file, texts)

    def encode(source: Texts, texts: list[str]) -> npt.NDArray[Any]:
        check_heatmap(texts)
        return source.encode(texts)

    # One row more shows that there are more.
    vectors, labels, names, _ = inputs.read(file, limit or HEATMAP_ROWS + 1, encode)
    if not len(vectors):
        raise ValueError(f"{file} holds no rows")
    labels = None if inputs.no_text else labels
    draw_heatmap(vectors, labels, names, output, title=title, order=order)
    inputs.say(f"Drew {counted(len(vectors), 'row')} -> {output}")
