"""Texts and vectors that commands read or compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import typer

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import counted, name_options, on_terminal
from onnxsim_embed.errors import TableError
from onnxsim_embed.files.texts import ReadReport, iter_texts, list_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.report import EncodeReport

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True)
class Inputs:
    """The options of commands that read texts and may encode them; `with_inputs` declares them."""

    column: options.Column = None
    id_column: options.IdColumn = None
    model: options.Model = options.DEFAULT_MODEL
    precision: options.Precision = "auto"
    device: options.Device = "auto"
    engine: options.Engine = "auto"
    max_seq_length: options.MaxSeqLength = None
    long_texts: options.LongTexts = "truncate"
    stride: options.Stride = 0
    threads: options.Threads = None
    kind: options.Format = None
    delimiter: options.Delimiter = None
    no_header: options.NoHeader = False
    on_error: options.OnError = "fail"
    force: options.Force = False
    quiet: options.Quiet = False

    def open(self, file: str | Path) -> Texts:
        """Return the texts of a file."""
        return Texts(str(file), self)

    @property
    def local(self) -> dict[str, object]:
        """The options that Ray does not support, by name."""
        return {
            "delimiter": self.delimiter,
            "no_header": self.no_header,
            "on_error": self.on_error != "fail",
            "device": self.device not in ("auto", "cpu"),
        }

    @property
    def encoding(self) -> dict[str, Any]:
        """The arguments of `encode` for long texts."""
        return {"long_texts": self.long_texts, "stride": self.stride}

    @property
    def show_progress_bar(self) -> bool:
        """Whether to draw progress bars."""
        return on_terminal() and not self.quiet

    def load(self, precision: str | None = None) -> Embedder:
        """Load the model."""
        from onnxsim_embed.runtime.embedder import Embedder

        embedder = Embedder.from_pretrained(
            self.model,
            precision=precision or self.precision,
            threads=self.threads,
            device=self.device,
            engine=self.engine,
        )
        if self.max_seq_length is not None:
            embedder.max_seq_length = self.max_seq_length
        return embedder

    def print_encoded(self, embedder: Embedder, report: EncodeReport, rows: Sequence[int]) -> None:
        """Print what was encoded, how fast, and the time of each stage.

        :param rows: the row of each text in the file.
        """
        if self.quiet:
            return
        typer.echo(
            f"Encoded {counted(report.texts, 'text')} ({report.distinct:,} distinct, "
            f"{counted(report.tokens, 'token')}) in {report.seconds:.2f} s: "
            f"{report.texts_per_second:,.0f} texts/s on {report.provider}, "
            f"{counted(report.threads, 'thread')}, {embedder.precision}. Of that, tokenize "
            f"{report.seconds_tokenize:.2f} s; summed over threads, run {report.seconds_run:.2f} s "
            f"and pool {report.seconds_pool:.2f} s."
        )
        if report.split:
            typer.echo(f"Encoded as windows of their tokens: {counted(report.split, 'text')}.")
        lost = f" Cut off: {counted(report.lost_tokens, 'token')}."
        for numbers, state, more in (
            (report.truncated_rows, f"Truncated to {embedder.max_seq_length} tokens", lost),
            (report.unknown_rows, "Of tokens unknown to the model only", ""),
        ):
            if numbers:
                named = list_rows([rows[number] for number in numbers])
                typer.echo(f"{state}: {counted(len(numbers), 'text')}, {named}.{more}")


class Rows(NamedTuple):
    """Rows of a file: their vectors, their texts if known, and what names each in outputs."""

    vectors: npt.NDArray[Any]
    texts: list[str] | None
    names: Sequence[Any]
    source: Texts


@dataclass(frozen=True)
class VectorInputs(Inputs):
    """The options of commands that compare the rows of a file."""

    vectors: options.Vectors = None
    no_text: options.NoText = False

    def swapped(self, file: str, texts: str | None) -> tuple[VectorInputs, str]:
        """Return the options and the file for `VECTORS --texts FILE`, as FILE --vectors VECTORS."""
        from onnxsim_embed.files.vectors import holds_vectors

        if texts is None:
            return self, file
        if not holds_vectors(file):
            raise ValueError(f"--texts requires a file of vectors, and {file} holds texts")
        return replace(self, vectors=file), texts

    def read(
        self,
        file: str,
        limit: int | None = None,
        encode: Callable[[Texts, list[str]], npt.NDArray[Any]] | None = None,
    ) -> Rows:
        """Read a file of vectors, or texts and their vectors: those of --vectors, or encoded now.

        :param limit: number of the first rows to read.
        :param encode: encodes texts; None for `Texts.encode`.
        """
        from onnxsim_embed.files.vectors import holds_vectors, read_ids

        source = self.open(file)
        if self.vectors is None and holds_vectors(file, self.column):
            vectors = read_components(file, self.column)[:limit]
            ids = read_ids(file, self.id_column)
            return Rows(vectors, None, ids or range(len(vectors)), source)
        texts = source.read(limit)
        if self.vectors is None:
            return Rows((encode or Texts.encode)(source, texts), texts, source.names, source)
        vectors = source.vectors(texts, self.vectors, limit)
        ids = None if self.id_column else read_ids(self.vectors)
        return Rows(vectors, texts, ids or source.names, source)


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
        self.print_problems()
        return texts

    def print_problems(self) -> None:
        """Print rows without a text, and what may be a mistake, after reading."""
        print_problems(self.path, self.report, self.inputs.quiet)

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


def with_inputs(command: Command) -> Command:
    """Add the options of `Inputs` to a command, which gets them as its argument `inputs`."""
    own = dict(inspect.signature(command, eval_str=True).parameters)
    kind = own.pop("inputs").annotation
    shared = inspect.signature(kind, eval_str=True).parameters

    @wraps(command)
    def run(**values: Any) -> None:  # noqa: ANN401
        command(inputs=kind(**{name: values.pop(name) for name in shared}), **values)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in {**own, **shared}.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run  # type: ignore[return-value]


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


def read_texts(
    file: str | Path, column: str | None, delimiter: str | None, no_header: bool, on_error: str
) -> list[str]:
    """Return the texts of a file, for commands that read other inputs besides."""
    given = Inputs(column=column, delimiter=delimiter, no_header=no_header)
    return Texts(str(file), replace(given, on_error=on_error)).read()
