"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "all-MiniLM-L6-v2"

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Recipe name, artifact, checkpoint directory or Hub id."),
]
Precision = Annotated[
    str, typer.Option("--precision", help="Weight precision: auto, fp32, int8 or fp16.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Default: all CPUs of this process.")
]
Column = Annotated[str | None, typer.Option("--column", "-c", help="Column of the texts.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing outputs.")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="csv, tsv, jsonl, parquet or txt; default: the file's suffix."),
]
Delimiter = Annotated[
    str | None, typer.Option("--delimiter", help="Of csv and tsv; default: detected.")
]
NoHeader = Annotated[
    bool, typer.Option("--no-header", help="csv and tsv without column names; they are 0, 1, ...")
]
OnError = Annotated[
    str, typer.Option("--on-error", help="For rows without a text: fail, skip or blank.")
]
Vectors = Annotated[
    Path | None,
    typer.Option(
        "--vectors", help="Vectors of the rows, .npy or .parquet; default: encode the texts."
    ),
]
MinFidelity = Annotated[
    str | None,
    typer.Option(
        "--min-fidelity",
        metavar="MEAN,MIN",
        help="Minimum mean and worst-case cosine of int8 against fp32; default: 0.995,0.98.",
    ),
]
Bar = Annotated[str | None, typer.Option("--bar", hidden=True)]  # before: --min-fidelity
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="HF_TOKEN", show_envvar=True, help="Access token of the Hugging Face Hub."
    ),
]
Local = Annotated[
    bool, typer.Option("--local-files-only", help="Use cached Hub models; no network.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="ray: run on a Ray cluster, or on all CPUs of this machine; writes a directory.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_ADDRESS",
        show_envvar=True,
        help="With --engine ray: host:port of the cluster, or auto; default: start one locally.",
    ),
]


def split(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_min_fidelity(text: str | None) -> tuple[float, float] | None:
    """Parse MEAN,MIN of --min-fidelity."""
    if text is None:
        return None
    try:
        mean, least = (float(part) for part in text.split(","))
    except ValueError:
        mean = least = float("nan")
    if not (-1 <= mean <= 1 and -1 <= least <= 1):
        raise ValueError(f"--min-fidelity: expected two cosines such as 0.995,0.98, got {text!r}")
    return mean, least


def on_ray(engine: str | None, only_ray: dict[str, object], only_local: dict[str, object]) -> bool:
    """Return whether a command runs on Ray, after checking that its options fit.

    :param only_ray: values of the options that need Ray, by name; None and False are not set.
    :param only_local: values of the options that Ray does not support.
    """
    if engine not in (None, "ray"):
        raise ValueError(f"unknown engine {engine!r}; allowed is ray")
    wrong, message = (
        (only_local, "cannot be combined with") if engine == "ray" else (only_ray, "requires")
    )
    for name, value in wrong.items():
        if value not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} {message} --engine ray")
    return engine == "ray"
