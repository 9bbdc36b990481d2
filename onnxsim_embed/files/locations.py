"""Files by path or URI: on disks and in object stores, through pyarrow's file systems as Ray Data's are.

A URI may carry options of its file system, s3://bucket/texts?region=eu-west-1, and names in it may be quoted (%20).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import quote, unquote

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import durable_file
from onnxsim_embed.files.texts import KINDS, kind_of, require_pyarrow

# Names that begin so are no data: Hadoop's _SUCCESS, hidden files, what is not whole yet.
HIDDEN = ("_", ".")

WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Storage:
    """A directory; it need not exist.

    :param location: absolute path or URI.
    """

    location: str

    def __str__(self) -> str:
        """Return the location as people read it."""
        return shown(self.location)

    @classmethod
    def at(cls, location: str | Path) -> Storage:
        """Return the directory of a path or URI such as s3://bucket/directory."""
        return cls(absolute(location))

    @property
    def local(self) -> Path | None:
        """Its path, where it is on a disk."""
        system, path = _resolve(self.location)
        return Path(path) if _is_disk(system) else None

    def names(self) -> list[str]:
        """Return the names of the files in it, sorted; none where it does not exist."""
        return sorted(
            entry.base_name for entry in _entries(*_resolve(self.location)) if entry.is_file
        )

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        :raises FileNotFoundError: if it does not exist.
        """
        with self.open(name) as stream:
            return bytes(stream.read())

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading, anywhere in it."""
        with open_file(_below(self.location, name)) as stream:
            yield stream

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; one of this name is replaced.

        :raises TableError: if it cannot be written.
        """
        place = _below(self.location, name)
        try:
            if (directory := self.local) is not None:
                directory.mkdir(parents=True, exist_ok=True)
                with durable_file(directory / name) as stream:
                    stream.write(data)
                return
            system, path = _resolve(place)
            try:
                _put(system, path, data)
            except FileNotFoundError:  # not of an object store, which knows no directories
                system.create_dir(path.rpartition("/")[0], recursive=True)
                _put(system, path, data)
        except OSError as error:
            raise TableError(f"cannot write {shown(place)}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete a file; one that does not exist is no error."""
        system, path = _resolve(_below(self.location, name))
        with suppress(FileNotFoundError):
            system.delete_file(path)


def absolute(location: str | Path) -> str:
    """Return a path or URI that means the same wherever the process is."""
    if is_uri(location):
        root, path, options = _split(str(location))
        return root + path.rstrip("/") + options
    return str(Path(os.path.abspath(location)))


def is_uri(location: str | Path) -> bool:
    """Return whether a location is a URI rather than a path."""
    return "://" in str(location)


def is_directory(location: str | Path) -> bool:
    """Return whether a path is a directory; a URI is taken for one."""
    return is_uri(location) or Path(location).is_dir()


def shown(location: str) -> str:
    """Return a location as people read it: without quoting, options or passwords."""
    if not is_uri(location):
        return location
    root, path, _ = _split(location)
    return without_passwords(root) + unquote(path)


def without_passwords(text: str) -> str:
    """Return a text in which no URI has a user and password."""
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://", text)


