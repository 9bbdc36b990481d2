"""encode and similarity with --engine ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from onnxsim_embed.cli.output import on_terminal
from onnxsim_embed.cli.texts import counted

if TYPE_CHECKING:
    from onnxsim_embed.files.vector_directory import RowDiagnostic

# So many rows are named of those that have something to be said of them.
NAMED = 5


def reject_local_options(**options: object) -> None:
    """Refuse options that the engine does not take.

    :raises ValueError: naming the first that was given.
    """
    for name, value in options.items():
        if value not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} cannot be used with --engine ray")


def reject_ray_options(**options: object) -> None:
    """Refuse options that are for the engine only.

    :raises ValueError: naming the first that was given.
    """
    for name, value in options.items():
        if value not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} needs --engine ray")


def encode_on_ray(source: str, directory: str, model: str, *, quiet: bool, **options: Any) -> None:  # noqa: ANN401
    """Encode files on a cluster, and say what was done.

    :param options: of `onnxsim_embed.ray.encode_files`.
    """
    if source == "-":
        raise ValueError("--engine ray reads files, not standard input: its tasks run elsewhere")
    if Path(directory).suffix in (".npy", ".parquet"):
        raise ValueError(
            f"-o {directory}: --engine ray writes a directory: give a name without an ending"
        )
    from onnxsim_embed.files.uris import display_name
    from onnxsim_embed.ray import encode_files

    started = time.perf_counter()
    done = encode_files(
        source, directory, model, show_progress_bar=on_terminal() and not quiet, **options
    )
    seconds = time.perf_counter() - started
    _name_rows(done.remarks)
    if quiet:
        return
    vectors = done.vectors
    left_out = sum(not remark.encoded for remark in done.remarks)
    if done.rows_found:
        typer.echo(f"Found {counted(done.rows_found, 'row')} done.")
    if done.actors is not None:
        made = vectors.rows + left_out - done.rows_found
        typer.echo(
            f"Encoded {counted(made, 'row')} with {counted(done.actors.count, 'actor')} of "
            f"{counted(done.actors.threads, 'thread')}, in {seconds:.1f} s: {done.seconds:.1f} s of work "
            f"({made / max(done.seconds, 1e-9):,.0f} rows/s), the rest is the engine's and the models' start."
        )
    typer.echo(
        f"Wrote {display_name(directory)}: {vectors.rows:,} x {vectors.dim} float32 in {counted(len(vectors.shards), 'shard')}"
        + (
            f"; {counted(left_out, 'row')} without a usable text, in rejected.jsonl."
            if left_out
            else "."
        )
    )


def _name_rows(remarks: Sequence[RowDiagnostic]) -> None:
    for remark in remarks[:NAMED]:
        typer.echo(f"row {remark.id!r}: {remark.reason}", err=True)
    if len(remarks) > NAMED:
        typer.echo(f"and {counted(len(remarks) - NAMED, 'row')} more, in rejected.jsonl", err=True)


def compare_on_ray(vectors: str, directory: Path, *, quiet: bool, **options: Any) -> None:  # noqa: ANN401
    """Compare vectors on a cluster, and say what was done.

    :param options: of `onnxsim_embed.ray.write_graph`.
    """
    from onnxsim_embed.ray import write_graph

    started = time.perf_counter()
    graph = write_graph(
        vectors, directory, show_progress_bar=on_terminal() and not quiet, **options
    )
    if not quiet:
        what = f"scores, {graph.k} of each row" if graph.k else f"scores above {graph.threshold}"
        typer.echo(
            f"Compared {graph.rows:,} rows, {graph.nnz:,} {what} in {counted(len(graph.parts), 'part')} -> "
            f"{directory}, in {time.perf_counter() - started:.1f} s, the engine's start included."
        )
