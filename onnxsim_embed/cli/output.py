"""What commands print."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from onnxsim_embed.errors import OnnxsimEmbedError, install_command

if TYPE_CHECKING:
    from onnxsim_embed.artifact.manifest import Manifest

# How the fp32 file of an artifact was made, by the manifest's word for it.
WAYS = {
    "direct": "directly: the ONNX graph is built from the weights",
    "torch": "traced from PyTorch by torch.onnx",
    "optimum": "traced from PyTorch by optimum",
    "adopted": "adopted: the source's own ONNX file, verified and copied",
}


# What the columns of tables mean, for --help.
SCORES = (
    "accuracy@1: fraction of queries whose own target is nearest; MRR@10, NDCG@10: the same, with "
    "credit for lower ranks up to 10. Spearman and Pearson: correlation with human scores, times 100."
)
MEASURES = (
    "Columns: the cosine of each text's vector with that of the reference, at worst (min cosine), for the "
    "1st percentile and on average; Spearman of pairs: rank correlation of the scores of all pairs; top-10 "
    "overlap: shared nearest neighbours; batch-variant: texts whose vector depends on their batch."
)

PHRASES = {  # of library errors whose option is not named like the argument
    "header=False": "--no-header",
    "pass one as column": "choose one with --column",
    "pass column": "pass --column",
    "onnxsim_embed.export.export_model": "onnxsim-embed export",
}


def on_terminal() -> bool:
    """Return whether standard error, where progress bars are drawn, is a terminal."""
    return sys.stderr.isatty()


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: "1 text", "2,000 texts", "3 queries"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


@contextmanager
def resumable(kept: Callable[[], str], force: bool) -> Iterator[None]:
    """Let failures and interruptions say what is kept, if anything is, and that the same command continues."""

    def hint() -> str:
        with suppress(OnnxsimEmbedError):  # of a damaged checkpoint
            if finished := kept():
                command = "the same command without --force" if force else "the same command"
                return f"; {finished} kept: {command} continues"
        return ""

    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"onnxsim-embed: interrupted{hint()}", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        vars(error)["hint"] = hint()
        raise


def megabytes(size: int) -> str:
    """Return a number of bytes as "12.3 MB"."""
    return f"{size / 1e6:.1f} MB"


def check_table(path: Path, force: bool, *suffixes: str) -> None:
    """Raise, before any work, if a table could not be written after it."""
    from onnxsim_embed.files.atomic import check_output

    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a file name with one of {', '.join(suffixes)}")
    check_output(path, force)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print names and values, aligned."""
    width = max(map(len, fields))
    for name, value in fields.items():
        typer.echo(f"{name:<{width}}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with an empty line above and below.

    On a terminal that is too narrow for it, a table of few rows is transposed, and its cells are wrapped;
    one of many rows loses its last columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 1000
    console = Console(width=width, highlight=False, markup=False)
    widths = [2 + max(map(len, column)) for column in zip(header, *rows, strict=True)]
    columns = len(header)
    if sum(widths) - 2 > console.width and columns > len(rows) + 1:
        header, *rows = map(list, zip(header, *rows, strict=True))
    else:
        fitting = np.cumsum(widths) - 2 <= console.width
        columns = max(2, int(fitting.sum()))
    table = Table(
        box=SIMPLE_HEAD, header_style="none", padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for title in header[:columns]:
        table.add_column(title, overflow="fold", no_wrap=title == header[0])
    for row in rows:
        table.add_row(*row[:columns])
    with console.capture() as captured:
        console.print(table)
    lines = list(map(str.rstrip, captured.get().splitlines()))
    if missing := header[columns:]:
        note = f"The terminal is too narrow for: {', '.join(missing)}."
        lines += textwrap.wrap(note, console.width)
    typer.echo("\n".join(["", *lines, ""]))


def describe_pooling(pooling: str, normalize: bool) -> str:
    """Return a model's pooling in words."""
    return f"{pooling}, {'then L2 normalization' if normalize else 'not normalized'}"


def describe_prompts(prompts: Mapping[str, str]) -> str:
    """Return a model's prompts by their names."""
    return ", ".join(f"{name}: {prompt!r}" for name, prompt in prompts.items()) or "none"


def print_artifact(directory: Path, manifest: Manifest) -> None:
    """Print an artifact's model, files and fidelity."""
    fields = {
        "artifact": directory,
        "model": manifest.source + (f" @ {manifest.revision}" if manifest.revision else ""),
        "architecture": f"{manifest.architecture}, {manifest.layers} layers, {manifest.dim} dimensions",
        "exported": WAYS.get(manifest.via, manifest.via),
        "pooling": describe_pooling(" + ".join(manifest.pooling), manifest.normalize),
        "max tokens": manifest.max_seq_length,
        "prompts": describe_prompts(manifest.prompts),
    }
    if manifest.matryoshka_dims:
        fields["matryoshka dims"] = ", ".join(map(str, manifest.matryoshka_dims))
    print_fields(fields)
    sizes = {
        name: sum(manifest.files[file].size for file in (entry.file, *entry.data))
        for name, entry in manifest.precisions.items()
    }
    files = [
        [name, entry.file, megabytes(sizes[name]), entry.method]
        for name, entry in manifest.precisions.items()
    ]
    files += [
        [name, entry.pooled, megabytes(manifest.files[entry.pooled].size), "the same, pooled"]
        for name, entry in manifest.precisions.items()
        if entry.pooled
    ]
    print_table(["precision", "file", "size", "method"], files)
    if manifest.verification:
        print_fidelity(manifest.verification, sizes)
    for name, report in manifest.verification.items():
        if name not in manifest.precisions:
            typer.echo(f"{name} was not written: {'; '.join(report['problems'])}.")
    print_processor("int8" in manifest.precisions)


def print_processor(has_int8: bool) -> None:
    """Print what this machine's processor offers, and which precisions and engines that means."""
    from onnxsim_embed.system.hardware import (
        bf16_supported,
        cpu_flags,
        cpu_name,
        int8_supported,
        onnxruntime_wheels,
    )

    if len(wheels := onnxruntime_wheels()) > 1:
        typer.echo(
            f"{' and '.join(wheels)} are installed together and overwrite each other: pip uninstall -y "
            f"{' '.join(wheels)}, then install one."
        )
    suits, reason = int8_supported()
    default = "int8" if suits else "fp32"
    if has_int8:
        typer.echo(f"On this machine ({cpu_name()}) the default is {default}: {reason}.")
    bf16, reason = bf16_supported()
    missing = "" if find_spec("openvino") else f", after {install_command('openvino')}"
    typer.echo(
        f"--precision bf16 {f'runs here{missing}' if bf16 else 'does not run here'}: {reason}."
    )
    tiles = sorted(flag for flag in cpu_flags() if flag.startswith("amx_"))
    typer.echo(
        f"It has {', '.join(tiles)}: bf16 is about as fast as int8, and faster for long texts; compare them with onnxsim-embed bench."
        if tiles
        else "It has no AMX: int8 is faster with --engine openvino for long texts only."
    )


def print_fidelity(report: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> None:
    """Print a verification report as a table, with file sizes if there are several."""
    from onnxsim_embed.export.fidelity import FIDELITY_HEADER, fidelity_table, token_ids_note

    header, rows = FIDELITY_HEADER, fidelity_table(report)
    if sizes and len(sizes) > 1:
        cells = [megabytes(sizes[row[0]]) if row[0] in sizes else "-" for row in rows]
        header = [header[0], "size", *header[1:]]
        rows = [[row[0], cell, *row[1:]] for row, cell in zip(rows, cells, strict=True)]
    print_table(header, rows)
    if note := token_ids_note(report):
        typer.echo(note)


def describe_fidelity(report: Mapping[str, Any]) -> str:
    """Return whether a verification found all files faithful, and by how much, in a sentence."""
    faithful = not any(entry["problems"] for entry in report.values())
    agreements = [
        f"the vectors of {name} have a cosine of at least {entry['min_cosine']:.6f} with those of "
        f"{entry['reference']}, on average {entry['mean_cosine']:.6f}"
        for name, entry in report.items()
    ]
    return f"{'Faithful' if faithful else 'Not faithful'}: {'; '.join(agreements)}."


def name_options(message: str) -> str:
    """Return a message of the library with its arguments (force=True) as options (--force)."""
    from onnxsim_embed.cli import app

    group = typer.main.get_command(app)
    options = {
        "k": "--top-k",
        "write_graph": "-o DIRECTORY",
        "precisions": "--precision",
        "kind": "--format",
    }
    for command in getattr(group, "commands", {}).values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                options[parameter.name] = parameter.opts[0]

    def replace(match: re.Match[str]) -> str:
        option, value = options.get(match[1]), match[2]
        if option is None or (value is None and "_" not in match[1]):
            return match[0]
        return option if value in (None, "True") else f"{option} {value}".replace("'", "")

    message = re.sub(
        r"(?<![\w./'\"-])([a-z]+(?:_[a-z]+)*)(?:=(\w+|'[^']*'|\.\.\.))?(?![\w/'\"=-])",
        replace,
        message,
    )
    for words, option in PHRASES.items():
        message = message.replace(words, option)
    return message
