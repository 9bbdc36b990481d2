"""encode and similarity with --engine ray."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from onnxsim_embed.cli.inputs import Inputs
from onnxsim_embed.cli.output import counted
from onnxsim_embed.cli.texts import print_problems

if TYPE_CHECKING:
    from onnxsim_embed.ray import EncodedFiles

NAMED_ROWS = 5  # rows with diagnostics that are printed; rejected.jsonl lists them all


def encode_on_ray(
    source: str,
    directory: str,
    inputs: Inputs,
    on_error: str,
    **options: Any,  # noqa: ANN401
) -> None:
    """Encode files on a cluster with `onnxsim_embed.ray.encode_files`, and print the result."""
    if source == "-":
        raise ValueError(
            "--engine ray cannot read standard input: its tasks run in other processes"
        )
    if Path(directory).suffix in (".npy", ".parquet"):
        raise ValueError(
            f"-o {directory}: --engine ray writes a directory: pass a name without a suffix"
        )
    from onnxsim_embed.ray import encode_files

    started = time.perf_counter()
    result = encode_files(
        source, directory, inputs.model, column=inputs.column, id_column=inputs.id_column,
        kind=inputs.kind, delimiter=inputs.delimiter, header=not inputs.no_header, on_error=on_error,
        precision=inputs.precision, max_seq_length=inputs.max_seq_length, actor_threads=inputs.threads,
        force=inputs.force, show_progress_bar=inputs.show_progress_bar, **options,
    )  # fmt: skip
    _print_encoded(source, directory, result, time.perf_counter() - started, inputs)


def _print_encoded(
    source: str, directory: str, result: EncodedFiles, seconds: float, inputs: Inputs
) -> None:
    from onnxsim_embed.files.uris import display_name

    for remark in result.remarks[:NAMED_ROWS]:
        typer.echo(f"row {remark.id!r}: {remark.reason}", err=True)
    if (more := len(result.remarks) - NAMED_ROWS) > 0:
        typer.echo(f"and {counted(more, 'row')} more, in rejected.jsonl", err=True)
    for name, report in islice(result.reports.items(), NAMED_ROWS):
        print_problems(name, report, inputs.quiet)
    for line in dict.fromkeys(report.describe() for report in result.reports.values()):
        inputs.say(f"Read {display_name(source)}: {line}.")
    vectors, actors = result.vectors, result.actors
    skipped = sum(not remark.encoded for remark in result.remarks)
    if result.rows_found:
        inputs.say(f"Found {counted(result.rows_found, 'row')} of an earlier run.")
    if actors is not None:
        encoded = vectors.rows + skipped - result.rows_found
        inputs.say(
            f"Encoded {counted(encoded, 'row')} with {counted(actors.count, 'actor')} of "
            f"{counted(actors.threads, 'thread')}, in {seconds:.1f} s: {result.seconds:.1f} s of encoding "
            f"({encoded / max(result.seconds, 1e-9):,.0f} rows/s), the rest is startup."
        )
    rejected = f"; {counted(skipped, 'row')} without a usable text, in rejected.jsonl"
    inputs.say(
        f"Wrote {display_name(directory)}: {vectors.rows:,} x {vectors.dim} float32 in "
        f"{counted(len(vectors.shards), 'shard')}{rejected if skipped else ''}."
    )


def compare_on_ray(vectors: str, directory: Path, inputs: Inputs, **options: Any) -> None:  # noqa: ANN401
    """Compare vectors on a cluster with `onnxsim_embed.ray.write_graph`, and print the result."""
    from onnxsim_embed.ray import write_graph

    started = time.perf_counter()
    graph = write_graph(
        vectors,
        directory,
        force=inputs.force,
        show_progress_bar=inputs.show_progress_bar,
        **options,
    )
    what = f"scores, top {graph.k} of each row" if graph.k else f"scores above {graph.threshold}"
    inputs.say(
        f"Compared {graph.rows:,} rows, {graph.nnz:,} {what} in "
        f"{counted(len(graph.parts), 'shard')} -> {directory}, in "
        f"{time.perf_counter() - started:.1f} s including startup."
    )
