"""Options that several commands share, and the texts and vectors that they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer import Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import counted, on_terminal
from onnxsim_embed.cli.texts import Texts, read_components
from onnxsim_embed.files.texts import list_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.report import EncodeReport


@dataclass(frozen=True)
class TextInputs:
    """The options of commands that read texts; `options.prepare` declares them."""

    column: Annotated[str | None, Option("--column", "-c", help="Column of the texts.")] = None
    delimiter: options.Delimiter = None
    no_header: options.NoHeader = False
    on_error: Annotated[
        str, Option("--on-error", help="Rows without a text: fail, skip or blank.")
    ] = "fail"

    def read_texts(self, file: object) -> list[str]:
        """Return the texts of a file."""
        return Inputs(**vars(self)).open(file).read()


@dataclass(frozen=True)
class ModelInputs:
    """The options of commands that load a model."""

    model: options.Model = options.DEFAULT_MODEL
    precision: Annotated[
        str, Option("--precision", help="Weight precision: auto, fp32, int8, bf16 or fp16.")
    ] = "auto"
    device: options.Device = "auto"
    engine: Annotated[
        str,
        Option(
            "--engine",
            help="auto, onnxruntime or openvino; with encode and similarity also ray: a cluster, or this "
            "machine; writes a directory.",
        ),
    ] = "auto"
    max_seq_length: options.MaxSeqLength = None
    long_texts: Annotated[
        str, Option("--long-texts", help="Beyond that length: truncate, or mean of windows.")
    ] = "truncate"
    stride: Annotated[
        int, Option("--stride", min=0, help="Tokens that windows of --long-texts mean share.")
    ] = 0
    threads: options.Threads = None
    quiet: options.Quiet = False

    @property
    def encoding(self) -> dict[str, Any]:
        """The arguments of `encode` for long texts."""
        return {"long_texts": self.long_texts, "stride": self.stride}

    @property
    def show_progress_bar(self) -> bool:
        """Whether to draw progress bars."""
        return on_terminal() and not self.quiet

    def say(self, message: str) -> None:
        """Print a line, unless --quiet."""
        if not self.quiet:
            typer.echo(message)

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
        """Print what was encoded, of which rows of the file, how fast, and the time of each stage."""
        self.say(
            f"Encoded {counted(report.texts, 'text')} ({report.distinct:,} distinct, "
            f"{counted(report.tokens, 'token')}) in {report.seconds:.2f} s: "
            f"{report.texts_per_second:,.0f} texts/s on {report.provider}, "
            f"{counted(report.threads, 'thread')}, {embedder.precision}. Of that, tokenize "
            f"{report.seconds_tokenize:.2f} s; summed over threads, run {report.seconds_run:.2f} s "
            f"and pool {report.seconds_pool:.2f} s."
        )
        if report.split:
            self.say(f"Encoded as windows of their tokens: {counted(report.split, 'text')}.")
        lost = f" Cut off: {counted(report.lost_tokens, 'token')}."
        for numbers, state, more in (
            (report.truncated_rows, f"Truncated to {embedder.max_seq_length} tokens", lost),
            (report.unknown_rows, "Of tokens unknown to the model only", ""),
        ):
            if numbers:
                named = list_rows([rows[number] for number in numbers])
                self.say(f"{state}: {counted(len(numbers), 'text')}, {named}.{more}")


@dataclass(frozen=True)
class Inputs(ModelInputs, TextInputs):
    """The options of commands that read texts and may encode them."""

    id_column: Annotated[
        str | None,
        Option("--id-column", help="Ids that name rows in outputs; default: row numbers."),
    ] = None
    kind: Annotated[
        str | None, Option("--format", help="csv, tsv, jsonl, parquet, txt; default: the suffix.")
    ] = None
    force: options.Force = False

    def open(self, file: object) -> Texts:
        """Return the texts of a file."""
        return Texts(str(file), self)

    def on_ray(self, **only_local: object) -> bool:
        """Return whether the command runs on Ray, after checking that Ray has the options that are set.

        :param only_local: values of options that it lacks; None and False are not set.
        """
        if self.engine not in (allowed := ("auto", "onnxruntime", "openvino", "ray")):
            raise ValueError(f"unknown engine {self.engine!r}; allowed are {', '.join(allowed)}")
        only_local["device"] = self.device not in ("auto", "cpu")
        for name, value in only_local.items():
            if self.engine == "ray" and value not in (None, False):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} cannot be combined with --engine ray")
        return self.engine == "ray"


class Rows(NamedTuple):
    """Rows of a file: their vectors, their texts if known, and what names each in outputs."""

    vectors: npt.NDArray[Any]
    texts: list[str] | None
    names: Sequence[Any]
    source: Texts


@dataclass(frozen=True)
class VectorInputs(Inputs):
    """The options of commands that compare the rows of a file."""

    vectors: Annotated[
        str | None, Option("--vectors", help="Vectors of the rows, .npy or .parquet, if encoded.")
    ] = None
    no_text: Annotated[bool, Option("--no-text", help="Leave the texts out of tables.")] = False

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
        """Read vectors, or (the first) texts and their vectors: of --vectors, or made by `encode` (`Texts.encode`)."""
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
