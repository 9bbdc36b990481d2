"""The command line. The only package that prints."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from onnxsim_embed import __version__
from onnxsim_embed.cli import (
    bench,
    doctor,
    encode,
    export,
    finetune,
    heatmap,
    mining,
    models,
    search,
    similarity,
)
from onnxsim_embed.errors import MissingExtraError, OnnxsimEmbedError

app = typer.Typer(
    name="onnxsim-embed",
    help="Fast, faithful sentence embeddings on the CPU, and exact similarity graphs.",
    epilog="A typical run: onnxsim-embed encode texts.csv --column text -o vectors.npy, then "
    "onnxsim-embed similarity vectors.npy --threshold 0.5 -o similarities.npz",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(export.export)
app.command()(export.verify)
app.command()(finetune.finetune)
app.command(name="eval")(models.evaluate)
app.command()(models.info)
app.command()(models.models)
app.command()(doctor.doctor)
app.command()(encode.encode)
app.command()(similarity.similarity)
app.command()(search.search)
app.command()(heatmap.heatmap)
app.command()(mining.dedupe)
app.command()(mining.cluster)
app.command()(bench.bench)


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=lambda v: _version(v)
        ),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    for noisy in (
        "matplotlib", "urllib3", "httpx", "httpcore", "filelock", "huggingface_hub", "fsspec", "datasets",
    ):  # fmt: skip
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onnxsim-embed {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; every failure is one line on standard error and an exit code."""
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, MissingExtraError) as error:
        _fail(error, 2, debug)
    except (OnnxsimEmbedError, OSError, MemoryError) as error:
        _fail(error, 1, debug)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


def _fail(error: BaseException, code: int, debug: bool) -> None:
    if debug:
        raise error
    from onnxsim_embed.files.uris import without_passwords

    message = without_passwords(str(error)) or type(error).__name__
    message = message.replace("force=True", "--force")  # library errors name arguments
    typer.echo(f"onnxsim-embed: {message}", err=True)
    sys.exit(code)
