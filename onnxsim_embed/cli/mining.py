"""dedupe and cluster: the rows of a file that say the same, and those that belong together."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
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
from onnxsim_embed.cli.output import check_output
from onnxsim_embed.cli.texts import counted, encode_texts, load, read_texts
from onnxsim_embed.errors import OnnxsimEmbedError

if TYPE_CHECKING:
    import numpy as np
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
    write = _row_writer(file, file_format, output.suffix[1:], len(texts))
    found_vectors = _vectors(vectors, texts, model, precision, threads, quiet)
    import numpy as np

    from onnxsim_embed.artifact import atomic_file
    from onnxsim_embed.mining import deduplicate
    from onnxsim_embed.tables import write_rows

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
            "score": [np.format_float_positional(score, trim="0") for score in found.scores[rows]],
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

    from onnxsim_embed.mining import communities, component_groups
    from onnxsim_embed.tables import write_rows

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
            typer.echo(f"{len(group):>7,} rows  {group[0]}: {_short(texts[group[0]])}")


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
    from onnxsim_embed.vector_files import read_vectors

    vectors = read_vectors(path)
    if len(vectors) != len(texts):
        raise ValueError(f"{path} holds {len(vectors):,} vectors for {len(texts):,} rows")
    return vectors


def _short(text: str) -> str:
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _row_writer(file: str, kind: str | None, target: str, expected: int) -> Callable[..., None]:
    """Read all rows of a file; return a function of a path and an array of rows that writes these.

    :param kind: csv, tsv, jsonl, parquet or txt; None: by the file's ending.
    :param target: the kind to write.
    :param expected: rows that the file is known to have.
    :raises ValueError: if a file of that kind cannot hold the rows.
    """
    from onnxsim_embed.tables import kind_of

    kind = kind or kind_of(file)
    if target == "parquet":
        table = _arrow_table(file, kind)
        from pyarrow import parquet

        return lambda path, kept: parquet.write_table(table.take(kept), path)
    names, rows, lines = _read_rows(file, kind)
    if len(rows) != expected:
        raise OnnxsimEmbedError(f"{file} has changed: {expected:,} rows, then {len(rows):,}")
    if target in ("jsonl", "txt") and target != kind:
        lines = _as_lines(file, names, rows, target)

    def write(path: Path, kept: npt.NDArray[np.int64]) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            if target in ("jsonl", "txt"):
                stream.writelines(f"{lines[row]}\n" for row in kept)
                return
            delimiter = "\t" if target == "tsv" else ","
            writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
            writer.writerow(names)
            writer.writerows([_cell(value) for value in rows[row]] for row in kept)

    return write


def _read_rows(file: str, kind: str) -> tuple[list[str], list[list[Any]], list[str]]:
    """Return the names of columns, the cells of each row, and each row's line where it has one."""
    if kind == "parquet":
        table = _arrow_table(file, kind)
        columns = [column.to_pylist() for column in table.columns]
        return table.column_names, [list(row) for row in zip(*columns, strict=True)], []
    from onnxsim_embed.tables import LONGEST_CELL, open_text

    with open_text(file) as stream:
        if kind in ("csv", "tsv"):
            old = csv.field_size_limit(LONGEST_CELL)
            try:
                reader = csv.reader(stream, delimiter="\t" if kind == "tsv" else ",", strict=True)
                names, *rows = [row for row in reader if row]
            finally:
                csv.field_size_limit(old)
            return names, [row + [""] * (len(names) - len(row)) for row in rows], []
        lines = [line.rstrip("\r\n") for line in stream]
    if kind == "txt":
        return ["text"], [[line] for line in lines], lines
    lines = [line for line in lines if line.strip()]
    values = [json.loads(line) for line in lines]
    tables = [value if isinstance(value, dict) else {"text": value} for value in values]
    names = list(dict.fromkeys(name for table in tables for name in table))
    return names, [[table.get(name) for name in names] for table in tables], lines


def _arrow_table(file: str, kind: str) -> Any:  # noqa: ANN401 - pyarrow is untyped
    from onnxsim_embed.tables import require_pyarrow

    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    if kind == "parquet":
        return parquet.read_table(file)
    names, rows, _ = _read_rows(file, kind)
    _check_names(file, names)
    try:
        return pyarrow.table([list(cells) for cells in zip(*rows, strict=True)], names=names)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} has a column of several types ({error}); write .jsonl") from None


def _as_lines(file: str, names: list[str], rows: list[list[Any]], target: str) -> list[str]:
    if target == "jsonl":
        _check_names(file, names)
        tables = [dict(zip(names, row, strict=True)) for row in rows]
        return [json.dumps(table, ensure_ascii=False, default=str) for table in tables]
    lines = [_cell(row[0]) for row in rows]
    if len(names) > 1 or any(character in line for line in lines for character in "\r\n"):
        raise ValueError(f"{file} has several columns or texts of several lines; write .csv")
    return lines


def _check_names(file: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{file} has two columns of one name; write .csv")


def _cell(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, (dict, list, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)
