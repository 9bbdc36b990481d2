"""verify: an artifact against its reference."""

from __future__ import annotations

from pathlib import Path

from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.output import print_fidelity
from onnxsim_embed.cli.texts import TextFile


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
) -> None:
    """Compare an artifact with its reference; exit code 1 if it is not faithful."""
    from onnxsim_embed.artifact.manifest import Artifact
    from onnxsim_embed.errors import VerificationError
    from onnxsim_embed.export import verify_artifact

    source = TextFile(str(texts), column, None, delimiter, no_header, on_error)
    report = verify_artifact(
        Artifact.open(directory),
        against=against,
        texts=None if texts is None else source.read(),
        min_fidelity=options.parse_min_fidelity(bar if min_fidelity is None else min_fidelity),
    )
    print_fidelity(report)
    if problems := [problem for result in report.values() for problem in result["problems"]]:
        raise VerificationError("; ".join(problems))
