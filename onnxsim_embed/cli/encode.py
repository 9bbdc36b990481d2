"""encode: the texts of a file to a file of vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import Inputs, with_inputs
from onnxsim_embed.cli.output import counted
from onnxsim_embed.cli.ray import encode_on_ray
from onnxsim_embed.files.atomic import check_output, write_json

if TYPE_CHECKING:
    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.encode_to_file import EncodeResult
    from onnxsim_embed.runtime.options import OutputPrecision


@with_inputs
def encode(
    inputs: Inputs,
    file: str = Argument(
        ..., help="csv, tsv, jsonl, parquet or txt (also .gz); - for standard input."
    ),
    output: str = Option(
        ..., "--output", "-o", help="vectors.npy or .parquet; a directory with --engine ray."
    ),
    prompt_name: str | None = Option(None, help="A prompt of the model, e.g. query."),
    dtype: str = Option(
        "float32", help="Output: float32, float16, int8, uint8, binary or ubinary."
    ),
    ranges: Path | None = Option(
        None, help="Quantization ranges of int8 and uint8: .npy (2, dim), min and max."
    ),
    truncate_dim: int | None = Option(None, help="Truncate vectors to N dimensions."),
    normalize: bool = Option(False, "--normalize", help="Scale each vector to L2 norm 1."),
    report: Path | None = Option(None, help="Write counts and the time of each stage, .json."),
    engine: options.Engine = None,
    address: options.Address = None,
    strict: bool = Option(
        False, "--strict", help="With --engine ray: fail at a row without a usable text."
    ),
    force: bool = Option(False, "--force", help="Start over, and replace existing outputs."),
) -> None:
    """Encode the texts of a file.

    Files may be of any size. After an interruption, the same command continues. With --engine ray, FILE
    may also be a directory, a glob pattern or a URI, and the output is a directory or URI.
    """
    if options.on_ray(
        engine,
        {"strict": strict},
        {"dtype": dtype != "float32", "ranges": ranges, "report": report, **inputs.local},
    ):
        encode_on_ray(
            file,
            output,
            inputs,
            id_column=inputs.id_column,
            prompt_name=prompt_name,
            max_seq_length=inputs.max_seq_length,
            normalize_embeddings=normalize,
            truncate_dim=truncate_dim,
            on_error="raise" if strict else "skip",
            address=address,
        )
        return
    from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
    from onnxsim_embed.files.vectors import read_vectors
    from onnxsim_embed.runtime.encode_to_file import check_format, encode_to_file

    target = Path(output)
    EmbeddingCheckpoint(target).check_target(inputs.force)
    if inputs.id_column and target.suffix != ".parquet":
        raise ValueError(f"--id-column requires -o VECTORS.parquet: {target} cannot hold ids")
    if report is not None:
        _check_report(report, target, inputs.force)
    check_format(dtype, ranges is not None)
    limits = None if ranges is None else read_vectors(ranges)
    source = inputs.open(file)
    texts = iter(source)
    embedder = inputs.load()
    with _resumable(inputs.force, inputs.quiet) as on_rows:
        result = encode_to_file(
            embedder,
            texts,
            target,
            prompt_name=prompt_name,
            show_progress_bar=inputs.show_progress_bar,
            precision=cast("OutputPrecision", dtype),
            ranges=limits,
            normalize_embeddings=normalize,
            truncate_dim=truncate_dim,
            ids=source.report.ids if inputs.id_column else None,
            force=inputs.force,
            on_rows=on_rows,
        )
    source.print_problems()
    if report is not None:
        _write_report(result, embedder, report)
    if not inputs.quiet:
        if result.report.texts:
            inputs.print_encoded(embedder, result.report, source.rows[result.rows_found :])
        typer.echo(f"Wrote {target}: {result.rows:,} x {result.dim} {result.dtype}.")


@contextmanager
def _resumable(force: bool, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a callback for the number of rows on disk; failures say how many are kept."""
    rows: int | None = None

    def on_rows(number: int) -> None:
        nonlocal rows
        if number and rows is None and not quiet:
            typer.echo(f"Found {counted(number, 'row')} of an earlier run.")
        rows = number

    def hint() -> str:
        command = "the same command without --force" if force else "the same command"
        return f"; {counted(rows, 'row')} kept: {command} continues" if rows else ""

    try:
        yield on_rows
    except KeyboardInterrupt:
        typer.echo(f"onnxsim-embed: interrupted{hint()}", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        vars(error)["hint"] = hint()
        raise


def _check_report(report: Path, output: Path, force: bool) -> None:
    from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
    from onnxsim_embed.files.provenance import sidecar

    if report.absolute() in (output.absolute(), sidecar(output.absolute())):
        raise ValueError(f"{report} is the target of two outputs")
    # A run that continues replaces the report of the earlier one; --force would drop its rows.
    check_output(report, force or EmbeddingCheckpoint(output).read() is not None)


def _write_report(result: EncodeResult, embedder: Embedder, path: Path) -> None:
    table = asdict(result.report) | {
        "texts_per_second": result.report.texts_per_second,
        "tokens_per_second": result.report.tokens_per_second,
        "precision": embedder.precision,
        "dtype": str(result.dtype),
        "rows": result.rows,
        "rows_found": result.rows_found,
    }
    write_json(path, table)
