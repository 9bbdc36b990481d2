"""verify: an artifact against its reference."""

from __future__ import annotations

from pathlib import Path

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import read_texts
from onnxsim_embed.cli.output import describe_fidelity, print_fidelity


def verify(
    directory: Path = Argument(..., help="Artifact directory."),
    against: str | None = Option(
        None, help="Reference of fp32: checkpoint, model name, or torch for the artifact's."
    ),
    texts: Path | None = Option(None, help="File of texts; default: the package's own."),
    column: options.Column = None,
    delimiter: options.Delimiter = None,
    no_header: options.NoHeader = False,
    on_error: options.OnError = "fail",
    min_fidelity: options.MinFidelity = None,
    bar: options.Bar = None,
    quiet: options.Quiet = False,
) -> None:
    """Compare an artifact with its reference; exit code 1 if it is not faithful."""
    from onnxsim_embed.artifact.manifest import Artifact
    from onnxsim_embed.errors import VerificationError
    from onnxsim_embed.export import verify_artifact

    chosen = None
    if texts is not None:
        chosen = read_texts(texts, column, delimiter, no_header, on_error)
    report = verify_artifact(
        Artifact.open(directory),
        against=against,
        texts=chosen,
        min_fidelity=options.parse_min_fidelity(bar if min_fidelity is None else min_fidelity),
    )
    if not quiet:
        print_fidelity(report)
        typer.echo(describe_fidelity(report))
    if problems := [problem for result in report.values() for problem in result["problems"]]:
        raise VerificationError("; ".join(problems))
