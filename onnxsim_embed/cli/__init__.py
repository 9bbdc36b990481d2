"""The command line. The only package that prints."""

from __future__ import annotations

import dis
import io
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from onnxsim_embed import __version__
from onnxsim_embed.cli import (
    bench,
    cache,
    cluster,
    dedupe,
    doctor,
    encode,
    eval,
    explore,
    export,
    finetune,
    heatmap,
    info,
    models,
    search,
    serve,
    similarity,
    verify,
)
from onnxsim_embed.cli.options import Debug, prepare
from onnxsim_embed.cli.output import MEASURES, SCORES, name_options
from onnxsim_embed.errors import OnnxsimEmbedError

WRONG_CALL, FAILED, INTERNAL_FAULT, INTERRUPTED = 2, 1, 70, 130  # exit codes

app = typer.Typer(
    name="onnxsim-embed",
    help="Fast, faithful sentence embeddings on the CPU, and exact similarity graphs.",
    epilog="A typical run: onnxsim-embed encode texts.csv --column text -o vectors.npy, then "
    "onnxsim-embed similarity vectors.npy --threshold 0.5 -o similarities.npz\n\n"
    "Exit codes: 0 done; 1 failed (also: a missing file, directory, model or package); 2 wrong "
    "arguments; 70 internal fault; 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=MEASURES)(prepare(export.export))
app.command(epilog=MEASURES)(prepare(verify.verify))
app.command(epilog=SCORES)(prepare(finetune.finetune))
app.command(name="eval", epilog=SCORES)(prepare(eval.evaluate))
for command in (
    info.info, models.models, doctor.doctor, encode.encode, similarity.similarity, search.search,
    heatmap.heatmap, dedupe.dedupe, cluster.cluster, explore.explore, serve.serve, bench.bench,
):  # fmt: skip
    app.command()(prepare(command))
cache.cache.command(name="list")(prepare(cache.list_models))
cache.cache.command()(prepare(cache.clear))
app.add_typer(cache.cache, name="cache")


@app.callback()
def _global(
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=lambda v: _version(v)
        ),
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"onnxsim-embed {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; every failure is one line on standard error and an exit code."""
    # Any text can be printed, whatever the console's code page.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="onnxsim-embed")
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        from onnxsim_embed.files.uris import without_passwords

        if "--debug" in sys.argv:
            typer.echo(without_passwords(traceback.format_exc()), err=True)
        code, message = exit_code(error), str(error) or type(error).__name__
        message = message.removeprefix(f"[Errno {getattr(error, 'errno', None)}] ")
        if code == INTERNAL_FAULT:
            message = (
                f"internal fault: {type(error).__name__}: {message}; run the command "
                "again with --debug for the traceback, and report it"
            )
        message = name_options(without_passwords(message)) + getattr(error, "hint", "")
        typer.echo(f"onnxsim-embed: {message}", err=True)
        sys.exit(code)


def exit_code(error: Exception) -> int:
    """Return the exit code of an error that ended a command.

    A ValueError or TypeError is about the arguments if this package raised it on purpose. From numpy,
    another library or an operator, it is an internal fault.
    """
    if isinstance(error, FileExistsError):
        return WRONG_CALL  # --force or another name is needed
    if isinstance(error, (OnnxsimEmbedError, OSError, MemoryError)):
        return FAILED
    if not isinstance(error, (ValueError, TypeError)):
        return INTERNAL_FAULT
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return INTERNAL_FAULT
    code = last.tb_frame.f_code
    ours = Path(code.co_filename).is_relative_to(Path(__file__).parents[1])
    on_purpose = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return WRONG_CALL if ours and on_purpose else INTERNAL_FAULT
