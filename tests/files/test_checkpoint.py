"""Checkpoints of unfinished runs: what continues, what is rejected, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
from support import names

from onnxsim_embed.errors import TableError
from onnxsim_embed.files import checkpoint as checkpoints
from onnxsim_embed.files.checkpoint import JOURNAL, LOCK, ROWS, Checkpoint, EmbeddingCheckpoint
from onnxsim_embed.files.vectors import read_vectors

VECTORS = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
SETTINGS = {"model": "tiny 12ab", "precision": "fp32", "truncate_dim": None}


@contextmanager
def opened(path, settings=SETTINGS, force=False, vectors=VECTORS):
    with EmbeddingCheckpoint(path) as checkpoint:
        checkpoint.open(settings, vectors[:0], force)
        yield checkpoint


def write_rows(path, vectors=VECTORS, texts="digest", **options):
    with opened(path, vectors=vectors, **options) as checkpoint:
        checkpoint.append(vectors, texts)
    return checkpoint.directory


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(params=["v.npy", "v.parquet"])
def path(request, tmp_path):
    return tmp_path / request.param


# continuing


def test_a_run_of_the_version_before_continues(tmp_path):
    """The hidden directory as commit dd297de wrote it."""
    directory = tmp_path / ".v.npy.partial"
    directory.mkdir()
    np.save(tmp_path / "rows.npy", VECTORS[:5])
    (tmp_path / "rows.npy").rename(directory / "rows.bin")
    (directory / "lock").touch()
    journal = {"settings": SETTINGS, "replaces": False, "rows": 5, "texts": "five", "format_version": 1}  # fmt: skip
    (directory / "job.json").write_text(json.dumps(journal, indent=2, ensure_ascii=False))
    with opened(tmp_path / "v.npy") as checkpoint:
        assert (checkpoint.rows, checkpoint.texts) == (5, "five")
        checkpoint.append(VECTORS[5:], "seven")
        checkpoint.finish()
    np.save(tmp_path / "numpy.npy", VECTORS)
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert names(tmp_path) == ["numpy.npy", "v.npy"]


def test_rows_beyond_the_journal_are_dropped(path):
    rows = write_rows(path) / ROWS
    content = rows.read_bytes()
    rows.write_bytes(content + b"half a row")
    with opened(path) as checkpoint:
        assert checkpoint.rows == 7
        assert rows.read_bytes() == content


@pytest.mark.parametrize("name", [JOURNAL, ROWS])  # ROWS: what a kill right after the end leaves
def test_half_a_checkpoint_is_none(path, name):
    (write_rows(path) / name).unlink()
    assert EmbeddingCheckpoint(path).read() is None
    with opened(path) as checkpoint:
        assert checkpoint.rows == 0
    assert names(path.parent) == []


# rejected


def test_other_settings_are_named_one_by_one_and_the_run_stays(tmp_path):
    settings = {"training": {"epochs": 1, "seed": 0}, "model": "a"}
    with Checkpoint(tmp_path / "out") as checkpoint:
        checkpoint.resume(settings)
        checkpoint.record()
        with pytest.raises(ValueError, match=r"\(epochs: 1, now 2, model: a, now b\)"):
            checkpoint.resume({"training": {"epochs": 2, "seed": 0}, "model": "b"})
        assert checkpoint.resume(settings) is not None


def test_a_second_writer_is_rejected_at_once(path):
    with opened(path) as checkpoint:
        with pytest.raises(TableError, match="another process"), EmbeddingCheckpoint(path):
            pass
        checkpoint.append(VECTORS, "digest")  # the first is not disturbed
    assert EmbeddingCheckpoint(path).read()["rows"] == 7


GOOD = {"settings": {}, "replaces": False, "rows": 7, "texts": ""}


@pytest.mark.parametrize(
    "content",
    [b"", b'{"settings": {"model": "ti', b"[]", b"{}", b"null", b"\xff", b"[" * 100_000,
     *(json.dumps(GOOD | change).encode() for change in (
         {"settings": None}, {"rows": "7"}, {"rows": -7}, {"rows": 0}, {"rows": True}, {"rows": 1 << 62},
         {"texts": None}, {"replaces": 1}, {"format_version": 2}))],
)  # fmt: skip
def test_a_damaged_journal_is_named_and_nothing_is_dropped(tmp_path, content):
    path = tmp_path / "v.npy"
    directory = write_rows(path)
    (directory / JOURNAL).write_bytes(content)
    with pytest.raises(TableError, match=r"job\.json .*force=True") as caught, opened(path):
        pass
    assert "\n" not in str(caught.value)
    assert (directory / JOURNAL).read_bytes() == content
    assert (directory / ROWS).stat().st_size > VECTORS.nbytes
    with opened(path, force=True) as checkpoint:
        assert checkpoint.rows == 0


def test_fewer_rows_than_the_journal_counts_are_damage_and_stay(tmp_path):
    rows = write_rows(tmp_path / "v.npy") / ROWS
    os.truncate(rows, rows.stat().st_size - 1)
    content = rows.read_bytes()
    with pytest.raises(TableError, match="7 rows"), opened(tmp_path / "v.npy"):
        pass
    assert rows.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "force", "error"),
    [("v.csv", False, ValueError), ("d.npy", True, FileExistsError), ("no/v.npy", True, FileNotFoundError),
     ("v.npy", False, FileExistsError), ("v.npy", True, None), ("new.parquet", False, None)],
)  # fmt: skip
def test_a_target_that_cannot_be_written_is_rejected(tmp_path, name, force, error):
    (tmp_path / "d.npy").mkdir()
    (tmp_path / "v.npy").write_text("mine")
    with pytest.raises(error, match=name.rpartition("/")[2]) if error else nullcontext():
        EmbeddingCheckpoint(tmp_path / name).check_target(force)


def test_a_file_that_came_later_is_not_replaced_unasked(path):
    write_rows(path)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="7 rows of an unfinished run"):
        EmbeddingCheckpoint(path).check_target(False)
    EmbeddingCheckpoint(path).check_target(True)


# failures


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_rows_that_cannot_be_written_are_not_counted(path, monkeypatch, call):
    write_rows(path, VECTORS[:3], "three")
    with opened(path) as checkpoint:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, disk_full)
            with pytest.raises(TableError, match=rf"{path.name}: No space left.*: .*takes .* free"):
                checkpoint.append(VECTORS[3:], "seven")
        assert (checkpoint.rows, checkpoint.texts) == (3, "three")
    with opened(path) as checkpoint:
        assert (checkpoint.rows, checkpoint.texts) == (3, "three")
        checkpoint.append(VECTORS[3:], "seven")
        checkpoint.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS)


def test_a_partial_write_is_continued(tmp_path):
    """The stream takes seven bytes at a time, as an operating system may."""
    with opened(tmp_path / "v.npy") as checkpoint:
        stream = checkpoint._stream
        checkpoint._stream = Mock(wraps=stream, write=lambda content: stream.write(content[:7]))
        checkpoint.append(VECTORS, "digest")
        checkpoint.finish()
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.npy"), VECTORS)


def test_a_file_that_cannot_be_finished_is_finished_later(path, monkeypatch):
    path.write_text("mine")
    write_rows(path, force=True)
    with monkeypatch.context() as patch, opened(path) as checkpoint:
        patch.setattr(os, "replace", disk_full)
        with pytest.raises(TableError, match="No space left"):
            checkpoint.finish()
    assert path.read_text() == "mine"
    EmbeddingCheckpoint(path).check_target(False)  # force is not asked for again
    with opened(path) as checkpoint:
        checkpoint.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS)
    assert names(path.parent) == [path.name]


@pytest.mark.skipif(
    not os.path.exists("/proc/self/fd"), reason="reads names of open files in /proc"
)
def test_the_journal_is_written_after_the_rows_are_on_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recording(number):
        fsync(number)
        synced.append(os.readlink(f"/proc/self/fd/{number}").rpartition("/")[2])

    monkeypatch.setattr(checkpoints.os, "fsync", recording)
    with opened(tmp_path / "v.npy") as checkpoint:
        checkpoint.append(VECTORS, "digest")
        assert synced[0] == ROWS
        assert synced[1].startswith(f".{JOURNAL}")
        assert names(checkpoint.directory) == sorted([JOURNAL, LOCK, ROWS])
