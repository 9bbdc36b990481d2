"""Texts and vectors that commands read or make."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import typer

from onnxsim_embed.cli.output import on_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.pipeline import EncodeReport


def encode_texts(
    embedder: Embedder, texts: list[str], prompt_name: str | None, quiet: bool
) -> npt.NDArray[Any]:
    """Encode with a progress bar on a terminal, and report what was done."""
    vectors = embedder.encode(
        texts, prompt_name=prompt_name, show_progress_bar=on_terminal() and not quiet
    )
    if not quiet:
        print_report(embedder, embedder.last_report)
    return vectors


def print_report(embedder: Embedder, report: EncodeReport) -> None:
    """Print what was encoded, how fast, and where the time went."""
    typer.echo(
        f"Encoded {counted(report.texts, 'text')} ({report.distinct:,} distinct, "
        f"{counted(report.tokens, 'token')}) in {report.seconds:.2f} s: {report.texts_per_second:,.0f} "
        f"texts/s on {report.provider}, {counted(report.threads, 'thread')}, {embedder.precision}. "
        f"Of that, tokenize {report.seconds_tokenize:.2f} s; summed over threads, run "
        f"{report.seconds_run:.2f} s and pool {report.seconds_pool:.2f} s."
    )
    if report.truncated:
        verb = "was" if report.truncated == 1 else "were"
        typer.echo(
            f"{counted(report.truncated, 'text')} {verb} longer than {embedder.max_seq_length} tokens "
            f"and {verb} cut there."
        )


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: "1 text", "2,000 texts"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def load(model: str, precision: str, threads: int | None, device: str = "auto") -> Embedder:
    """Load a model."""
    from onnxsim_embed.runtime.embedder import Embedder

    return Embedder.from_pretrained(model, precision=precision, threads=threads, device=device)


def read_texts(file: str, column: str | None, kind: str | None) -> list[str]:
    """Read all texts of a file."""
    from onnxsim_embed.files.texts import iter_texts

    return list(iter_texts(file, column, kind=kind))


def read_labels(
    file: str, column: str | None, kind: str | None, vectors: npt.NDArray[Any], where: str
) -> list[str]:
    """Read the texts of a file of vectors.

    :param where: that file.
    :raises ValueError: if there are more or fewer texts than vectors.
    """
    texts = read_texts(file, column, kind)
    if len(texts) != len(vectors):
        raise ValueError(
            f"{file} holds {counted(len(texts), 'text')} for {len(vectors):,} vectors of {where}; "
            "give the file that was encoded"
        )
    return texts


def open_texts(file: str, column: str | None, kind: str | None) -> Iterator[str]:
    """Return the texts of a file, of which the first is read now: a wrong file or column fails here."""
    from onnxsim_embed.files.texts import iter_texts

    texts = iter_texts(file, column, kind=kind)
    return chain([next(texts)], texts)
