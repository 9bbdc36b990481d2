"""Texts for measurements that need no download: the documentation of installed packages.

Docstrings of Python, numpy and scipy, which are wherever this package is. What a text is depends on
their versions, so that results name them and a digest of the texts.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path

PACKAGES = ("numpy", "scipy")

# Words of a text: about as long as the sentences of STS-B, as a project's description, and longer than
# the 512 tokens that most models take at most.
SHORT_WORDS = (5, 20)
DESCRIPTION_WORDS = (40, 120)
LONG_WORDS = 450

SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")
DIRECTORIES_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Texts of one kind, all different.

    :param kind: short, descriptions, long; or texts, of the user's own file.
    :param source: where they come from, for whoever reads the figures.
    """

    kind: str
    source: str
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The texts' sha256, shortened."""
        return hashlib.sha256("\0".join(self.texts).encode("utf-8", "replace")).hexdigest()[:16]


def file_corpus(texts: Sequence[str], name: str, most: int) -> Corpus:
    """Return a user's own texts: different ones, spread over the file.

    :param name: of the file, without directories.
    :param most: so many at most.
    """
    different = list(dict.fromkeys(texts))
    step = max(1, len(different) // most)
    return Corpus("texts", name, tuple(different[::step][:most]))


def documentation(kind: str, count: int) -> Corpus:
    """Return texts of one kind from the documentation of installed packages.

    :param kind: short, descriptions or long.
    :param count: how many; fewer where the packages do not hold so many.
    :raises ValueError: for another kind.
    """
    kinds = {
        "short": _pieces(SHORT_WORDS, SENTENCE_END),
        "descriptions": _pieces(DESCRIPTION_WORDS),
        "long": _long_texts(),
    }
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    texts = tuple(islice(_different(kinds[kind]), count))
    names = [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)]
    return Corpus(kind, f"documentation of {', '.join(names)}", texts)


def _different(texts: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _pieces(words: tuple[int, int], end: re.Pattern[str] | None = None) -> Iterator[str]:
    """Yield paragraphs, or the sentences of them, of a number of words."""
    low, high = words
    for paragraph in chain.from_iterable(_modules()):
        for piece in [paragraph] if end is None else end.split(paragraph):
            if low <= piece.count(" ") + 1 <= high and is_prose(piece):
                yield piece


def _long_texts() -> Iterator[str]:
    for module in _modules():
        words, parts = 0, []
        for paragraph in module:
            if is_prose(paragraph):
                parts.append(paragraph)
                words += paragraph.count(" ") + 1
            if words >= LONG_WORDS:
                yield "\n\n".join(parts)
                words, parts = 0, []


def is_prose(text: str) -> bool:
    """Return whether a text is sentences rather than code, a table or a list of names."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return (
        text[:1].isupper()
        and text[-1:] in ".!?"
        and letters >= 0.9 * len(text)
        and ">>>" not in text
    )


def _modules() -> Iterator[list[str]]:
    """Yield the paragraphs of each module's docstrings, modules in an order that mixes packages."""
    for path in _sources():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other people's escapes
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        paragraphs: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                paragraphs += (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
        if paragraphs:
            yield [paragraph for paragraph in paragraphs if paragraph]


def _sources() -> list[Path]:
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        roots += map(Path, (found.submodule_search_locations or []) if found else [])
    named = [
        (path.relative_to(root.parent).as_posix(), path)
        for root in roots
        for path in root.rglob("*.py")
        if not DIRECTORIES_LEFT_OUT & set(path.relative_to(root).parts)
    ]
    return [
        path
        for _, path in sorted(named, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    ]
