"""similarity: all texts or vectors of a file with each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxsim_embed.artifact import check_output
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
from onnxsim_embed.cli.texts import encode_texts, load, read_texts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def similarity(
    file: Annotated[
        str,
        typer.Argument(
            help="A file of texts, or vectors (.npy, or .parquet with a column vector)."
        ),
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="matrix.npz: sparse, all scores above --threshold. neighbours.csv: needs --top-k. May be given twice.",
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option("--threshold", "-t", min=-1.0, max=1.0, help="Keep scores strictly above."),
    ] = 0.5,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", "-k", min=1, help="Closest rows of each row, for -o neighbours.csv."
        ),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Every pair above --threshold, best first, .csv.")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Picture of all scores, .png, .svg or .pdf.")
    ] = None,
    show: Annotated[
        int | None,
        typer.Option(
            "--show", min=0, help="Print so many of the closest pairs; 10 if nothing is written."
        ),
    ] = None,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates",
            help="Only the first of equal texts (or vectors) takes part; rows keep their numbers.",
        ),
    ] = False,
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    file_format: FormatOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare all texts (or vectors) of a file with each other, exactly."""
    matrix_file, neighbours_file = _similarity_outputs(output or [], top_k)
    outputs = [path for path in (matrix_file, neighbours_file, pairs, heatmap) if path is not None]
    _check_similarity_outputs(outputs, pairs, heatmap, force)
    started = time.perf_counter()
    texts, vectors = _texts_and_vectors(file, column, file_format, model, precision, threads, quiet)
    from onnxsim_embed.graph_files import SimilarityJob

    kept = _first_of_equals(texts if texts is not None else vectors) if drop_duplicates else None
    job = SimilarityJob(vectors if kept is None else vectors[kept], texts, kept, len(vectors))
    said = [f"Compared {len(job.vectors):,} rows"]
    if kept is not None:
        said[0] += f" ({len(vectors) - len(kept):,} duplicates left out)"
    if matrix_file is not None:
        said.append(
            f"{job.write_matrix(matrix_file, threshold):,} scores above {threshold} -> {matrix_file}"
        )
    if neighbours_file is not None and top_k is not None:
        job.write_neighbours(neighbours_file, top_k)
        said.append(f"{top_k} neighbours each -> {neighbours_file}")
    if pairs is not None:
        said.append(f"{job.write_pairs(pairs, threshold):,} pairs above {threshold} -> {pairs}")
    if heatmap is not None:
        job.draw(heatmap)
        said.append(f"heatmap -> {heatmap}")
    closest = list(job.closest(show if show is not None else (0 if outputs else 10)))
    if not quiet:
        typer.echo(", ".join(said) + f", in {time.perf_counter() - started:.2f} s.")
    for line in closest:
        typer.echo(line)


def _check_similarity_outputs(
    outputs: list[Path], pairs: Path | None, heatmap: Path | None, force: bool
) -> None:
    """Refuse, before any work, what could not be written after it."""
    for path in outputs:
        check_output(path, force)
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"{outputs[-1]} is named for two outputs")
    if pairs is not None and pairs.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{pairs}: pairs are written as .csv or .tsv")
    if heatmap is not None:
        from onnxsim_embed.plot import check_format

        check_format(heatmap)


def _similarity_outputs(outputs: list[Path], top_k: int | None) -> tuple[Path | None, Path | None]:
    by_kind: dict[str, Path] = {}
    for path in outputs:
        kind = {".npz": "matrix", ".csv": "neighbours", ".tsv": "neighbours"}.get(path.suffix)
        if kind is None or kind in by_kind:
            raise ValueError(
                f"-o {path}: takes one .npz (matrix) and one .csv or .tsv (neighbours)"
            )
        by_kind[kind] = path
    if ("neighbours" in by_kind) != (top_k is not None):
        raise ValueError("neighbours need both: --top-k K and -o neighbours.csv")
    return by_kind.get("matrix"), by_kind.get("neighbours")


def _texts_and_vectors(
    file: str,
    column: str | None,
    kind: str | None,
    model: str,
    precision: str,
    threads: int | None,
    quiet: bool,
) -> tuple[list[str] | None, npt.NDArray[Any]]:
    from onnxsim_embed.vector_files import holds_vectors, read_vectors

    if holds_vectors(file, column):
        return None, read_vectors(file, column)
    texts = read_texts(file, column, kind)
    return texts, encode_texts(load(model, precision, threads), texts, None, quiet)


def _first_of_equals(rows: list[str] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    import numpy as np

    keys = rows if isinstance(rows, list) else [row.tobytes() for row in rows]
    return np.fromiter(
        sorted({key: i for i, key in reversed(list(enumerate(keys)))}.values()), np.int64
    )