@contextmanager
def open_file(location: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, anywhere in it.

    :raises FileNotFoundError: if it does not exist.
    """
    system, path = _resolve(location)
    try:
        opened = system.open_input_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file {shown(location)}") from None
    with opened as stream:
        yield cast("IO[bytes]", stream)


def find_files(location: str | Path) -> list[str]:
    """Return the files of texts that a path, directory, pattern or URI means, sorted.

    Of a directory those whose ending says what they are, at any depth. In a pattern, `*`, `?` (of a path: in a URI
    it begins the options) and `[...]` stand for part of a name, `**` for directories. Names that begin with a
    dot or an underscore are found where a part of a pattern begins so. What exists is no pattern.

    :raises FileNotFoundError: if there are none.
    """
    from pyarrow import fs

    whole, given = absolute(location), without_passwords(str(location))
    system, path = _resolve(whole)
    kind = system.get_file_info(path).type
    if kind == fs.FileType.File:
        return [whole]
    if kind == fs.FileType.Directory:
        found = [file for file in _files_below(system, path) if kind_of(file) in KINDS]
        missing = (
            f"there is no file of texts in {given}; known are {', '.join(KINDS)} (also .gz); files "
            f"of other endings need a pattern such as {given.rstrip('/')}/* and their format"
        )
    else:
        parts = PurePosixPath(path).parts
        fixed = next((i for i, part in enumerate(parts) if WILDCARD.search(part)), None)
        if fixed is None:
            raise FileNotFoundError(f"there is no file {given}")
        above = str(PurePosixPath(*parts[:fixed])) if fixed else ""
        found = list(_matching(system, above, parts[fixed:]))
        missing = f"no file matches {given}"
    if not found:
        raise FileNotFoundError(missing)
    return [_locate(whole, file) for file in sorted(found)]


def _matching(system: Any, directory: str, patterns: Sequence[str]) -> Iterator[str]:  # noqa: ANN401 - pyarrow is untyped
    """Yield the files that a pattern means; looks only where one can be."""
    if patterns[0] == "**":
        for path in _files_below(system, directory):
            if _matches(PurePosixPath(path).relative_to(directory).parts, patterns):
                yield path
        return
    for entry in _entries(system, directory):
        if not _fits(entry.base_name, patterns[0]):
            continue
        if len(patterns) == 1 and entry.is_file:
            yield entry.path
        elif len(patterns) > 1 and not entry.is_file:
            yield from _matching(system, entry.path, patterns[1:])


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[skip:], patterns[1:]) for skip in range(len(names) + 1))
    return bool(names) and _fits(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (not name.startswith(HIDDEN) or name[0] == pattern[0])


def _files_below(system: Any, directory: str) -> Iterator[str]:  # noqa: ANN401
    """Yield the files in a directory, at any depth, but those of hidden names.

    On a disk each directory is entered once, as links may lead in a circle.
    """
    if not _is_disk(system):
        for entry in _entries(system, directory, recursive=True):
            names = PurePosixPath(entry.path).relative_to(directory).parts
            if entry.is_file and not any(name.startswith(HIDDEN) for name in names):
                yield entry.path
        return
    seen = {os.path.realpath(directory)}
    for above, below, files in os.walk(directory, onerror=_refuse, followlinks=True):
        inner = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(above, name))
            if not name.startswith(HIDDEN) and real not in seen:
                seen.add(real)
                inner.append(name)
        below[:] = inner
        paths = [os.path.join(above, name) for name in files if not name.startswith(HIDDEN)]
        yield from filter(os.path.isfile, paths)


def _refuse(error: OSError) -> None:
    """Tell of a directory that cannot be read, which is not one that is not there."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _entries(system: Any, directory: str, recursive: bool = False) -> list[Any]:  # noqa: ANN401
    """Return what pyarrow says of the files and directories in a directory; nothing where there is none."""
    from pyarrow import fs

    selector = fs.FileSelector(directory, allow_not_found=True, recursive=recursive)
    try:
        found = system.get_file_info(selector)
    except NotADirectoryError:
        return []
    return [entry for entry in found if entry.type in (fs.FileType.File, fs.FileType.Directory)]


def _put(system: Any, path: str, data: bytes) -> None:  # noqa: ANN401
    with system.open_output_stream(path) as stream:  # object stores show it when it is whole
        stream.write(data)


def _split(location: str) -> tuple[str, str, str]:
    """Return scheme and host of a URI, the path on it, and the options with their question mark."""
    scheme, _, rest = location.partition("://")
    rest, mark, options = rest.partition("?")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}/", path, mark + options


def _below(location: str, name: str) -> str:
    """Return the location of a file in a directory."""
    if not is_uri(location):
        return os.path.join(location, name)
    root, path, options = _split(location)
    return root + "/".join(part for part in (path, quote(name)) if part) + options


def _locate(location: str, path: str) -> str:
    """Return the location of a path on the file system of another location."""
    if not is_uri(location):
        return path
    root, _, options = _split(location)
    _, above = _resolve(root + options)
    return _below(root + options, path.removeprefix(above).lstrip("/"))


def _is_disk(system: Any) -> bool:  # noqa: ANN401
    from pyarrow import fs

    return isinstance(system, fs.LocalFileSystem)


def _resolve(location: str) -> tuple[Any, str]:
    """Return a file system and the path on it.

    :raises ValueError: for a URI that is none, or of a system that is not known.
    """
    require_pyarrow()
    from pyarrow import fs

    if not is_uri(location):
        return fs.LocalFileSystem(), location
    root, path, options = _split(location)
    system, above = _connect(root + options)
    return system, os.path.join(above, unquote(path)) if path else above


@lru_cache(maxsize=64)  # connecting may ask over the network where a bucket is
def _connect(root: str) -> tuple[Any, str]:
    import pyarrow
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(root)
    except (pyarrow.ArrowException, ValueError, ImportError) as error:
        told = without_passwords(str(error))
        raise ValueError(f"cannot open {shown(root)}: {told}") from None
    return system, path
