"""Files by path or URI: on disks and in object stores, through pyarrow's file systems as Ray Data's are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from onnxsim_embed.artifact import durable_file
from onnxsim_embed.errors import TableError
from onnxsim_embed.tables import KINDS, kind_of, require_pyarrow

WILDCARDS = frozenset("*?[")


@dataclass(frozen=True)
class Storage:
    """A directory; it need not exist.

    :param location: absolute path or URI.
    """

    location: str

    @classmethod
    def at(cls, location: str | Path) -> Storage:
        """Return the directory of a path or URI such as s3://bucket/directory."""
        return cls(absolute(location))

    @property
    def local(self) -> Path | None:
        """Its path, where it is on a disk."""
        _, path = _resolve(self.location)
        return Path(path) if _is_disk(self.location) else None

    def names(self) -> list[str]:
        """Return the names of the files in it, sorted; none where it does not exist."""
        from pyarrow import fs

        system, path = _resolve(self.location)
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(entry.base_name for entry in found if entry.type == fs.FileType.File)

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        :raises FileNotFoundError: if it does not exist.
        """
        with self.open(name) as stream:
            return bytes(stream.read())

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading, anywhere in it."""
        with open_file(f"{self.location}/{name}") as stream:
            yield stream

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; one of this name is replaced.

        :raises TableError: if it cannot be written.
        """
        try:
            if (directory := self.local) is not None:
                directory.mkdir(parents=True, exist_ok=True)
                with durable_file(directory / name) as stream:
                    stream.write(data)
                return
            system, path = _resolve(f"{self.location}/{name}")
            with system.open_output_stream(
                path
            ) as stream:  # object stores show it when it is whole
                stream.write(data)
        except OSError as error:
            raise TableError(f"cannot write {self.location}/{name}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete a file; one that does not exist is no error."""
        system, path = _resolve(f"{self.location}/{name}")
        with suppress(FileNotFoundError):
            system.delete_file(path)


def absolute(location: str | Path) -> str:
    """Return a path or URI that means the same wherever the process is."""
    if "://" in str(location):
        return str(location).rstrip("/")
    return str(Path(os.path.abspath(location)))


@contextmanager
def open_file(location: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, anywhere in it.

    :raises FileNotFoundError: if it does not exist.
    """
    system, path = _resolve(location)
    try:
        opened = system.open_input_file(path)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"there is no file {location}") from None
    with opened as stream:
        yield cast("IO[bytes]", stream)


def find_files(location: str | Path) -> list[str]:
    """Return the files of texts that a path, directory, pattern or URI means, sorted.

    Of a directory those whose ending says what they are, at any depth, but for names that begin with a
    dot or an underscore. In a pattern, `*`, `?` and `[...]` stand for part of a name, `**` for directories.

    :raises FileNotFoundError: if there are none.
    """
    from pyarrow import fs

    whole = absolute(location)
    pattern = bool(WILDCARDS & set(whole)) and not Path(whole).exists()
    parts = PurePosixPath(whole.partition("://")[2] or whole).parts
    fixed = whole
    if pattern:
        first = next(i for i, part in enumerate(parts) if WILDCARDS & set(part))
        scheme = whole[: whole.index("://") + 3] if "://" in whole else ""
        fixed = scheme + str(PurePosixPath(*parts[:first]))
    system, path = _resolve(fixed)
    info = system.get_file_info(path)
    if info.type == fs.FileType.File:
        return [fixed]
    found = []
    for entry in system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True)):
        below = PurePosixPath(entry.path).relative_to(path)
        if entry.type != fs.FileType.File or any(part[0] in "._" for part in below.parts):
            continue
        wanted = _matches(below.parts, parts[first:]) if pattern else kind_of(entry.path) in KINDS
        if wanted:
            found.append(f"{fixed}/{below}")
    if not found:
        what = "no file matches" if pattern else "there is no file of texts at"
        raise FileNotFoundError(f"{what} {location}; known are {', '.join(KINDS)} (also .gz)")
    return sorted(found)


def _matches(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[skip:], patterns[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _is_disk(location: str) -> bool:
    from pyarrow import fs

    return isinstance(_resolve(location)[0], fs.LocalFileSystem)


@lru_cache(maxsize=256)
def _resolve(location: str) -> tuple[Any, str]:
    """Return a file system and the path in it.

    :raises ValueError: for a URI that is none, or of a system that is not known.
    """
    require_pyarrow()
    import pyarrow
    from pyarrow import fs

    if "://" not in location:
        return fs.LocalFileSystem(), location
    try:
        system, path = fs.FileSystem.from_uri(location)
    except (pyarrow.ArrowException, ValueError, ImportError) as error:
        raise ValueError(f"cannot open {location}: {error}") from None
    return system, path
