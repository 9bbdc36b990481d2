"""cache: the models that were exported on first use."""

from __future__ import annotations

from datetime import datetime

import typer
from typer import Argument

from onnxsim_embed.cli.output import counted, megabytes, print_table

cache = typer.Typer(help="List or remove models that were exported on first use.")


def list_models() -> None:
    """List the cached models, most recently used first."""
    from onnxsim_embed.artifact.cache import list_cached
    from onnxsim_embed.artifact.recipes import cache_directory

    models = list_cached()
    rows = [
        [m.path.name, megabytes(m.size), f"{datetime.fromtimestamp(m.last_used):%F}", m.source]
        for m in models
    ]
    if rows:
        print_table(["name", "size", "last used", "source"], rows)
    size = megabytes(sum(model.size for model in models))
    typer.echo(f"{counted(len(models), 'model')}, {size} in {cache_directory()}")


def clear(names: list[str] | None = Argument(None, help="Models to remove; default: all.")) -> None:
    """Remove cached models; they are exported again when needed."""
    from onnxsim_embed.artifact.cache import clear_cache

    removed = clear_cache(names or None)
    size = megabytes(sum(model.size for model in removed))
    typer.echo(f"Removed {counted(len(removed), 'model')}, {size}.")
