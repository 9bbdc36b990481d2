"""The cache of exported models, keyed by the content of their checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onnxsim_embed import __version__
from onnxsim_embed.artifact.locate import is_complete, locate_checkpoint
from onnxsim_embed.artifact.manifest import FORMAT_VERSION, Artifact, is_artifact, sha256
from onnxsim_embed.artifact.recipes import cache_directory, find_recipe
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.files.atomic import write_json

logger = logging.getLogger(__name__)

# Digests of the checkpoints' files by path, size and times: a warm start hashes nothing.
DIGESTS = "digests.json"

# Formats that no export reads.
IGNORED_SUFFIXES = (".h5", ".msgpack", ".ot", ".md", ".py")

# Exports of other versions of this package are removed once they have not been used for 30 days.
UNUSED_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class CachedModel:
    """An exported model in the cache.

    :param version: version of this package that exported it.
    :param last_used: POSIX time of its last use.
    """

    name: str
    source: str
    version: str
    path: Path
    size: int
    last_used: float


def list_cached() -> list[CachedModel]:
    """Return the models in the cache, most recently used first."""
    models = []
    root = cache_directory()
    for path in (*root.glob("*-*"), *root.glob("ray/*-*")):  # Ray's nodes keep copies of their own
        try:
            manifest = Artifact.open(path).manifest
            files = [entry.stat().st_size for entry in path.rglob("*") if entry.is_file()]
            last_used = path.stat().st_mtime
        except (ArtifactError, OSError):
            continue
        entry = (manifest.name, manifest.source, manifest.tools.get("onnxsim-embed", ""), path)
        models.append(CachedModel(*entry, sum(files), last_used))
    return sorted(models, key=lambda model: (-model.last_used, model.path))


def clear_cache(names: Sequence[str] | None = None) -> list[CachedModel]:
    """Remove models from the cache, and return them; each is exported again on its next use.

    :param names: names, sources or directory names of models; None removes all.
    :raises ValueError: for a name that is not in the cache, listing those that are.
    """
    models = list_cached()
    if names is not None:
        keys = [{model.name, model.source, model.path.name} for model in models]
        if unknown := set(names).difference(*keys):
            known = ", ".join(sorted({model.name for model in models})) or "none"
            raise ValueError(f"{min(unknown)!r} is not among the cached models: {known}")
        models = [model for model, key in zip(models, keys, strict=True) if key & set(names)]
    for model in models:
        _remove(model.path)
    if names is None:
        (cache_directory() / DIGESTS).unlink(missing_ok=True)
        shutil.rmtree(cache_directory() / "openvino", ignore_errors=True)  # what it compiled
        for leftover in cache_directory().glob(".*-*.partial"):  # of exports that were killed
            shutil.rmtree(leftover, ignore_errors=True)
    return models


def locate_artifact(
    name_or_path: str | Path,
    *,
    pooling: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    rebuild: bool = False,
) -> Artifact:
    """Return the artifact of a model; a checkpoint is exported into the cache on first use.

    Two processes that start together export once: the second waits for the first. An unfaithful int8
    file is skipped, and the manifest records it: the search is not repeated each time.

    :param pooling: pooling mode of a checkpoint that states none.
    :param rebuild: whether to export even if the cache holds the model, as when a file is damaged.
    :raises CheckpointError: if the model cannot be located or exported.
    """
    path = Path(name_or_path)
    is_directory = bool(str(name_or_path)) and path.is_dir()
    recipe = None if is_directory else find_recipe(str(name_or_path))
    source = None if is_directory or recipe is not None else str(name_or_path)
    stem = recipe.name if recipe else (source or path.resolve().name).rpartition("/")[2]

    def target_of(checkpoint: Path) -> Path:
        identity = [FORMAT_VERSION, __version__, pooling, source, _content(checkpoint)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        return cache_directory() / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', stem)}-{digest}"

    def accept(copy: Path) -> bool:
        return is_complete(copy) or is_artifact(target_of(copy))

    checkpoint, recipe = locate_checkpoint(
        name_or_path, revision, token=token, local_files_only=local_files_only, accept=accept
    )
    if is_artifact(checkpoint):  # the user's own, or published on the Hub
        if pooling is not None:
            reason = f"{name_or_path} is an exported model, whose pooling is fixed"
            raise ValueError(f"pooling={pooling!r} cannot apply: {reason}")
        return Artifact.open(checkpoint)
    target = target_of(checkpoint)
    if not rebuild and (artifact := _open_cached(target)) is not None:
        return artifact
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock(target)):
        if (artifact := _open_cached(target, check_files=rebuild)) is not None:
            return artifact
        from onnxsim_embed.export import export_model

        logger.warning("exporting %s once, into %s", name_or_path, target)
        if target.is_dir() and not is_artifact(target):
            shutil.rmtree(target)  # ours by its name, and useless without a manifest
        export_model(
            checkpoint,
            target,
            pooling=pooling,
            revision=revision,
            recipe=recipe,
            source=source,
            skip_unfaithful=True,
            force=True,
        )
    for model in list_cached():
        if model.version != __version__ and time.time() - model.last_used > UNUSED_SECONDS:
            logger.info("removing %s, unused for 30 days", model.path)
            _remove(model.path)
    return Artifact.open(target)


def is_cached(artifact: Artifact) -> bool:
    """Return whether an artifact lies in the cache, where it can be exported again."""
    return artifact.directory.parent == cache_directory()


def _open_cached(target: Path, check_files: bool = False) -> Artifact | None:
    """Open an artifact of the cache; None if there is none or it is damaged."""
    if not is_artifact(target):
        return None
    try:
        artifact = Artifact.open(target)
        if check_files:
            artifact.check()
    except ArtifactError as error:
        logger.warning("%s; it will be exported again", error)
        return None
    with suppress(OSError):  # a cache that is read-only
        os.utime(target)  # its last use
    return artifact


def _content(checkpoint: Path) -> list[tuple[str, str]]:
    """Return the path and sha256 of each file of a checkpoint that an export may read."""
    index = cache_directory() / DIGESTS
    try:
        known = dict(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    content, hashed = [], {}
    for path in sorted(checkpoint.resolve().rglob("*")):
        name = path.relative_to(checkpoint.resolve())
        if ".git" in name.parts or path.suffix in IGNORED_SUFFIXES or not path.is_file():
            continue
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known.get(str(path), [])[:-1] != state:
            known[str(path)] = hashed[str(path)] = [*state, sha256(path)]
        content.append((name.as_posix(), known[str(path)][-1]))
    if hashed:
        with suppress(OSError):  # without an index, the next start hashes again
            index.parent.mkdir(parents=True, exist_ok=True)
            present = {name: entry for name, entry in known.items() if Path(name).is_file()}
            write_json(index, present)
    return content


def _remove(path: Path) -> None:
    """Remove an exported model, after a process that exports it now has ended."""
    from filelock import FileLock

    with FileLock(_lock(path)):
        shutil.rmtree(path, ignore_errors=True)
    _lock(path).unlink(missing_ok=True)


def _lock(target: Path) -> Path:
    return target.with_name(target.name + ".lock")
