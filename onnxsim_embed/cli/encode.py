"""encode: the texts of a file to a file of vectors."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import typer
from typer import Argument, Context, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import Inputs
from onnxsim_embed.cli.output import check_table, counted, resumable
from onnxsim_embed.cli.texts import Counted, print_problems
from onnxsim_embed.files.atomic import check_output, write_json
from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
from onnxsim_embed.files.vectors import read_vectors, write_vectors

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.ray import EncodedFiles
    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.encode_to_file import EncodeResult
    from onnxsim_embed.runtime.options import OutputPrecision

# Texts, drawn from the whole file, whose vectors define the ranges of int8 and uint8.
RANGE_TEXTS = 10_000

NAMED_ROWS = 5  # rows with diagnostics that Ray's results print; rejected.jsonl lists them all


def encode(
    inputs: Inputs,
    context: Context,
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
        None,
        help="Quantization ranges of int8 and uint8: .npy (2, dim), min and max; default: those of "
        "10,000 texts, in a first pass.",
    ),
    save_ranges: Path | None = Option(None, help="Save the computed ranges, .npy."),
    truncate_dim: int | None = Option(None, help="Truncate vectors to N dimensions."),
    normalize: bool = Option(False, "--normalize", help="Scale each vector to L2 norm 1."),
    report: Path | None = Option(None, help="Write counts and the time of each stage, .json."),
    address: options.Address = None,
    strict: bool = Option(
        False, "--strict", help="With --engine ray: fail at a row without a usable text."
    ),
) -> None:
    """Encode the texts of a file.

    Files may be of any size. After an interruption, the same command continues. With --engine ray, FILE
    may also be a directory, a glob pattern or a URI, and the output is a directory or URI.
    """
    processing: dict[str, Any] = {
        "prompt_name": prompt_name,
        "normalize_embeddings": normalize,
        "truncate_dim": truncate_dim,
        **inputs.encoding,
    }
    numbers = dtype != "float32"
    if inputs.on_ray(dtype=numbers, ranges=ranges, save_ranges=save_ranges, report=report):
        on_error = _on_error(context, inputs.on_error, strict)
        _encode_on_ray(file, output, inputs, on_error, address=address, **processing)
        return
    if strict:
        raise ValueError("--strict requires --engine ray")
    from onnxsim_embed.runtime.encode_to_file import encode_to_file

    target = Path(output)
    checkpoint = EmbeddingCheckpoint(target)
    checkpoint.check_target(inputs.force)
    if inputs.id_column and target.suffix != ".parquet":
        raise ValueError(f"--id-column requires -o VECTORS.parquet: {target} cannot hold ids")
    if report is not None:
        _check_report(report, target, inputs.force)
    source = inputs.open(file)
    sampled = _check_ranges(file, dtype, ranges, save_ranges, inputs.force)
    texts = iter(source)
    embedder = inputs.load()
    total, sample = source.survey(RANGE_TEXTS if sampled else 0)
    processing["show_progress_bar"] = inputs.show_progress_bar
    limits = None if ranges is None else read_vectors(ranges)
    if sampled:
        limits = _save_ranges(embedder.encode(sample, **processing), save_ranges)
        counts = f"{len(sample):,} of {counted(total, 'text')}"
        inputs.say(f"Computed the quantization ranges from {counts}.")
    found: list[int] = []

    def on_rows(rows: int) -> None:
        if rows and not found:
            inputs.say(f"Found {counted(rows, 'row')} of an earlier run.")
        found.append(rows)

    with resumable(partial(_kept, checkpoint, found), inputs.force):
        result = encode_to_file(
            embedder,
            Counted(texts, total),
            target,
            precision=cast("OutputPrecision", dtype),
            ranges=limits,
            ids=source.report.ids if inputs.id_column else None,
            force=inputs.force,
            on_rows=on_rows,
            **processing,
        )
    print_problems(file, source.report, inputs.quiet)
    if report is not None:
        _write_report(result, embedder, report)
    if result.report.texts:
        inputs.print_encoded(embedder, result.report, source.rows[result.rows_found :])
    inputs.say(f"Wrote {target}: {result.rows:,} x {result.dim} {result.dtype}.")


def _kept(checkpoint: EmbeddingCheckpoint, found: list[int]) -> str:
    journal = checkpoint.read() if found else None
    return counted(journal["rows"], "row") if journal else ""


def _check_ranges(
    file: str, dtype: str, ranges: Path | None, target: Path | None, force: bool
) -> bool:
    """Return whether the quantization ranges are computed in a first pass, after checking the options."""
    from onnxsim_embed.runtime.options import RANGED, OutputPrecision

    if dtype not in (known := get_args(OutputPrecision)):
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {dtype!r}")
    sampled = dtype in RANGED and ranges is None
    if ranges is not None and dtype not in RANGED:
        raise ValueError(f"--ranges requires --dtype {' or '.join(RANGED)}, got {dtype!r}")
    if sampled and file == "-":
        raise ValueError(
            f"--dtype {dtype} requires --ranges where standard input is read: only once"
        )
    if target is not None:
        if not sampled:
            raise ValueError("--save-ranges requires --dtype int8 or uint8, and no --ranges")
        check_table(target, force, ".npy")
    return sampled


def _save_ranges(vectors: npt.NDArray[Any], path: Path | None) -> npt.NDArray[Any]:
    """Return minimum and maximum of each dimension, (2, dim), and save them."""
    if len(vectors) < 2:
        raise ValueError("quantization ranges require --ranges, or a file of at least 2 texts")
    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    if path is not None:
        write_vectors(ranges, path)
    return ranges


def _on_error(context: Context, on_error: str, strict: bool) -> str:
    """Return what happens to rows without a text on Ray, where the default is to skip them."""
    source = context.get_parameter_source("on_error")
    if source is None or source.name == "DEFAULT":
        return "fail" if strict else "skip"
    if strict and on_error != "fail":
        raise ValueError(f"--strict cannot be combined with --on-error {on_error}")
    return on_error


def _check_report(report: Path, output: Path, force: bool) -> None:
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
    del table["row_tokens"]
    write_json(path, table)


def _encode_on_ray(
    source: str,
    directory: str,
    inputs: Inputs,
    on_error: str,
    **processing: Any,  # noqa: ANN401
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
        force=inputs.force, show_progress_bar=inputs.show_progress_bar, **processing,
    )  # fmt: skip
    _print_encoded_on_ray(source, directory, result, time.perf_counter() - started, inputs)


def _print_encoded_on_ray(
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
