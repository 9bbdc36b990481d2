"""encode: the texts of a file into a file of vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from onnxsim_embed.cli.options import (
    DEFAULT_MODEL,
    AddressOption,
    ColumnOption,
    EngineOption,
    FormatOption,
    ModelOption,
    PrecisionOption,
    QuietOption,
    ThreadsOption,
    on_ray,
)
from onnxsim_embed.cli.output import on_terminal
from onnxsim_embed.cli.ray import encode_on_ray, reject_local_options, reject_ray_options
from onnxsim_embed.cli.texts import counted, load, open_texts, print_report
from onnxsim_embed.errors import OnnxsimEmbedError, TableError
from onnxsim_embed.files.atomic import atomic_file, check_output

if TYPE_CHECKING:
    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.encode_to_file import EncodeResult
    from onnxsim_embed.runtime.options import OutputPrecision


def encode(
    file: Annotated[
        str,
        typer.Argument(
            help="csv, tsv, jsonl, parquet or txt (also .gz); - for standard input. With --engine ray also a directory, a pattern or a URI."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="vectors.npy or vectors.parquet. With --engine ray a directory or URI.",
        ),
    ],
    column: ColumnOption = None,
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or openvino.")
    ] = "auto",
    max_seq_length: Annotated[
        int | None,
        typer.Option("--max-seq-length", help="Tokens kept of a text; default: the model's own."),
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option("--prompt-name", help="One of the model's prompts, e.g. query.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Number format: float32, float16, int8, uint8, binary or ubinary."
        ),
    ] = "float32",
    ranges: Annotated[
        Path | None,
        typer.Option(
            "--ranges",
            help="For --dtype int8 and uint8: .npy (2, dim), smallest and largest value of each component.",
        ),
    ] = None,
    truncate_dim: Annotated[
        int | None, typer.Option("--truncate-dim", help="Keep the first so many components.")
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale each vector to L2 norm 1.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write what this run did and how long each stage took, .json."
        ),
    ] = None,
    file_format: FormatOption = None,
    engine: EngineOption = None,
    address: AddressOption = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            "--id-column",
            help="With --engine ray: names of the rows; default: their numbers, from 0.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="With --engine ray: stop at a row without a usable text, instead of reporting it.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start over, and replace outputs that exist.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Turn the texts of a file into vectors.

    Files may be of any size. After a stop, the same command does the rest.
    """
    if on_ray(engine):
        reject_local_options(
            device=device not in ("auto", "cpu"),
            dtype=dtype != "float32",
            ranges=ranges,
            report=report,
        )
        encode_on_ray(
            file,
            output,
            model,
            column=column,
            id_column=id_column,
            kind=file_format,
            precision=precision,
            prompt_name=prompt_name,
            max_seq_length=max_seq_length,
            normalize_embeddings=normalize,
            truncate_dim=truncate_dim,
            on_error="raise" if strict else "skip",
            actor_threads=threads,
            address=address,
            force=force,
            quiet=quiet,
        )
        return
    reject_ray_options(id_column=id_column, strict=strict)
    target = Path(output)
    from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
    from onnxsim_embed.files.vectors import read_vectors
    from onnxsim_embed.runtime.encode_to_file import check_format, encode_to_file

    EmbeddingCheckpoint(target).check_target(force)
    if report is not None:
        _check_report(report, target, force)
    check_format(dtype, ranges is not None)
    limits = None if ranges is None else read_vectors(ranges)
    texts = open_texts(file, column, file_format)
    embedder = load(model, precision, threads, device)
    if max_seq_length is not None:
        embedder.max_seq_length = max_seq_length
    with _naming_kept_rows(force, quiet) as on_rows:
        result = encode_to_file(
            embedder,
            texts,
            target,
            prompt_name=prompt_name,
            show_progress_bar=on_terminal() and not quiet,
            precision=cast("OutputPrecision", dtype),
            ranges=limits,
            normalize_embeddings=normalize,
            truncate_dim=truncate_dim,
            force=force,
            on_rows=on_rows,
        )
    if report is not None:
        _write_report(result, embedder, report)
    if not quiet:
        if result.report.texts:
            print_report(embedder, result.report)
        typer.echo(f"Wrote {target}: {result.rows:,} x {result.dim} {result.dtype}.")


@contextmanager
def _naming_kept_rows(force: bool, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that learns how many rows are kept; say so at the start and where a job stops."""
    kept: list[int] = []

    def learn(rows: int) -> None:
        if rows and not kept and not quiet:
            typer.echo(f"Found {counted(rows, 'row')} done.")
        kept[:] = [rows]

    def note() -> str:
        if not any(kept):
            return ""
        verb = "is" if kept == [1] else "are"
        command = "the same command without --force" if force else "the same command"
        return f"; {counted(kept[0], 'row')} {verb} kept, and {command} does the rest"

    try:
        yield learn
    except KeyboardInterrupt:
        typer.echo(f"onnxsim-embed: interrupted{note()}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, MemoryError, OnnxsimEmbedError) as error:
        if not any(kept):
            raise
        raise TableError(f"{str(error) or type(error).__name__}{note()}") from error


def _check_report(report: Path, output: Path, force: bool) -> None:
    from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
    from onnxsim_embed.files.provenance import sidecar

    if report.absolute() in (output.absolute(), sidecar(output.absolute())):
        raise ValueError(f"{report} is named for two outputs")
    # Where rows are kept, --force would drop them: a report of the earlier run is replaced unasked.
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
    with atomic_file(path) as work:
        work.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
