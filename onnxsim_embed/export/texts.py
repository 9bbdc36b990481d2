"""The texts that ship with the package."""

from __future__ import annotations

import json
from importlib.resources import files


def read_texts(name: str) -> list[str]:
    """Return the texts of a JSON lines file in the package's data folder."""
    lines = files("onnxsim_embed").joinpath("data", name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines if line]
