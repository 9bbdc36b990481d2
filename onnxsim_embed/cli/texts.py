"""Texts and vectors that commands read or compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import typer

from onnxsim_embed.cli.output import counted, on_terminal
from onnxsim_embed.files.texts import ReadReport, iter_texts

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


@dataclass(frozen=True)
class TextFile:
    """A file of texts, and the options on how to read it; see `iter_texts`."""

    path: str
    column: str | None = None
    kind: str | None = None
    delimiter: str | None = None
    no_header: bool = False
    on_error: str = "fail"
    quiet: bool = False
    report: ReadReport = field(default_factory=ReadReport)

    def open(self) -> Iterator[str]:
        """Return the texts; the first is read now, so that a wrong file or column fails early."""
        texts = iter_texts(
            self.path, self.column, kind=self.kind, delimiter=self.delimiter,
            header=not self.no_header, on_error=self.on_error, report=self.report,
        )  # fmt: skip
        first = list(islice(texts, 1))
        if not self.quiet and self.report.column is not None:
            typer.echo(f"Reading {self.path}: {self.report.describe()}.")
        return chain(first, texts)

    def read(self, rows: int | None = None) -> list[str]:
        """Return all texts.

        :param rows: the number of vectors that the texts belong to, if any.
        """
        texts = list(self.open())
        self.print_problems()
        if rows is not None and len(texts) != rows:
            raise ValueError(
                f"{self.path} holds {counted(len(texts), 'text')} for {counted(rows, 'vector')}; "
                "pass the file that was encoded"
            )
        return texts

    def print_problems(self) -> None:
        """Print rows without a text, and what may be a mistake, after reading."""
        from onnxsim_embed.cli import name_options

        for message in self.report.problems():
            warning = message in self.report.warnings
            if warning or not self.quiet:
                typer.echo(name_options(f"{self.path}: {message}."), err=warning)

    @property
    def rows(self) -> list[int]:
        """The row of each text in the file, after reading."""
        return [row for row in range(self.report.rows) if row not in self.report.skipped]

    def by_row(self, texts: list[str]) -> list[str]:
        """Return the texts by their rows in the file, with empty texts for skipped rows."""
        rest = iter(texts)
        skipped = self.report.skipped
        return ["" if row in skipped else next(rest) for row in range(len(texts) + len(skipped))]
