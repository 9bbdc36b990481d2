"""Rows of a file that is not finished yet, in a hidden directory beside it, safe from a kill.

`.vectors.npy.partial` holds `rows.bin`, to which finished rows are appended, and `job.json`, the
journal: which job they belong to, how many there are and the digest of their texts. The journal is
written after the rows are on disk; rows beyond its count are those of a write that was cut short.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import check_output, durable_file
from onnxsim_embed.files.provenance import Provenance, check_sidecar, write_sidecar
from onnxsim_embed.files.vectors import NPY_HEADER, check_ending, npy_header, write_parquet

FORMAT_VERSION = 1
JOURNAL = "job.json"
ROWS = "rows.bin"
LOCK = "lock"

Settings = Mapping[str, str | int | None]


@dataclass(frozen=True)
class Journal:
    """How far a job is.

    :param settings: what the vectors depend on, apart from the texts.
    :param replaces: whether the job was allowed to replace a file that existed.
    :param rows: rows that are done.
    :param texts: digest of their texts.
    """

    settings: Settings
    replaces: bool
    rows: int
    texts: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, directory: Path) -> Journal | None:
        """Read the journal of a hidden directory; None where no rows are kept.

        :raises TableError: if it is damaged or of another version.
        """
        path = directory / JOURNAL
        if not (path.exists() and (directory / ROWS).exists()):
            return None
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            journal = cls(**table)
            if not isinstance(journal.settings, dict) or type(journal.rows) is not int:
                raise ValueError("it names no settings, or no rows")
            if not 0 < journal.rows < 1 << 62 or not isinstance(journal.texts, str):
                raise ValueError("it names no rows, or no digest of their texts")
        except (ValueError, TypeError, RecursionError) as error:
            raise TableError(
                f"{path} is damaged ({error}), so its rows cannot be used: start over with --force"
            ) from None
        if journal.format_version != FORMAT_VERSION:
            raise TableError(
                f"{path} has format version {journal.format_version}, this version of onnxsim-embed "
                f"reads {FORMAT_VERSION}: start over with --force"
            )
        return journal

    def write(self, directory: Path) -> None:
        """Write the journal, whole or not at all."""
        with durable_file(directory / JOURNAL) as stream:
            stream.write(json.dumps(asdict(self), indent=2, ensure_ascii=False).encode())


def count_rows(number: int) -> str:
    """Return a number of rows in words."""
    return f"{number:,} row" if number == 1 else f"{number:,} rows"


def partial_directory(path: Path) -> Path:
    """Return the hidden directory that keeps the rows of a file."""
    return path.parent / f".{path.name}.partial"


def check_target(path: Path, force: bool) -> None:
    """Refuse, before any work, a file of vectors that could not be written after it.

    :raises ValueError: if it is neither .npy nor .parquet.
    :raises FileExistsError: if it exists, unless it is to be replaced.
    :raises FileNotFoundError: if its directory does not exist.
    """
    check_ending(path)
    journal = None
    if not force and path.is_file():
        journal = Journal.read(partial_directory(path))
    check_output(path, force or journal is not None)
    check_sidecar(path, force)
    if journal is not None and not journal.replaces:
        raise FileExistsError(
            f"{path} exists, and beside it {count_rows(journal.rows)} of an unfinished job: move the file "
            "away to finish that job, or start over with --force"
        )


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Keep other processes from a file of vectors, and give the hidden directory beside it.

    The directory is removed at the end, unless there are rows to keep.

    :raises TableError: at once, if another process has the file.
    """
    from filelock import FileLock, Timeout

    directory = partial_directory(path)
    directory.mkdir(exist_ok=True)
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TableError(
            f"another process is writing {path}: wait for it, or choose another name"
        ) from None
    try:
        yield directory
    finally:
        nothing_kept = not (directory / JOURNAL).exists()
        if nothing_kept:
            shutil.rmtree(directory, ignore_errors=True)
        lock.release()
        if (
            nothing_kept and os.name == "nt"
        ):  # where a file that is open, the lock, cannot be removed
            shutil.rmtree(directory, ignore_errors=True)


class KeptRows:
    """The rows of one job: those found and those appended. To be used inside `locked`.

    :param directory: the hidden directory.
    :param path: the file they are to become.
    :param settings: what the vectors depend on, apart from the texts.
    :param like: array (0, dim) in the number format of the rows.
    :param force: drop the rows found.
    :raises ValueError: naming what differs, if the rows found are those of other settings.
    :raises TableError: if what was found is damaged.
    """

    def __init__(
        self, directory: Path, path: Path, settings: Settings, like: npt.NDArray[Any], force: bool
    ) -> None:
        found = None if force else Journal.read(directory)
        if found is None:
            (directory / JOURNAL).unlink(missing_ok=True)
            found = Journal(settings, path.exists(), 0, "")
        _refuse_other_settings(found, settings, path)
        self.rows = found.rows
        self.texts = found.texts
        self._replaces = found.replaces
        self._directory = directory
        self._path = path
        self._settings = settings
        self._width, self._dtype = like.shape[1], like.dtype
        self._stream = (directory / ROWS).open("r+b" if found.rows else "w+b", buffering=0)
        end = NPY_HEADER + found.rows * self._width * self._dtype.itemsize
        if found.rows and self._stream.seek(0, os.SEEK_END) < end:
            self._stream.close()
            raise TableError(
                f"{directory / ROWS} is damaged (too short for {count_rows(found.rows)}), so its rows "
                "cannot be used: start over with --force"
            )
        self._stream.truncate(end)
        self._stream.seek(end)

    def __enter__(self) -> KeptRows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def append(self, block: npt.NDArray[Any], texts: str) -> None:
        """Keep a block of rows.

        :param block: array (n, dim).
        :param texts: digest of the texts of all rows, these included.
        :raises TableError: if they cannot be written.
        """
        rows = self.rows + len(block)
        with naming(self._path):
            self._write(block.tobytes())
            Journal(self._settings, self._replaces, rows, texts).write(self._directory)
        self.rows, self.texts = rows, texts

    def finish(self, origin: Provenance | None = None) -> None:
        """Turn the rows into the file, which takes the place of one that exists.

        :param origin: what made the rows, to be kept with them.
        :raises TableError: if it cannot be written; the rows are kept.
        """
        with naming(self._path):
            self._stream.seek(0)
            self._write(npy_header(self.rows, self._width, self._dtype))
            self._stream.close()
            finished = self._directory / ROWS
            if self._path.suffix == ".parquet":
                vectors = np.load(finished, mmap_mode="r")
                finished = self._directory / "rows.parquet"
                with finished.open("wb") as stream:
                    write_parquet(vectors, stream, origin)
                    stream.flush()
                    os.fsync(stream.fileno())
            # First the description: beside an older file it is seen to be that of another.
            write_sidecar(self._path, finished, origin)
            os.replace(finished, self._path)
            (self._directory / JOURNAL).unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._stream.write(left) :]
        os.fsync(self._stream.fileno())


def differing_settings(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Say in what the settings of a job that was found differ from those of now; nothing if they are equal."""
    return ", ".join(
        f"{name}: {found.get(name)}, now {value}"
        for name, value in settings.items()
        if found.get(name) != value
    )


def _refuse_other_settings(found: Journal, settings: Settings, path: Path) -> None:
    if differing := differing_settings(found.settings, settings):
        raise ValueError(
            f"{path} is half done ({count_rows(found.rows)}) with other settings ({differing}): finish that "
            "job, or start over with --force"
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file that an operating system's error is about."""
    try:
        yield
    except OSError as error:
        raise TableError(f"cannot write {path}: {error.strerror or error}") from error
