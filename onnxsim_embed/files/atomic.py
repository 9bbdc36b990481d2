"""Atomic writes: a file or directory appears complete and on disk, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from onnxsim_embed.files.uris import local_path
from onnxsim_embed.system.units import format_bytes


def check_output(path: str | Path, force: bool) -> None:
    """Raise, before any work, if a file cannot be written after it."""
    path = local_path(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; choose another name")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; replace it with force=True, or choose another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise PermissionError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `target` when the block succeeds.

    A failure or an interruption leaves the target as it was and removes the temporary directory; a
    killed process may leave it behind, hidden and unused.
    """
    target = local_path(target).resolve()  # of a link, the target is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _temporary(target)
    work.mkdir()
    try:
        yield work
        for path in (work, *work.rglob("*")):
            _sync(path)
        old = work.with_suffix(".old")
        exists = target.exists()
        if exists:
            target.rename(old)
        try:
            work.rename(target)
        except BaseException:  # KeyboardInterrupt too
            if exists:
                old.rename(target)
            raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file name; the file replaces `target` when the block succeeds."""
    target = local_path(target).absolute()
    work = _temporary(target)
    try:
        yield work
        _sync(work)
        os.replace(work, target)
        _sync(target.parent)
    except OSError as error:
        written = work.stat().st_size if work.exists() else 0
        raise explain_full_disk(error, target, f"more than {format_bytes(written)}") from error
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def durable_file(target: Path) -> Iterator[IO[bytes]]:
    """Yield a stream whose content replaces `target` when the block succeeds."""
    with atomic_file(target) as work, work.open("wb") as stream:
        yield stream


def explain_full_disk(error: OSError, path: Path, takes: str) -> OSError:
    """Return an error of a full disk with the bytes needed (in words) and free; others as they are."""
    reason = error.strerror or str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not (full or "requested and" in reason):  # numpy's words for a short write
        return error
    free = format_bytes(shutil.disk_usage(path.parent).free)
    return OSError(
        error.errno or errno.ENOSPC, f"{reason}: {path.name} takes {takes}, {free} are free"
    )


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - what json takes
    """Write a value as JSON, atomically."""
    with durable_file(path) as stream:
        stream.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:  # noqa: ANN401
    """Return the content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _temporary(target: Path) -> Path:
    """Return a hidden name beside the target that no other thread, process or machine uses."""
    return target.parent / f".{target.name[:40]}.{uuid4().hex}.partial"


def _sync(path: Path) -> None:
    """Wait until a file, or a directory's list of files, is on disk."""
    windows = os.name == "nt"  # opens no directories, and syncs what is open for writing
    if not path.exists() or (windows and path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
