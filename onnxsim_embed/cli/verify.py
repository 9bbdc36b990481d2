"""verify: an artifact against its reference."""

from __future__ import annotations

from pathlib import Path

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import TextInputs
from onnxsim_embed.cli.output import describe_fidelity, print_fidelity


def verify(
    inputs: TextInputs,
    directory: Path = Argument(..., help="Artifact directory."),
    against: str | None = Option(
        None, help="Reference of fp32: checkpoint, model name, or torch for the artifact's."
    ),
    texts: Path | None = Option(None, help="File of texts; default: the package's own."),
    min_fidelity: options.MinFidelity = None,
    bar: options.Bar = None,
    quiet: options.Quiet = False,
) -> None:
    """Compare an artifact with its reference; exit code 1 if it is not faithful."""
    from onnxsim_embed.artifact.manifest import Artifact
    from onnxsim_embed.errors import VerificationError
    from onnxsim_embed.export import verify_artifact

    report = verify_artifact(
        Artifact.open(directory),
        against=against,
        texts=None if texts is None else inputs.read_texts(texts),
        min_fidelity=options.parse_min_fidelity(bar if min_fidelity is None else min_fidelity),
    )
    if not quiet:
        print_fidelity(report)
        typer.echo(describe_fidelity(report))
    if problems := [problem for result in report.values() for problem in result["problems"]]:
        raise VerificationError("; ".join(problems))
