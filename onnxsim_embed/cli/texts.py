"""Texts and vectors that commands read or make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from onnxsim_embed.cli.output import on_terminal

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.embedder import Embedder


def encode_texts(
    embedder: Embedder, texts: list[str], prompt_name: str | None, quiet: bool
) -> npt.NDArray[Any]:
    """Encode with a progress bar on a terminal, and report what was done."""
    vectors = embedder.encode(
        texts, prompt_name=prompt_name, show_progress_bar=on_terminal() and not quiet
    )
    if not quiet:
        report = embedder.last_report
        typer.echo(
            f"Encoded {report.texts:,} texts ({report.distinct:,} distinct, {report.tokens:,} tokens) in "
            f"{report.seconds:.2f} s: {report.texts_per_second:,.0f} texts/s on {report.provider}, "
            f"{report.threads} threads, {embedder.precision}."
        )
        if report.truncated:
            typer.echo(
                f"{report.truncated:,} texts were longer than {embedder.max_seq_length} tokens and were cut there."
            )
    return vectors


def load(model: str, precision: str, threads: int | None) -> Embedder:
    """Load a model."""
    from onnxsim_embed.embedder import Embedder

    return Embedder.from_pretrained(model, precision=precision, threads=threads)


def read_texts(file: str, column: str | None, kind: str | None) -> list[str]:
    """Read all texts of a file."""
    from onnxsim_embed.tables import iter_texts

    return list(iter_texts(file, column, kind=kind))
