"""A model directory as its readers see it: JSON files, each read once and never outside of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from onnxsim_embed.artifact.manifest import Artifact, is_artifact, outside
from onnxsim_embed.export.checkpoint import AFTER_PADDING, LONGEST_SEQUENCE, TRANSFORMER_CONFIGS
from onnxsim_embed.export.modules import LEGACY_POOLING
from onnxsim_embed.export.tokenizer import SPECIAL_TOKENS

ST = "sentence-transformers"
FASTEMBED = "fastembed"
TEI = "text-embeddings-inference"
JS = "transformers.js"
OURS = "onnxsim-embed"
TOKENIZERS = "tokenizers"  # programs that read tokenizer.json with this library, as it is
READERS = (ST, FASTEMBED, TEI, JS, TOKENIZERS, OURS)

LEGACY_TYPES = "sentence_transformers.models."
# Keys that every version wrote until 5.3; the later ones count as false where they are missing.
FIRST_POOLING_KEYS = ("word_embedding_dimension", "pooling_mode_cls_token", "pooling_mode_max_tokens",
                      "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens")  # fmt: skip

# The largest tokenizer.json in use (250,000 words of many languages) have 17 MB.
MAX_JSON = 100 << 20


@dataclass(frozen=True)
class Finding:
    """A file or key that breaks a reader.

    :param file: path inside the directory.
    :param key: key of the file; None if it is about the whole file.
    :param readers: programs that it breaks.
    :param effect: what happens there.
    :param fix: what to change.
    :param change: turns the file's content (None if there is no file) into the right one; None if no JSON
        file can fix it.
    """

    file: str
    key: str | None
    readers: tuple[str, ...]
    effect: str
    fix: str
    change: Callable[[Any], Any] | None = None


class Directory:
    """A directory, and what its files say.

    :raises FileNotFoundError: if it is not a directory.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a directory")
        self.path = path
        self.damaged: list[Finding] = []
        self._contents: dict[str, Any] = {}

    def has(self, *names: str) -> bool:
        """Return whether one of these files exists."""
        return any((self.path / name).is_file() for name in names)

    def table(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object; empty if it is missing, or damaged and reported once."""
        return self._content(name, dict) or {}

    def _content(self, name: str, kind: type) -> Any:  # noqa: ANN401
        if name not in self._contents:
            self._contents[name] = None
            if os.path.lexists(self.path / name):
                try:
                    self._contents[name] = read_json(self.path, name, kind)
                except (OSError, ValueError) as error:
                    effect = f"cannot be read: {error}"
                    fix = "download the file again from the source of the model"
                    self.damaged.append(Finding(name, None, READERS, effect, fix))
        return self._contents[name]

    @cached_property
    def entries(self) -> list[Any]:
        """Entries of modules.json."""
        return self._content("modules.json", list) or []

    @cached_property
    def modules(self) -> list[dict[str, Any]]:
        """Entries of modules.json; without the file, those that subdirectories leave no doubt about.

        Without a manifest the latter need a Normalize directory: empty ones get lost in copies.
        """
        if self.has("modules.json"):
            return [entry for entry in self.entries if isinstance(entry, dict)]
        matches = [
            re.fullmatch(r"(\d+)_(Pooling|Dense|Normalize)", p.name) for p in self.path.iterdir()
        ]
        kinds = {int(m[1]): m[2] for m in matches if m and (self.path / m[0]).is_dir()}
        normalized = "Normalize" in kinds.values()
        if is_artifact(self.path):
            certain = normalized == Artifact.open(self.path).manifest.normalize
        else:
            certain = normalized
        if (
            not certain
            or "Pooling" not in kinds.values()
            or set(kinds) != {*range(1, len(kinds) + 1)}
        ):
            return []
        paths = [("", "Transformer"), *((f"{i}_{kinds[i]}", kinds[i]) for i in sorted(kinds))]
        return [
            {"idx": i, "name": str(i), "path": path, "type": LEGACY_TYPES + kind}
            for i, (path, kind) in enumerate(paths)
        ]

    @property
    def kinds(self) -> list[str]:
        """Class names of the modules."""
        return [kind_of(entry) for entry in self.modules]

    def module_path(self, kind: str, default: str) -> str:
        """Return the directory of the first module of a kind."""
        return next((str(e.get("path")) for e in self.modules if kind_of(e) == kind), default)

    @property
    def inner_config(self) -> str:
        """Name of config.json in the directory of the Transformer module, where sentence-transformers looks."""
        return str(PurePosixPath(self.module_path("Transformer", "")) / "config.json")

    @property
    def pooling(self) -> str:
        """Name of the pooling configuration."""
        return f"{self.module_path('Pooling', '1_Pooling')}/config.json"

    @property
    def pooling_modes(self) -> list[str]:
        """Pooling modes, in either schema of the configuration."""
        config = self.table(self.pooling)
        stated = config.get("pooling_mode")
        if isinstance(stated, str):
            return stated.split("+")
        if isinstance(stated, list):
            return [str(mode) for mode in stated]
        return [mode.value for key, mode in LEGACY_POOLING.items() if config.get(key)]

    @property
    def legacy_pooling(self) -> dict[str, Any]:
        """Pooling configuration in the legacy schema."""
        config = self.table(self.pooling)
        dim = config.get("word_embedding_dimension") or config.get("embedding_dimension")
        dim = dim or self.table("config.json").get("hidden_size")
        modes = {key: mode.value in self.pooling_modes for key, mode in LEGACY_POOLING.items()}
        return modes | {"word_embedding_dimension": dim}

    @property
    def missing_pooling_keys(self) -> list[str]:
        """Keys of the legacy schema that older readers need."""
        config, right = self.table(self.pooling), self.legacy_pooling
        needed = {*FIRST_POOLING_KEYS, *(key for key, value in right.items() if value is True)}
        return [key for key in right if key in needed and key not in config]

    @property
    def transformer(self) -> str:
        """Name of the file that states max_seq_length, whether it exists or not."""
        return next((n for n in TRANSFORMER_CONFIGS if self.has(n)), TRANSFORMER_CONFIGS[0])

    @property
    def max_seq_length(self) -> Any:  # noqa: ANN401 - JSON
        """What the transformer's configuration states."""
        return self.table(self.transformer).get("max_seq_length")

    @property
    def length(self) -> int | None:
        """Maximum number of tokens, or None if nothing states it."""
        stated = [self.max_seq_length, self.table("tokenizer_config.json").get("model_max_length")]
        valid = [n for n in stated if type(n) is int and 2 < n <= LONGEST_SEQUENCE][:1]
        return min([*valid, *self.positions], default=None)

    @property
    def positions(self) -> list[int]:
        """Number of tokens that the position embeddings allow, if there are any."""
        config = self.table("config.json")
        count, pad = config.get("max_position_embeddings"), config.get("pad_token_id")
        if type(count) is not int or not 2 < count <= LONGEST_SEQUENCE:
            return []
        after_padding = config.get("model_type") in AFTER_PADDING
        return [count - (1 + (pad if type(pad) is int else 0) if after_padding else 0)]

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by key; the padding token by its id, if nothing else names it."""
        tables = [self.table(f"{name}.json") for name in ("tokenizer_config", "special_tokens_map")]
        named = {key: [token_text(table.get(key)) for table in tables] for key in SPECIAL_TOKENS}
        tokens = {key: texts[0] or texts[1] or "" for key, texts in named.items() if any(texts)}
        added = self.table("tokenizer.json").get("added_tokens")
        pad_id = self.table("config.json").get("pad_token_id", 0)
        for entry in added if isinstance(added, list) else []:
            if isinstance(entry, dict) and entry.get("id") == pad_id and token_text(entry):
                tokens.setdefault("pad_token", str(token_text(entry)))
        return tokens


def kind_of(module: dict[str, Any]) -> str:
    """Return the class name of a module."""
    return str(module.get("type")).rpartition(".")[2]


def token_text(token: Any) -> str | None:  # noqa: ANN401 - JSON
    """Return a special token's text; configurations hold it bare or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_json(directory: Path, name: str, kind: type) -> Any:  # noqa: ANN401
    """Read a JSON file of a directory.

    :raises ValueError: if it is damaged, too large, of another type, or outside of the directory.
    """
    path = directory / name
    check_inside(directory, name)
    size = path.stat().st_size
    if not path.is_file() or size > MAX_JSON:
        raise ValueError(f"{size:,} bytes are too large for a configuration file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError(f"it holds {type(value).__name__}, not {kind.__name__}")
    return value


def check_inside(directory: Path, name: str) -> None:
    """Raise ValueError if a path leaves the directory, except by the links of the Hub's cache."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or outside(directory / name, directory):
        raise ValueError(f"it leads out of the directory, to {(directory / name).resolve()}")
