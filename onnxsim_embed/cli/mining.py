"""dedupe and cluster: the rows of a file that say the same, and those that belong together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from onnxsim_embed.cli.texts import counted, encode_texts, load, read_texts
from onnxsim_embed.files.atomic import atomic_file, check_output

if TYPE_CHECKING:
    import numpy.typing as npt

VectorsOption = Annotated[
    Path | None,
    typer.Option(
        "--vectors", help="Vectors of the rows, .npy or .parquet; default: the texts are encoded."
    ),
]


def dedupe(
    file: Annotated[str, typer.Argument(help="csv, tsv, jsonl, parquet or txt (also .gz).")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Rows that stay: .csv, .tsv, .jsonl, .parquet or .txt."
        ),
    ],
    threshold: Annotated[
        float,
        typer.Option("--threshold", "-t", min=-1.0, max=1.0, help="Drop rows strictly above."),
    ] = 0.95,
    groups: Annotated[
        Path | None, typer.Option("--groups", help="groups.csv or .tsv: row, kept, score, text.")
    ] = None,
    vectors: VectorsOption = None,
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    file_format: FormatOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the rows of a file without those that say the same as an earlier row that stays."""
    if output.suffix not in (".csv", ".tsv", ".jsonl", ".parquet", ".txt"):
        raise ValueError(f"{output}: rows are written as .csv, .tsv, .jsonl, .parquet or .txt")
    if file == "-":
        raise ValueError("dedupe reads a file twice, so it does not take standard input")
    check_output(output, force)
    if groups is not None:
        _check_table(groups, force, "groups")
        if groups.absolute() == output.absolute():
            raise ValueError(f"{output} is named for two outputs")
    started = time.perf_counter()
    texts = read_texts(file, column, file_format)
    from onnxsim_embed.files.tables import row_writer

    write = row_writer(file, file_format, output.suffix[1:], len(texts))
    found_vectors = _vectors(vectors, texts, model, precision, threads, quiet)
    import numpy as np

    from onnxsim_embed.cli.graph_files import digits
    from onnxsim_embed.files.texts import write_rows
    from onnxsim_embed.similarity.clustering import deduplicate

    found = deduplicate(found_vectors, threshold)
    together = found.groups()
    with atomic_file(output) as work:
        write(work, found.kept)
    said = f"Kept {len(found.kept):,} of {len(texts):,} rows -> {output}"
    if groups is not None:
        rows = np.concatenate([np.zeros(0, np.int64), *together])
        columns: dict[str, Any] = {
            "row": rows,
            "kept": found.first[rows],
            "score": digits(found.scores[rows]),
            "text": [texts[row] for row in rows],
        }
        write_rows(columns, groups)
        said += f", {counted(len(together), 'group')} -> {groups}"
    if not quiet:
        typer.echo(f"{said}, in {time.perf_counter() - started:.2f} s.")


def cluster(
    file: Annotated[
        str,
        typer.Argument(help="csv, tsv, jsonl, parquet or txt (also .gz); - for standard input."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="clusters.csv or .tsv: row, cluster, rank, text.")
    ],
    threshold: Annotated[
        float,
        typer.Option("--threshold", "-t", min=-1.0, max=1.0, help="How close rows must be."),
    ] = 0.75,
    min_size: Annotated[
        int, typer.Option("--min-size", min=1, help="Least rows of a cluster.")
    ] = 10,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="communities: around central rows. components: chains of close rows."
        ),
    ] = "communities",
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print so many of the largest clusters.")
    ] = 5,
    vectors: VectorsOption = None,
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    file_format: FormatOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the clusters of a file's rows.

    Communities are rows whose score with a central row is at least the threshold; components are rows
    that chains of scores strictly above it connect. Clusters and rows are numbered from 0, the largest
    cluster first; rank 1 is a cluster's central row. Rows in no cluster are not written.
    """
    if method not in ("communities", "components"):
        raise ValueError(f"--method is communities or components, got {method!r}")
    _check_table(output, force, "clusters")
    started = time.perf_counter()
    texts = read_texts(file, column, file_format)
    found_vectors = _vectors(vectors, texts, model, precision, threads, quiet)
    import numpy as np

    from onnxsim_embed.cli.graph_files import shorten
    from onnxsim_embed.files.texts import write_rows
    from onnxsim_embed.similarity.clustering import communities, component_groups

    find = communities if method == "communities" else component_groups
    found = find(found_vectors, threshold, min_size)
    rows = np.concatenate([np.zeros(0, np.int64), *found])
    columns: dict[str, Any] = {
        "row": rows,
        "cluster": [number for number, group in enumerate(found) for _ in group],
        "rank": [rank for group in found for rank in range(1, len(group) + 1)],
        "text": [texts[row] for row in rows],
    }
    write_rows(columns, output)
    said = f"Found {len(found):,} clusters of {len(rows):,} of {len(texts):,} rows -> {output}"
    if not quiet:
        typer.echo(f"{said}, in {time.perf_counter() - started:.2f} s.")
        for group in found[:show]:
            typer.echo(f"{len(group):>7,} rows  {group[0]}: {shorten(texts[group[0]])}")


def _check_table(path: Path, force: bool, what: str) -> None:
    if path.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path}: {what} are written as .csv or .tsv")
    check_output(path, force)


def _vectors(
    path: Path | None,
    texts: list[str],
    model: str,
    precision: str,
    threads: int | None,
    quiet: bool,
) -> npt.NDArray[Any]:
    if path is None:
        return encode_texts(load(model, precision, threads), texts, None, quiet)
    from onnxsim_embed.files.vectors import read_vectors

    vectors = read_vectors(path)
    if len(vectors) != len(texts):
        raise ValueError(f"{path} holds {len(vectors):,} vectors for {len(texts):,} rows")
    return vectors
