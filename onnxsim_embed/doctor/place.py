"""A directory to be examined: its JSON files, each read once and never outside of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from onnxsim_embed.artifact.manifest import outside

ST = "sentence-transformers"
FASTEMBED = "fastembed"
TEI = "text-embeddings-inference"
JS = "transformers.js"
OURS = "onnxsim-embed"
TOKENIZERS = "tokenizers"  # programs that use tokenizer.json through this library, as it is
READERS = (ST, FASTEMBED, TEI, JS, TOKENIZERS, OURS)

# The largest tokenizer.json in use (250,000 words of many languages) have 17 MB.
LARGEST_JSON = 100 << 20


@dataclass(frozen=True)
class Finding:
    """Something that breaks a reader.

    :param file: path inside the directory.
    :param key: of the file; None where it is about the whole file.
    :param readers: those that it breaks.
    :param effect: what happens there.
    :param remedy: what to change.
    :param change: makes the file's right content of the present one (None where there is no file);
        None where no JSON file can mend it.
    """

    file: str
    key: str | None
    readers: tuple[str, ...]
    effect: str
    remedy: str
    change: Callable[[Any], Any] | None = None


class Place:
    """A directory and what was found in it.

    :param directory: artifact or checkpoint.
    :raises FileNotFoundError: if it is no directory.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory")
        self.directory = directory
        self.export = f"make an artifact of it: onnxsim-embed export {directory} -o NEW_DIRECTORY"
        self.findings: list[Finding] = []
        self._read: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        """Return whether a file is there."""
        return (self.directory / name).is_file()

    def table(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object; empty if it is missing or damaged, which is found once."""
        return self._json(name, dict) or {}

    def entries(self, name: str) -> list[Any]:
        """Return a JSON file's list; empty if it is missing or damaged."""
        return self._json(name, list) or []

    def _json(self, name: str, kind: type) -> Any:  # noqa: ANN401
        if name not in self._read:
            self._read[name] = None
            if os.path.lexists(self.directory / name):
                try:
                    self._read[name] = read_json(self.directory, name, kind)
                except (OSError, ValueError) as error:
                    effect = f"cannot be read: {error}"
                    remedy = "get the file again from where the model came from"
                    self.findings.append(Finding(name, None, READERS, effect, remedy))
        return self._read[name]


def read_json(directory: Path, name: str, kind: type) -> Any:  # noqa: ANN401
    """Read a JSON file of a directory.

    :raises ValueError: if it is damaged, too large, of another kind, or not inside the directory.
    """
    path = directory / name
    check_inside(directory, name)
    size = path.stat().st_size
    if not path.is_file() or size > LARGEST_JSON:
        raise ValueError(f"{size:,} bytes are no configuration file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError(f"it holds {type(value).__name__}, not {kind.__name__}")
    return value


def check_inside(directory: Path, name: str) -> None:
    """Refuse a path out of a directory, but for the links that the Hub's cache is made of.

    :raises ValueError: saying where it leads.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or outside(directory / name, directory):
        raise ValueError(f"it leads out of the directory, to {(directory / name).resolve()}")
