"""Files by path or URI, on disks and in object stores, through pyarrow's file systems as in Ray Data.

A URI may carry options of its file system, s3://bucket/texts?region=eu-west-1, and quoted names (%20).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import quote, unquote

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import durable_file
from onnxsim_embed.files.parquet import require_pyarrow
from onnxsim_embed.files.rows import KINDS, kind_of
from onnxsim_embed.files.uris import display_name, is_uri, split_uri

# Names that begin so are no data: Hadoop's _SUCCESS, hidden files, unfinished ones.
HIDDEN = ("_", ".")

WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Directory:
    """A directory by path or URI, for example s3://bucket/directory; it need not exist."""

    location: str

    def __init__(self, location: str | Path) -> None:
        object.__setattr__(self, "location", absolute(location))

    def __str__(self) -> str:
        """Return the location for messages."""
        return display_name(self.location)

    def __repr__(self) -> str:
        return f"Directory({str(self)!r})"

    @property
    def local(self) -> Path | None:
        """The path of a directory on a disk, None in an object store."""
        system, path = _resolve(self.location)
        return Path(path) if system.type_name == "local" else None

    def names(self) -> list[str]:
        """Return the sorted names of its files; none if it does not exist."""
        return sorted(entry.base_name for entry in _files(*_resolve(self.location)))

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with self.open(name) as stream:
            return bytes(stream.read())

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file for random access reading."""
        return open_file(_join(self.location, name))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file, atomically."""
        location = _join(self.location, name)
        try:
            if (directory := self.local) is not None:
                directory.mkdir(parents=True, exist_ok=True)
                with durable_file(directory / name) as stream:
                    stream.write(data)
                return
            system, path = _resolve(location)
            try:
                _put(system, path, data)
            except FileNotFoundError:  # of a file system with directories
                system.create_dir(path.rpartition("/")[0], recursive=True)
                _put(system, path, data)
        except OSError as error:
            raise TableError(f"cannot write {display_name(location)}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        system, path = _resolve(_join(self.location, name))
        with suppress(FileNotFoundError):
            system.delete_file(path)


def absolute(location: str | Path) -> str:
    """Return a path or URI that does not depend on the working directory."""
    if is_uri(location):
        root, path, options = split_uri(str(location))
        return root + path.rstrip("/") + options
    return str(Path(os.path.abspath(location)))


@contextmanager
def open_file(location: str) -> Iterator[IO[bytes]]:
    """Open a file for random access reading."""
    system, path = _resolve(location)
    try:
        opened = system.open_input_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file {display_name(location)}") from None
    with opened as stream:
        yield cast("IO[bytes]", stream)


def file_version(location: str) -> str:
    """Return the size and time of the last change of a file."""
    system, path = _resolve(location)
    info = system.get_file_info(path)
    return f"{info.size} {info.mtime_ns}"


def find_files(location: str | Path) -> list[str]:
    """Return the sorted text files of a path, directory, glob pattern or URI.

    A directory is searched at any depth for files with a known ending. In a pattern, `*`, `?` (not in
    a URI, where it begins the options) and `[...]` match part of a name, `**` any directories. Names
    that begin with a dot or an underscore match only a pattern that begins so. An existing file is
    never a pattern.

    :raises FileNotFoundError: if there are none.
    """
    root, name = absolute(location), display_name(location)
    system, path = _resolve(root)
    from pyarrow import fs  # not before its absence was named

    kind = system.get_file_info(path).type
    if kind == fs.FileType.File:
        return [root]
    directory, parts = PurePosixPath(path), PurePosixPath(path).parts
    fixed = next((i for i, part in enumerate(parts) if WILDCARD.search(part)), len(parts))
    patterns: Sequence[str] = ("**", "*")
    error = f"no text files in {name}: known endings are {', '.join(KINDS)} (also .gz)"
    if kind != fs.FileType.Directory:
        directory, patterns = PurePosixPath(*parts[:fixed]), parts[fixed:]
        error = f"no file matches {name}" if patterns else f"there is no file {name}"
    files = [
        file
        for file in (_files_below(system, str(directory), patterns) if patterns else ())
        if _matches(PurePosixPath(file).relative_to(directory).parts, patterns)
        and (kind != fs.FileType.Directory or kind_of(file) in KINDS)
    ]
    if not files:
        raise FileNotFoundError(error)
    return [_relocate(root, file) for file in sorted(files)]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns or not names:
        return not names and set(patterns) <= {"**"}
    hidden = names[0].startswith(HIDDEN)
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (not hidden and _matches(names[1:], patterns))
    shown = not hidden or names[0][0] == patterns[0][0]
    return shown and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _files_below(system: Any, directory: str, patterns: Sequence[str]) -> Iterator[str]:  # noqa: ANN401
    """Yield the files below a directory, no deeper than the patterns; links may form a cycle."""
    if system.type_name != "local":
        yield from (
            entry.path
            for entry in _files(system, directory, len(patterns) > 1 or patterns[0] == "**")
        )
        return
    seen = {os.path.realpath(directory)}
    hidden = any(pattern.startswith(HIDDEN) for pattern in patterns)
    for parent, directories, files in os.walk(directory, onerror=_raise, followlinks=True):
        depth = len(PurePosixPath(parent).relative_to(directory).parts) + 1
        candidates, directories[:] = sorted(directories), []
        for name in candidates if depth < len(patterns) or "**" in patterns else ():
            real = os.path.realpath(os.path.join(parent, name))
            if real not in seen and (hidden or not name.startswith(HIDDEN)):
                seen.add(real)
                directories.append(name)
        yield from filter(os.path.isfile, (os.path.join(parent, name) for name in files))


def _raise(error: OSError) -> None:
    """Raise if a directory cannot be read; one that is gone is no error."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _files(system: Any, directory: str, recursive: bool = False) -> list[Any]:  # noqa: ANN401
    """Return pyarrow's information on the files in a directory, if it exists."""
    from pyarrow import fs

    selector = fs.FileSelector(directory, allow_not_found=True, recursive=recursive)
    with suppress(NotADirectoryError):
        return [entry for entry in system.get_file_info(selector) if entry.is_file]
    return []


def _put(system: Any, path: str, data: bytes) -> None:  # noqa: ANN401
    with system.open_output_stream(path) as stream:  # object stores publish complete files only
        stream.write(data)


def _join(location: str, name: str) -> str:
    """Return the location of a file in a directory."""
    if not is_uri(location):
        return os.path.join(location, name)
    root, path, options = split_uri(location)
    return root + "/".join(part for part in (path, quote(name)) if part) + options


def _relocate(location: str, path: str) -> str:
    """Return the location of a path on the file system of another location."""
    if not is_uri(location):
        return path
    root, _, options = split_uri(location)
    _, base = _resolve(root + options)
    return _join(root + options, path.removeprefix(base).lstrip("/"))


def _resolve(location: str) -> tuple[Any, str]:
    """Return a file system and the path on it."""
    require_pyarrow()
    import pyarrow
    from pyarrow import fs

    if not is_uri(location):
        return fs.LocalFileSystem(), location
    root, path, options = split_uri(location)
    try:
        system, base = _connect(root + options)
    except (pyarrow.ArrowException, ValueError, ImportError) as error:
        reason = str(error)
        if "@" in location or options:  # of which the library may quote any part
            reason = "invalid URI; user, password and options must be percent-encoded"
        raise ValueError(f"cannot open {display_name(location)}: {reason}") from None
    return system, os.path.join(base, unquote(path)) if path else base


@lru_cache(maxsize=64)  # connecting may ask over the network where a bucket is
def _connect(root: str) -> tuple[Any, str]:
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(root)
    return system, path
