"""Texts and vectors that commands read or compute."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import typer

from onnxsim_embed.cli.output import counted, on_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.pipeline import EncodeReport


def load(model: str, precision: str, threads: int | None, device: str = "auto") -> Embedder:
    """Load a model."""
    from onnxsim_embed.runtime.embedder import Embedder

    return Embedder.from_pretrained(model, precision=precision, threads=threads, device=device)


def encode_texts(embedder: Embedder, texts: list[str], quiet: bool) -> npt.NDArray[Any]:
    """Encode with a progress bar on a terminal, and print the report."""
    vectors = embedder.encode(texts, show_progress_bar=on_terminal() and not quiet)
    if not quiet:
        print_report(embedder, embedder.last_report)
    return vectors


def print_report(embedder: Embedder, report: EncodeReport) -> None:
    """Print what was encoded, how fast, and the time of each stage."""
    typer.echo(
        f"Encoded {counted(report.texts, 'text')} ({report.distinct:,} distinct, "
        f"{counted(report.tokens, 'token')}) in {report.seconds:.2f} s: {report.texts_per_second:,.0f} "
        f"texts/s on {report.provider}, {counted(report.threads, 'thread')}, {embedder.precision}. "
        f"Of that, tokenize {report.seconds_tokenize:.2f} s; summed over threads, run "
        f"{report.seconds_run:.2f} s and pool {report.seconds_pool:.2f} s."
    )
    if report.truncated:
        typer.echo(
            f"{counted(report.truncated, 'text')} longer than {embedder.max_seq_length} tokens "
            f"{'was' if report.truncated == 1 else 'were'} truncated."
        )


def open_texts(file: str, column: str | None, kind: str | None) -> Iterator[str]:
    """Return the texts of a file; the first is read now, so that a wrong file or column fails early."""
    from onnxsim_embed.files.texts import iter_texts

    texts = iter_texts(file, column, kind=kind)
    return chain([next(texts)], texts)


def read_texts(
    file: str, column: str | None, kind: str | None = None, *, rows: int | None = None
) -> list[str]:
    """Read all texts of a file.

    :param rows: the number of vectors that the texts belong to, if any.
    """
    from onnxsim_embed.files.texts import iter_texts

    texts = list(iter_texts(file, column, kind=kind))
    if rows is not None and len(texts) != rows:
        raise ValueError(
            f"{file} holds {counted(len(texts), 'text')} for {counted(rows, 'vector')}; "
            "pass the file that was encoded"
        )
    return texts
