"""Texts and vectors of files that commands read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from onnxsim_embed.cli.output import counted, name_options
from onnxsim_embed.errors import TableError
from onnxsim_embed.files.texts import ReadReport, iter_texts, list_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.cli.inputs import Inputs


@dataclass
class Counted:
    """Texts whose number is known, for the total of a progress bar; 0 if it is not."""

    texts: Iterator[str]
    total: int

    def __iter__(self) -> Iterator[str]:
        """Iterate over the texts."""
        return self.texts

    def __length_hint__(self) -> int:
        return self.total


@dataclass(frozen=True)
class Texts:
    """The texts of a file."""

    path: str
    inputs: Inputs
    report: ReadReport = field(default_factory=ReadReport)
    truncated: list[int] = field(default_factory=list)  # which texts, after encoding
    unknown: list[int] = field(default_factory=list)  # those of unknown tokens only

    def __iter__(self) -> Iterator[str]:
        """Iterate over the texts; the first is read now, so that a wrong file or column fails early."""
        given = self.inputs
        texts = iter_texts(
            self.path, given.column, kind=given.kind, delimiter=given.delimiter, header=not given.no_header,
            on_error=given.on_error, id_column=given.id_column, report=self.report,
        )  # fmt: skip
        first = list(islice(texts, 1))
        if not given.quiet and self.report.column is not None:
            typer.echo(f"Reading {self.path}: {self.report.describe()}.")
        return chain(first, texts)

    def survey(self, size: int) -> tuple[int, list[str]]:
        """Read the file once, for a progress bar or a sample; else return 0 and no texts.

        :param size: size of the sample: the same texts of a file each time.
        :returns: the number of texts and the sample; those before a row that cannot be read, at which
            the second pass will raise.
        """
        count, random = 0, Random(0)
        sample: list[str] = []
        if self.path == "-" or not (size or self.inputs.show_progress_bar):
            return 0, []
        with suppress(TableError):
            for text in Texts(self.path, replace(self.inputs, quiet=True, id_column=None)):
                count += 1
                place = len(sample) if len(sample) < size else random.randrange(count)
                sample[place : place + 1] = [text] * (place < size)
        return count, sample

    def read(self, limit: int | None = None) -> list[str]:
        """Return all texts, or the first."""
        texts = list(islice(iter(self), limit))
        print_problems(self.path, self.report, self.inputs.quiet)
        return texts

    @property
    def rows(self) -> Sequence[int]:
        """The row of each text in the file, after reading."""
        rows, skipped = range(self.report.rows), self.report.skipped
        return [row for row in rows if row not in skipped] if skipped else rows

    def encode(self, texts: list[str]) -> npt.NDArray[Any]:
        """Encode texts, and print the report."""
        embedder = self.inputs.load()
        show = self.inputs.show_progress_bar
        vectors = embedder.encode(texts, show_progress_bar=show, **self.inputs.encoding)
        report = embedder.last_report
        self.inputs.print_encoded(embedder, report, self.rows)
        self.truncated[:], self.unknown[:] = report.truncated_rows, report.unknown_rows
        return vectors

    @property
    def names(self) -> Sequence[Any]:
        """The id, or without --id-column the row, of each text in the file, after reading."""
        return self.report.ids if self.inputs.id_column else self.rows

    def vectors(
        self, texts: list[str], file: str | None, limit: int | None = None
    ) -> npt.NDArray[Any]:
        """Return the vectors of all texts, from a file or by encoding them."""
        if file is None:
            return self.encode(texts)
        vectors = read_components(file)[:limit]
        if len(vectors) != len(texts):
            raise ValueError(
                f"{file} holds {counted(len(vectors), 'vector')} for {counted(len(texts), 'row')} "
                f"of {self.path}; pass the file that was encoded"
            )
        return vectors

    def vectors_to_group(self, texts: list[str], file: str | None) -> npt.NDArray[Any]:
        """Return `vectors`, zeros for texts that are empty or of unknown tokens: similar to none."""
        vectors = self.vectors(texts, file)
        if blind := self.unknown + [row for row, text in enumerate(texts) if not text.strip()]:
            vectors = np.array(vectors)
            vectors[blind] = 0
        return vectors

    def warn(self, texts: Collection[int], verb: str, why: str) -> None:
        """Print a warning that names the rows of some texts."""
        if len(texts):
            named = list_rows([self.rows[number] for number in texts])
            count = f"{len(texts):,} of {counted(len(self.rows), 'row')}"
            typer.echo(f"{self.path}: {verb} {count} {why}: {named}.", err=True)

    def warn_unseen(self, texts: Collection[int], dropped: bool) -> None:
        """Print a warning that names the rows of `unseen_rows`."""
        hint = "" if dropped else " (--drop-unseen drops them)"
        why = "whose texts differ from others only where the model does not see it"
        self.warn(texts, "dropped" if dropped else "found", why + hint)


def print_problems(name: str, report: ReadReport, quiet: bool) -> None:
    """Print rows without a text, and what may be a mistake, of a file that was read."""
    for message in report.problems():
        warning = message in report.warnings
        if warning or not quiet:
            typer.echo(name_options(f"{name}: {message}."), err=warning)


def read_components(file: str | Path, column: str | None = None) -> npt.NDArray[Any]:
    """Read vectors to be compared.

    :raises ValueError: for bytes, which `encode --dtype` writes: quantized or packed, not components.
    """
    from onnxsim_embed.files.vectors import read_vectors

    vectors = read_vectors(file, column)
    if vectors.dtype in (np.int8, np.uint8):
        raise ValueError(
            f"{file} holds {vectors.dtype} vectors, quantized or packed bits, whose cosines are not those of "
            "the texts: encode with --dtype float16 or float32"
        )
    return vectors
