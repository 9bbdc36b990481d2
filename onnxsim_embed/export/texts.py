"""Small readers: the texts that ship with the package, and the JSON files of checkpoints."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError


def read_texts(name: str) -> list[str]:
    """Return the texts of a JSON lines file in the package's data folder."""
    lines = files("onnxsim_embed").joinpath("data", name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines if line]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    :raises CheckpointError: naming the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value
