"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_MODEL = "all-MiniLM-L6-v2"

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Recipe name, artifact, checkpoint directory or Hub id."),
]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto, fp32, int8 or fp16.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Default: every processor this process may use."),
]
ColumnOption = Annotated[
    str | None, typer.Option("--column", "-c", help="Column that holds the texts.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", help="csv, tsv, jsonl, parquet or txt; default: by the file's ending."
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="HF_TOKEN", show_envvar=True, help="Access token of the Hugging Face Hub."
    ),
]
LocalOption = Annotated[
    bool,
    typer.Option("--local-files-only", help="Take Hub models from the local cache; no network."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine", help="ray: run on a Ray cluster, or as one on this machine; writes a directory."
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_ADDRESS",
        show_envvar=True,
        help="With --engine ray: the cluster, host:port or auto; default: start one on this machine.",
    ),
]


def on_ray(engine: str | None) -> bool:
    """Return whether Ray is to run a command.

    :raises ValueError: for another engine.
    """
    if engine not in (None, "ray"):
        raise ValueError(f"unknown engine {engine!r}; known is ray")
    return engine == "ray"
