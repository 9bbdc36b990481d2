"""Checkpoint -> artifact. Needs the `export` extra; no module of the run time imports this package."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from onnxsim_embed.errors import MissingExtraError

if TYPE_CHECKING:
    from onnxsim_embed.export.api import export_model, verify_recipe
    from onnxsim_embed.export.verify import verify_artifact

__all__ = ["export_model", "verify_artifact", "verify_recipe"]
_HOMES = {"export_model": "api", "verify_artifact": "verify", "verify_recipe": "api"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == "api" and find_spec("onnx") is None:
        raise MissingExtraError("exporting a model", "export", "onnx")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
