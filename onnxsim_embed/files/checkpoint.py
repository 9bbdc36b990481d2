"""Checkpoints of unfinished runs: the one mechanism behind every output that takes long to compute.

A checkpoint is a hidden directory beside the output: `.vectors.npy.partial` for vectors.npy. It holds

    lock       locked by the process that writes the output
    job.json   the journal: settings of the run and its progress; written after the data it counts
    rows.bin   or other data of the run, such as finished shards

A run with equal settings continues from it; a run with other settings is rejected and leaves it as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import check_output, durable_file, explain_full_disk, write_json
from onnxsim_embed.files.provenance import Provenance, check_sidecar, write_sidecar
from onnxsim_embed.files.uris import local_path
from onnxsim_embed.files.vectors import (
    NPY_HEADER,
    check_ending,
    npy_header,
    read_record,
    write_parquet,
)
from onnxsim_embed.system.units import format_bytes

JOURNAL = "job.json"
LOCK = "lock"
ROWS = "rows.bin"

Settings = Mapping[str, Any]


class Checkpoint:
    """An unfinished run: its lock, its settings and its progress. A context manager that holds the lock.

    :param target: file or directory that the run writes.
    :cvar suffix: ending of the hidden directory's name.
    :cvar data: file or directory in it without which the journal is void; None where there is none.
    :cvar settings_key: key of the settings in the journal; None where they lie beside the progress.
    :cvar progress: name and type of each required entry of the progress; an int is positive.
    """

    suffix: ClassVar[str] = "partial"
    data: ClassVar[str | None] = None
    settings_key: ClassVar[str | None] = None
    progress: ClassVar[Mapping[str, type]] = {"replaces": bool}
    format_version: ClassVar[int] = 1

    def __init__(self, target: Path) -> None:
        self.target = local_path(target).absolute()
        self.name = str(self.target)  # in errors, as is journal_name
        self.directory = self.target.parent / f".{target.name}.{self.suffix}"
        self.journal_name = str(self.directory / JOURNAL)
        self.replaces = False
        self._replaced = self.directory / "old"  # the target while another takes its place
        self._settings: Settings = {}

    def __enter__(self) -> Checkpoint:
        """Acquire the lock; raises TableError if another process has it."""
        from filelock import FileLock, Timeout

        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TableError(
                f"another process is writing {self.name}: wait for it, or choose another name"
            ) from None
        if self._replaced.exists() and not self.target.exists():  # killed while it was replaced
            self._replaced.rename(self.target)
        return self

    def __exit__(self, *raised: object) -> None:
        """Release the lock, and remove the directory if there is nothing to continue from."""
        empty = not (self.directory / JOURNAL).exists()
        if empty:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.release()
        if empty and os.name == "nt":  # which does not remove files that are open, as the lock was
            shutil.rmtree(self.directory, ignore_errors=True)

    def read(self) -> dict[str, Any] | None:
        """Return the journal, None if there is no unfinished run; raises TableError if it is damaged."""
        content = self._load()
        if content is None:
            return None
        try:
            journal: dict[str, Any] = json.loads(content)
            if not isinstance(self._settings_in(journal), dict):
                raise ValueError("no settings")
            version = journal.get("format_version", self.format_version)
            if version != self.format_version:
                raise ValueError(f"format version {version}, expected {self.format_version}")
            for name, kind in self.progress.items():
                value = journal[name]
                valid = type(value) is kind
                if not valid or (kind is int and not 0 < value < 1 << 62):
                    raise ValueError(f"{name}: {value!r:.60}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TableError(
                f"{self.journal_name} is damaged or of another version ({error}): start over with force=True"
            ) from None
        return journal

    def _load(self) -> bytes | None:
        path = self.directory / JOURNAL
        if not path.exists() or not (self.directory / (self.data or JOURNAL)).exists():
            return None
        return path.read_bytes()

    def _store(self, journal: dict[str, Any]) -> None:
        with write_errors(self.name):
            write_json(self.directory / JOURNAL, journal)

    def _settings_in(self, journal: dict[str, Any]) -> Any:  # noqa: ANN401 - from JSON
        return journal[self.settings_key] if self.settings_key else journal

    def resume(self, settings: Settings, force: bool = False) -> dict[str, Any] | None:
        """Return the journal of an unfinished run to continue; None begins a new one, as does `force`.

        :param settings: all that the output depends on.
        :raises ValueError: if an unfinished run has other settings, naming those that differ.
        """
        self._settings = dict(settings)
        journal = None if force else self.read()
        if journal is None:
            self.clear()
            self.replaces = self.target.exists()
            return None
        if differing := differing_settings(self._settings_in(journal), settings):
            raise ValueError(
                f"{self.name} belongs to a run with other settings ({differing}): finish that run, "
                "choose another output, or start over with force=True"
            )
        self.replaces = bool(journal.get("replaces"))
        return journal

    def clear(self) -> None:
        """Drop an unfinished run; its journal first, as without it the rest is void."""
        (self.directory / JOURNAL).unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def record(self, **progress: Any) -> None:  # noqa: ANN401 - what JSON holds
        """Write the journal durably."""
        settings = {self.settings_key: self._settings} if self.settings_key else self._settings
        kept = {"replaces": self.replaces} if "replaces" in self.progress else {}
        self._store({"format_version": self.format_version, **settings, **kept, **progress})

    def publish(self, result: Path) -> None:
        """Move the finished file or directory to the target, and drop the journal."""
        with write_errors(self.target):
            if result.is_dir() and self.replaces and self.target.exists():
                shutil.rmtree(self._replaced, ignore_errors=True)
                self.target.rename(self._replaced)
            os.replace(result, self.target)
            self.complete()

    def complete(self) -> None:
        """Drop the journal of a run whose output is in place."""
        (self.directory / JOURNAL).unlink(missing_ok=True)


def differing_settings(found: Settings, settings: Settings) -> str:
    """Name the settings of a run that differ from the current ones; empty if none does."""
    differing = []
    for name, value in settings.items():
        before = found.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            differing.append(differing_settings(before, value))
        elif before != value:
            differing.append(f"{name}: {before}, now {value}")
    return ", ".join(filter(None, differing))


@contextmanager
def write_errors(path: object) -> Iterator[None]:
    """Raise TableError naming the output for an error of the operating system."""
    try:
        yield
    except OSError as error:
        raise TableError(f"cannot write {path}: {error.strerror or error}") from error


class EmbeddingCheckpoint(Checkpoint):
    """Checkpoint of an embedding file: finished rows are appended to rows.bin, then counted in the journal.

    Rows beyond the count are those of a write that was interrupted, and are dropped.
    """

    data = ROWS
    settings_key = "settings"
    progress: ClassVar[Mapping[str, type]] = {"replaces": bool, "rows": int, "texts": str}

    def check_target(self, force: bool) -> dict[str, Any] | None:
        """Raise before any work if the file could not be written after it.

        :returns: the record of a finished run that wrote the file, unless it is to be replaced.
        :raises ValueError: if it is neither .npy nor .parquet.
        :raises FileExistsError: if it exists, unless it is finished, or `force` or the unfinished run
            replaces it.
        :raises FileNotFoundError: if its directory does not exist.
        """
        check_ending(self.target)
        journal = None if force or not self.target.is_file() else self.read()
        if not force and journal is None and self.target.is_file():
            with suppress(TableError):  # another kind of file
                record = read_record(self.target)
                if record is not None and isinstance(record.get("rows"), int):
                    return record
        check_output(self.target, force or journal is not None)
        check_sidecar(self.target, force)
        if journal is not None and not journal["replaces"]:
            raise FileExistsError(
                f"{self.target} exists, and beside it {count_rows(journal['rows'])} of an unfinished run: "
                "move the file away to finish that run, or start over with force=True"
            )
        return None

    def open(self, settings: Settings, like: npt.NDArray[Any], force: bool) -> None:
        """Open the rows of the unfinished run, or begin; `like` is an array (0, dim) of their dtype."""
        journal = self.resume(settings, force) or {"rows": 0, "texts": ""}
        self.rows: int = journal["rows"]
        self.texts: str = journal["texts"]
        self._dim, self._dtype = like.shape[1], like.dtype
        path = self.directory / ROWS
        end = NPY_HEADER + self.rows * self._dim * self._dtype.itemsize
        if self.rows and path.stat().st_size < end:
            raise TableError(
                f"{path} is damaged (too short for {count_rows(self.rows)}): start over with force=True"
            )
        self._stream = path.open("r+b" if self.rows else "w+b", buffering=0)
        self._stream.truncate(end)
        self._stream.seek(end)

    def __exit__(self, *raised: object) -> None:
        """See `Checkpoint`."""
        if hasattr(self, "_stream"):
            self._stream.close()
        super().__exit__(*raised)

    def append(self, vectors: npt.NDArray[Any], texts: str) -> None:
        """Write rows (n, dim) durably and count them; `texts` is the digest of all texts up to these."""
        rows = self.rows + len(vectors)
        with write_errors(self.target):
            self._write(vectors.tobytes())
        self.record(rows=rows, texts=texts)
        self.rows, self.texts = rows, texts

    def finish(
        self, provenance: Provenance | None = None, ids: Sequence[Any] | None = None
    ) -> None:
        """Turn the rows into the file, which replaces one that exists; if it fails, the run stays."""
        finished = self.directory / ROWS
        made_of = {"rows": self.rows, "texts": self.texts, "ids": ids_digest(ids)}
        table = None if provenance is None else provenance.to_table(**made_of)
        with write_errors(self.target):
            self._stream.seek(0)
            self._write(npy_header(self.rows, self._dim, self._dtype))
            self._stream.close()
            if self.target.suffix == ".parquet":
                vectors = np.load(finished, mmap_mode="r")
                finished = self.directory / "rows.parquet"
                with durable_file(finished) as stream:
                    write_parquet(vectors, stream, table, ids)
            # The sidecar first: beside an older file, its digest shows that it describes another.
            write_sidecar(self.target, finished, table)
            self.publish(finished)

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            takes = f"{format_bytes(len(content))} more for these rows"
            raise explain_full_disk(error, self.target, takes) from error


def ids_digest(ids: Sequence[Any] | None) -> str | None:
    """Return a digest of the ids of rows."""
    return None if ids is None else hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def count_rows(number: int) -> str:
    """Return a number of rows in words."""
    return f"{number:,} row" if number == 1 else f"{number:,} rows"
