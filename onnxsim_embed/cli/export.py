"""export: a checkpoint to an artifact."""

from __future__ import annotations

import time
from pathlib import Path

import typer
from typer import Argument, Option

from onnxsim_embed.cli import options
from onnxsim_embed.cli.inputs import TextInputs
from onnxsim_embed.cli.output import print_artifact


def export(
    inputs: TextInputs,
    model: str = Argument(
        ..., help="Recipe name, directory of a checkpoint or ONNX files, or Hub id."
    ),
    output: Path | None = Option(
        None, "--output", "-o", help="Artifact directory to write; default: ./NAME-onnx."
    ),
    precision: str = Option(
        "fp32,int8", help="fp32, int8, fp16 (for GPUs); fp32 is always written."
    ),
    via: str = Option(
        "auto", help="direct (BERT family), torch or optimum (others), adopt (ONNX files) or auto."
    ),
    pooling: str | None = Option(None, help="mean, cls, max, ...; overrides the checkpoint's own."),
    revision: str | None = Option(None, help="Branch, tag or commit of a Hub id."),
    token: options.Token = None,
    local_files_only: options.Local = False,
    max_seq_length: int | None = Option(
        None, help="Maximum tokens of a text; default: the model's."
    ),
    prompt: list[str] | None = Option(None, help="NAME=TEXT, prepended to texts; may be repeated."),
    matryoshka_dims: str = Option(
        "", help="Dimensions to which vectors may be truncated, as 256,128,64."
    ),
    calibrate: Path | None = Option(
        None, help="Texts for the int8 quantization; default: the package's own."
    ),
    min_fidelity: options.MinFidelity = None,
    bar: options.Bar = None,
    int8_effort: float = Option(
        0.05, help="Share of time that the float32 parts of int8 may add; 0 for none."
    ),
    onnx_output: str | None = Option(
        None, help="Output of adopted ONNX files that holds the hidden states; default: detected."
    ),
    pooled: bool = Option(
        False, "--pooled", help="Also write files whose output is the vector: model_pooled.onnx."
    ),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Export a checkpoint to ONNX files, and verify them against the reference.

    Nothing is written if the export is less faithful than --min-fidelity.
    """
    from onnxsim_embed.export import export_model

    if output is None:
        path = Path(model)
        name = path.resolve().name if path.is_dir() else model.rsplit("/", 1)[-1]
        output = Path(f"{name}-onnx")
    started = time.perf_counter()
    artifact = export_model(
        model,
        output,
        precisions=tuple(options.split(precision)),
        via=via,
        pooling=pooling,
        prompts=_parse_prompts(prompt or []),
        max_seq_length=max_seq_length,
        matryoshka_dims=_parse_dims(matryoshka_dims),
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        calibration=None if calibrate is None else inputs.read_texts(calibrate),
        min_fidelity=options.parse_min_fidelity(bar if min_fidelity is None else min_fidelity),
        force=force,
        onnx_output=onnx_output,
        pooled=pooled,
        int8_effort=int8_effort,
    )
    if quiet:
        return
    print_artifact(artifact.directory, artifact.manifest)
    typer.echo(f"Exported to {output} in {time.perf_counter() - started:.1f} s.")


def _parse_prompts(entries: list[str]) -> dict[str, str]:
    prompts = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not (name and equals):
            raise ValueError(f"--prompt: expected NAME=TEXT such as 'query=query: ', got {entry!r}")
        prompts[name] = text
    return prompts


def _parse_dims(text: str) -> list[int]:
    for part in options.split(text):
        if not part.isdecimal():
            raise ValueError(f"--matryoshka-dims: expected 256,128,64 or the like, got {part!r}")
    return [int(part) for part in options.split(text)]
