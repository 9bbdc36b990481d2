"""Atomic writes: a file or directory appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def check_output(path: Path, force: bool) -> None:
    """Refuse, before any work, a file that could not be written after it.

    :raises FileExistsError: if it is a directory, or exists and is not to be replaced.
    :raises FileNotFoundError: if its directory does not exist.
    """
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; choose another name")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; replace it with --force, or choose another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a temporary directory beside `target` that takes its place when the block ends well.

    A failure or an interruption leaves what was at `target` untouched and removes the temporary
    directory; a kill can leave a hidden one behind, which nothing reads.
    """
    target = target.resolve()  # behind a link, what it points to is replaced, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        if target.exists():
            old = work.with_suffix(".old")
            target.rename(old)
            try:
                work.rename(target)
            except BaseException:  # KeyboardInterrupt too
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a temporary file name beside `target` that takes its place when the block ends well."""
    work = target.absolute().parent / f".{target.name}.{os.getpid()}.partial"
    try:
        yield work
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def durable_file(target: Path) -> Iterator[BinaryIO]:
    """Give a stream whose bytes are on the disk as `target` when the block ends well; else nothing changes."""
    with atomic_file(target) as work, work.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
