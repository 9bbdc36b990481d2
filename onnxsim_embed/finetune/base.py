"""The model that fine-tuning begins with."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from onnxsim_embed import __version__
from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export import resolve_via
from onnxsim_embed.export.bert import load_bert
from onnxsim_embed.export.checkpoint import Checkpoint, open_checkpoint
from onnxsim_embed.runtime.embedder import DOCUMENT_PROMPTS

# What trained weights depend on, apart from pairs, settings and the model.
TOOLS = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets")


def open_base(model: str | Path) -> Checkpoint:
    """Open a checkpoint and refuse, before any work, what could not be trained or exported after it.

    :raises CheckpointError: saying what is missing or not supported.
    """
    directory, recipe = locate_checkpoint(model)
    if not (directory / "modules.json").is_file():
        raise CheckpointError(
            f"{directory} has no modules.json: fine-tuning needs a Sentence-Transformers directory, which "
            "says how token vectors become one"
        )
    checkpoint = open_checkpoint(directory, recipe=recipe)
    via = resolve_via(checkpoint)
    if via == "adopted":
        raise CheckpointError(
            f"{directory} holds ONNX files and no weights, so it cannot be trained"
        )
    if via == "direct":
        load_bert(checkpoint.config, checkpoint.tensors())
    return checkpoint


def base_prompts(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return what the model puts before queries and before documents."""
    prompts = checkpoint.prompts
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), "")
    return prompts.get("query", ""), document


def versions() -> dict[str, str]:
    """Return the versions of this package and of the tools that train."""
    return {"onnxsim-embed": __version__} | {name: version(name) for name in TOOLS}
