"""export and verify."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from onnxsim_embed.cli.options import ColumnOption, ForceOption, LocalOption, TokenOption
from onnxsim_embed.cli.output import print_artifact, print_fidelity
from onnxsim_embed.cli.texts import read_texts


def export(
    model: Annotated[
        str, typer.Argument(help="Recipe name, directory of a checkpoint or ONNX files, or Hub id.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Artifact directory to write; default: ./NAME-onnx."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Comma-separated: fp32,int8,fp16. fp32 is always written; fp16 is for GPUs.",
        ),
    ] = "fp32,int8",
    via: Annotated[
        str,
        typer.Option(
            "--via",
            help="direct (model_type bert), optimum (other architectures), adopt (the directory's own ONNX files), or auto.",
        ),
    ] = "auto",
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            help="mean, cls, max, ...; only where the checkpoint says nothing or is wrong.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")
    ] = None,
    token: TokenOption = None,
    local_files_only: LocalOption = False,
    max_seq_length: Annotated[
        int | None,
        typer.Option("--max-seq-length", help="Tokens kept of a text; default: as the model says."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="NAME=TEXT, put before texts; may be given several times."),
    ] = None,
    matryoshka_dims: Annotated[
        str,
        typer.Option(
            "--matryoshka-dims",
            help="Comma-separated widths to which the model was trained to be cut; recorded.",
        ),
    ] = "",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            help="File of texts like yours, on which int8 ranges are chosen; default: the package's own.",
        ),
    ] = None,
    column: ColumnOption = None,
    bar: Annotated[
        str | None,
        typer.Option(
            "--bar",
            help="Least MEAN,MIN cosine of int8 to fp32; default 0.995,0.98. Below it nothing is written.",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Turn a checkpoint into ONNX files, and prove them faithful."""
    from onnxsim_embed.export import export_model

    texts = None if calibrate is None else read_texts(str(calibrate), column, None)

    if output is None:
        output = Path(
            f"{Path(model).resolve().name if Path(model).is_dir() else model.rsplit('/', 1)[-1]}-onnx"
        )
    started = time.perf_counter()
    names = tuple(name.strip() for name in precision.split(",") if name.strip())
    artifact = export_model(
        model,
        output,
        precisions=names,
        via=via,
        pooling=pooling,
        prompts=_parse_prompts(prompt or []),
        max_seq_length=max_seq_length,
        matryoshka_dims=_parse_dims(matryoshka_dims),
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        calibration=texts,
        min_fidelity=_parse_bar(bar),
        force=force,
    )
    print_artifact(artifact.directory, artifact.manifest)
    typer.echo(f"Exported to {output} in {time.perf_counter() - started:.1f} s.")


def _parse_prompts(given: list[str]) -> dict[str, str]:
    prompts = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not (name and equals):
            raise ValueError(f"--prompt takes NAME=TEXT such as 'query=query: ', got {entry!r}")
        prompts[name] = text
    return prompts


def _parse_dims(given: str) -> list[int]:
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ValueError(f"--matryoshka-dims takes widths such as 256,128,64, got {wrong[0]!r}")
    return [int(part) for part in parts]


def _parse_bar(bar: str | None) -> tuple[float, float] | None:
    if bar is None:
        return None
    try:
        mean, least = (float(part) for part in bar.split(","))
    except ValueError:
        raise ValueError(f"--bar takes MEAN,MIN such as 0.995,0.98, got {bar!r}") from None
    if not (-1 <= mean <= 1 and -1 <= least <= 1):
        raise ValueError(f"--bar takes two cosines from -1 to 1, got {bar!r}")
    return mean, least


def verify(
    directory: Annotated[Path, typer.Argument(help="Artifact directory.")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Checkpoint directory, model name, or torch for the model the artifact names: compares fp32 with it. Default: int8 with fp32 only.",
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="File of texts; default: the package's own.")
    ] = None,
    column: ColumnOption = None,
    bar: Annotated[
        str | None,
        typer.Option("--bar", help="Least MEAN,MIN cosine of int8 to fp32; default 0.995,0.98."),
    ] = None,
) -> None:
    """Compare an artifact with what it was made from; exit 1 if it is not faithful."""
    from onnxsim_embed.artifact.manifest import Artifact
    from onnxsim_embed.errors import VerificationError
    from onnxsim_embed.export import verify_artifact

    artifact = Artifact.open(directory)
    chosen = None if texts is None else read_texts(str(texts), column, None)
    report = verify_artifact(artifact, against=against, texts=chosen, min_fidelity=_parse_bar(bar))
    print_fidelity(report)
    problems = [problem for part in report.values() for problem in part["problems"]]
    if problems:
        raise VerificationError("; ".join(problems))
