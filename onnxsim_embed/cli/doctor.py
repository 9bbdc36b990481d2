"""doctor: what would break other readers of a directory, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxsim_embed.cli.texts import counted

if TYPE_CHECKING:
    from onnxsim_embed.doctor import Finding


def doctor(
    directory: Annotated[Path, typer.Argument(help="An artifact or a checkpoint.")],
    reader: Annotated[
        list[str] | None,
        typer.Option(
            "--reader",
            help="sentence-transformers, fastembed, text-embeddings-inference, transformers.js, tokenizers or onnxsim-embed; may be given several times. Default: all.",
        ),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Write the changes to JSON files; all other keys stay."),
    ] = False,
) -> None:
    """Say which files and keys of a directory would break other programs, and what to change.

    Exit code 0 if nothing would, else 1.
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
    mendable = sum(finding.change is not None for finding in findings)
    told = f"{directory}: {counted(len(findings), 'finding')}"
    if mendable:
        told += f"; --fix writes the changes of {mendable}"
    typer.echo(f"{told}.")
    raise typer.Exit(1)


def _print(finding: Finding, readers: tuple[str, ...]) -> None:
    key = "" if finding.key is None else f": {finding.key}"
    affected = ", ".join(name for name in finding.readers if name in readers)
    typer.echo(_printable(f"{finding.file}{key}"))
    typer.echo(_printable(f"  breaks  {affected}"))
    typer.echo(_printable(f"  what    {finding.effect}"))
    typer.echo(_printable(f"  change  {finding.remedy}\n", keep="\n"))


def _printable(text: str, keep: str = "") -> str:
    """Return a text without characters that steer a terminal: names come from the directory."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)
