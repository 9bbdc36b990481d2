"""The doctor command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from onnxsim_embed.cli.output import counted
from onnxsim_embed.plot import printable

if TYPE_CHECKING:
    from onnxsim_embed.doctor import Finding


def doctor(
    directory: Path = Argument(..., help="An artifact or a checkpoint."),
    reader: list[str] | None = Option(
        None,
        help="sentence-transformers, fastembed, text-embeddings-inference, transformers.js, tokenizers "
        "or onnxsim-embed; repeatable; default: all.",
    ),
    fix: bool = Option(
        False, "--fix", help="Write the changes of JSON files; all other keys stay."
    ),
) -> None:
    """List the files and keys of a directory that would break other programs, and their fixes.

    Exit code 0 without findings, else 1.
    """
    from onnxsim_embed.doctor import READERS, diagnose, repair

    readers = tuple(reader or READERS)
    findings = diagnose(directory, readers)
    if fix and findings:
        for name in repair(directory, findings):
            typer.echo(f"Wrote {directory / name}.")
        findings = diagnose(directory, readers)
    for finding in findings:
        _print(finding, readers)
    if not findings:
        typer.echo(f"{directory}: nothing found that would break {', '.join(readers)}.")
        return
    fixable = sum(finding.change is not None for finding in findings)
    hint = f"; --fix fixes {fixable}" if fixable else ""
    typer.echo(f"{directory}: {counted(len(findings), 'finding')}{hint}.")
    raise typer.Exit(1)


def _print(finding: Finding, readers: tuple[str, ...]) -> None:
    key = "" if finding.key is None else f": {finding.key}"
    affected = ", ".join(name for name in finding.readers if name in readers)
    # Names in the directory may hold terminal control characters.
    typer.echo(printable(f"{finding.file}{key}"))
    typer.echo(f"  breaks  {affected}")
    typer.echo(f"  what    {printable(finding.effect)}")
    typer.echo(f"  change  {printable(finding.fix)}\n")
