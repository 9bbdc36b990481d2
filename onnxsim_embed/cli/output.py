"""What commands print and where they may write."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from onnxsim_embed.artifact.manifest import Manifest
    from onnxsim_embed.files.provenance import Provenance


def on_terminal() -> bool:
    """Return whether standard error is a terminal, where progress bars go."""
    return sys.stderr.isatty()


def print_artifact(directory: Path, manifest: Manifest) -> None:
    """Print what an artifact is, its files and its fidelity."""
    from onnxsim_embed.system.hardware import cpu_name, int8_supported

    print_fields(
        {
            "artifact": str(directory),
            "model": manifest.source + (f" @ {manifest.revision}" if manifest.revision else ""),
            "architecture": f"{manifest.architecture}, {manifest.layers} layers, {manifest.dim} dimensions",
            "exported": WAYS.get(manifest.via, manifest.via),
            "pooling": " + ".join(manifest.pooling)
            + (", then L2 normalization" if manifest.normalize else ", not normalized"),
            "max tokens": str(manifest.max_seq_length),
            "prompts": ", ".join(f"{k}: {v!r}" for k, v in manifest.prompts.items()) or "none",
        }
    )
    if manifest.matryoshka_dims:
        typer.echo(f"may be cut to (truncate_dim): {', '.join(map(str, manifest.matryoshka_dims))}")
    sizes = {name: _size(manifest, name) for name in manifest.precisions}
    files = [
        [name, entry.file, f"{sizes[name] / 1e6:.1f} MB", entry.method]
        for name, entry in manifest.precisions.items()
    ]
    print_table(["precision", "file", "size", "made how"], files)
    if manifest.verification:
        print_fidelity(manifest.verification, sizes)
    for name, report in manifest.verification.items():
        if name not in manifest.precisions:
            typer.echo(f"{name} was left out: {'; '.join(report['problems'])}.")
    if "int8" in manifest.precisions:
        suits, reason = int8_supported()
        typer.echo(
            f"On this machine ({cpu_name()}) the default is {'int8' if suits else 'fp32'}: {reason}."
        )


# How an artifact's fp32 file came about, by the manifest's word for it.
WAYS = {
    "direct": "directly, the graph built from the weights",
    "optimum": "through optimum, traced from PyTorch",
    "adopted": "elsewhere: the source's own ONNX file, checked and copied",
}


def _size(manifest: Manifest, precision: str) -> int:
    """Return the bytes of a precision's file and of the weights beside it."""
    entry = manifest.precisions[precision]
    return sum(manifest.files[name].size for name in (entry.file, *entry.data))


def print_fidelity(report: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> None:
    """Print a verification report as a table, with the sizes of files where several are there."""
    from onnxsim_embed.export.fidelity import FIDELITY_HEADER, fidelity_table

    header, rows = FIDELITY_HEADER, fidelity_table(report)
    if sizes and len(sizes) > 1:
        cells = [f"{sizes[row[0]] / 1e6:.1f} MB" if row[0] in sizes else "-" for row in rows]
        header = [header[0], "size", *header[1:]]
        rows = [[row[0], cell, *row[1:]] for row, cell in zip(rows, cells, strict=True)]
    print_table(header, rows)


def print_vectors(file: str) -> None:
    """Print what a file of vectors holds and what made it."""
    from onnxsim_embed.cli.graph_files import shorten
    from onnxsim_embed.files.provenance import read_provenance
    from onnxsim_embed.files.uris import display_name, is_directory
    from onnxsim_embed.files.vector_directory import open_vectors
    from onnxsim_embed.files.vectors import read_vectors

    name = display_name(file)
    origin: Provenance | None
    if is_directory(
        file
    ):  # its index tells, without a look into its parts, which may be of any size
        stored = open_vectors(file)
        rows, components, origin = stored.rows, f"{stored.dim:,} float32", stored.provenance
    else:
        vectors = read_vectors(file)
        rows, components = len(vectors), f"{vectors.shape[1]:,} {vectors.dtype}"
        origin = read_provenance(file)
    fields = {"vectors": name, "rows": f"{rows:,}", "components": components}
    if origin is None:
        print_fields(fields | {"made by": "unknown: the file does not say"})
        return
    cut = "" if origin.truncate_dim is None else f", cut to {origin.truncate_dim}"
    scaled = "L2 norm 1" if origin.normalize else "not normalized"
    fields |= {
        "model": f"{origin.model} {origin.model_digest}",
        "precision": f"{origin.precision} {origin.weights_digest}, on {origin.provider}",
        "pooling": f"{origin.pooling}; {scaled}",
        "dimensions": f"{origin.dim}{cut}; as {origin.dtype}",
        "max tokens": str(origin.max_seq_length),
        "prompt": "none" if origin.prompt is None else repr(origin.prompt),
        "made by": f"onnxsim-embed {origin.onnxsim_embed}, onnxruntime {origin.onnxruntime}",
    }
    print_fields({key: shorten(value) for key, value in fields.items()} | {"vectors": name})


def print_fields(fields: dict[str, str]) -> None:
    """Print names and values, aligned."""
    width = max(map(len, fields))
    for name, value in fields.items():
        typer.echo(f"{name:<{width}}  {value}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table with an empty line above and below."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    typer.echo()
    for row in [header, ["-" * width for width in widths], *rows]:
        typer.echo(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    typer.echo()
