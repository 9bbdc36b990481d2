"""Rows that outlive their process: what is kept, what is refused, and what becomes of them."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from onnxsim_embed.errors import MissingExtraError, TableError
from onnxsim_embed.files import checkpoint as kept_rows
from onnxsim_embed.files.checkpoint import (
    JOURNAL,
    LOCK,
    ROWS,
    KeptRows,
    check_target,
    locked,
    partial_directory,
)
from onnxsim_embed.files.vectors import read_vectors

VECTORS = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
SETTINGS = {"model": "tiny 12ab", "precision": "fp32", "truncate_dim": None}


@contextmanager
def opened(path, settings=SETTINGS, like=VECTORS, force=False):
    with locked(path) as directory, KeptRows(directory, path, settings, like[:0], force) as kept:
        yield kept


def keep(path, vectors=VECTORS, digest="digest", **options):
    with opened(path, like=vectors, **options) as kept:
        kept.append(vectors, digest)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(params=["v.npy", "v.parquet"])
def path(request, tmp_path):
    return tmp_path / request.param


# what is kept


def test_rows_of_several_runs_become_one_file(path):
    for start, end in [(0, 3), (3, 4), (4, 7)]:
        with opened(path) as kept:
            assert kept.rows == start
            kept.append(VECTORS[start:end], f"digest {end}")
            assert (kept.rows, kept.texts) == (end, f"digest {end}")
        assert names(path.parent) == [f".{path.name}.partial"]
    with opened(path) as kept:
        assert (kept.rows, kept.texts) == (7, "digest 7")
        kept.finish()
    assert names(path.parent) == [path.name]
    np.testing.assert_array_equal(read_vectors(path), VECTORS, strict=True)


def test_a_finished_npy_is_the_file_that_numpy_writes(tmp_path):
    with opened(tmp_path / "v.npy") as kept:
        kept.append(VECTORS[:5], "a")
        kept.append(VECTORS[5:], "b")
        kept.finish()
    np.save(tmp_path / "numpy.npy", VECTORS)
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert isinstance(np.load(tmp_path / "v.npy", mmap_mode="r"), np.memmap)


def test_no_rows_become_an_empty_table(path):
    with opened(path) as kept:
        kept.finish()
    assert read_vectors(path).shape == (0, 4)
    assert names(path.parent) == [path.name]


def test_without_rows_nothing_is_left(path):
    with opened(path):
        assert names(path.parent) == [f".{path.name}.partial"]
    assert names(path.parent) == []


def test_a_row_that_the_journal_does_not_know_is_dropped(path):
    keep(path)
    rows = partial_directory(path) / ROWS
    whole = rows.read_bytes()
    rows.write_bytes(whole + b"half a row")
    with opened(path) as kept:
        assert kept.rows == 7
        assert rows.read_bytes() == whole
        kept.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS)


def test_rows_without_a_journal_are_dropped(path):
    keep(path)
    (partial_directory(path) / JOURNAL).unlink()
    with opened(path) as kept:
        assert kept.rows == 0
        kept.append(VECTORS[:2], "digest")
        kept.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS[:2])


def test_a_journal_without_rows_is_what_a_kill_after_the_end_leaves(tmp_path):
    path = tmp_path / "v.npy"
    keep(path)
    os.replace(partial_directory(path) / ROWS, path)
    with pytest.raises(FileExistsError, match="force=True"):
        check_target(path, False)
    path.unlink()
    with opened(path) as kept:
        assert kept.rows == 0
    assert names(tmp_path) == []


def test_force_drops_what_was_found(path):
    keep(path)
    keep(path, VECTORS[:2] + 1, settings=SETTINGS | {"precision": "int8"}, force=True)
    with opened(path, SETTINGS | {"precision": "int8"}) as kept:
        assert kept.rows == 2
        kept.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS[:2] + 1)


def test_a_file_that_existed_stays_until_the_end(path):
    path.write_text("mine")
    keep(path, force=True)
    assert path.read_text() == "mine"
    with opened(path) as kept:
        kept.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS)


# what is refused


def test_rows_of_other_settings_are_refused_and_stay(path):
    keep(path)
    other = {"model": "tiny 12ab", "precision": "int8", "truncate_dim": 8}
    message = r"is half done \(7 rows\) with other settings \(precision: fp32, now int8, truncate_dim: None, now 8\): finish that job"
    with pytest.raises(ValueError, match=message), opened(path, other):
        pass
    with opened(path) as kept:
        assert kept.rows == 7


def test_a_second_writer_is_refused_at_once(path):
    with opened(path) as kept:
        with pytest.raises(TableError, match="another process is writing"), locked(path):
            pass
        kept.append(VECTORS, "digest")  # the first is not disturbed
    with opened(path) as kept:
        assert kept.rows == 7


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"settings": {"model": "ti',
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"settings": null, "replaces": false, "rows": 7, "texts": ""}',
        b'{"settings": {}, "replaces": false, "rows": "7", "texts": ""}',
        b'{"settings": {}, "replaces": false, "rows": -7, "texts": ""}',
    ],
)
def test_a_damaged_journal_is_named_and_nothing_is_dropped(tmp_path, content):
    path = tmp_path / "v.npy"
    keep(path)
    journal = partial_directory(path) / JOURNAL
    journal.write_bytes(content)
    with pytest.raises(TableError, match=r"job\.json is damaged .*--force") as caught, opened(path):
        pass
    assert "\n" not in str(caught.value)
    assert journal.read_bytes() == content
    assert (partial_directory(path) / ROWS).stat().st_size > VECTORS.nbytes
    with opened(path, force=True) as kept:
        assert kept.rows == 0


def test_a_journal_of_another_version_is_refused(tmp_path):
    path = tmp_path / "v.npy"
    keep(path)
    journal = partial_directory(path) / JOURNAL
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"format_version": 2}))
    with pytest.raises(TableError, match="format version 2"), opened(path):
        pass


def test_fewer_rows_than_the_journal_says_are_refused_and_stay(tmp_path):
    path = tmp_path / "v.npy"
    keep(path)
    rows = partial_directory(path) / ROWS
    os.truncate(rows, rows.stat().st_size - 1)
    left = rows.read_bytes()
    message = r"rows\.bin is damaged \(too short for 7 rows\)"
    with pytest.raises(TableError, match=message), opened(path):
        pass
    assert rows.read_bytes() == left


def test_a_target_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "d.npy").mkdir()
    (tmp_path / "v.npy").write_text("mine")
    for name, error, force in [("v.csv", ValueError, False), ("d.npy", FileExistsError, True),
                               ("no/v.npy", FileNotFoundError, True), ("v.npy", FileExistsError, False)]:  # fmt: skip
        with pytest.raises(error, match=name.rpartition("/")[2].replace(".", r"\.")):
            check_target(tmp_path / name, force)
    check_target(tmp_path / "v.npy", True)
    check_target(tmp_path / "new.parquet", False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError):
        check_target(tmp_path / "new.parquet", False)


def test_a_file_that_was_to_be_replaced_may_be_replaced_without_asking_again(path):
    path.write_text("mine")
    keep(path, force=True)
    check_target(path, False)


def test_a_file_that_came_later_is_not_replaced_unasked(path):
    keep(path)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="beside it 7 rows of an unfinished job: move"):
        check_target(path, False)
    check_target(path, True)


# what fails


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_rows_that_cannot_be_written_are_not_counted(path, monkeypatch, call):
    keep(path, VECTORS[:3], "three")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(path) as kept:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(TableError, match=rf"cannot write .*{path.name}: No space left"):
                kept.append(VECTORS[3:], "seven")
        assert (kept.rows, kept.texts) == (3, "three")
    with opened(path) as kept:
        assert (kept.rows, kept.texts) == (3, "three")
        kept.append(VECTORS[3:], "seven")
        kept.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS)


def test_a_write_that_takes_a_part_is_continued(tmp_path):
    path = tmp_path / "v.npy"

    class Reluctant:
        """A stream that takes seven bytes at a time, as an operating system may."""

        def __init__(self, stream):
            self.stream = stream

        def write(self, data):
            return self.stream.write(data[:7])

        def __getattr__(self, name):
            return getattr(self.stream, name)

    with opened(path) as kept:
        kept._stream = Reluctant(kept._stream)
        kept.append(VECTORS, "digest")
        kept.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS)


def test_a_file_that_cannot_be_finished_is_finished_later(path, monkeypatch):
    path.write_text("mine")
    keep(path, force=True)

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, opened(path) as kept:
        patch.setattr(os, "replace", full)
        with pytest.raises(TableError, match="No space left"):
            kept.finish()
    assert path.read_text() == "mine"
    with opened(path) as kept:
        kept.finish()
    np.testing.assert_array_equal(read_vectors(path), VECTORS)
    assert names(path.parent) == [path.name]


def test_the_journal_is_written_after_the_rows_are_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "v.npy"
    synced, real = [], os.fsync

    def fsync(number):
        real(number)
        synced.append(os.readlink(f"/proc/self/fd/{number}").rpartition("/")[2])

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("names of open files are read from /proc")
    monkeypatch.setattr(kept_rows.os, "fsync", fsync)
    with opened(path) as kept:
        kept.append(VECTORS, "digest")
        assert synced[0] == ROWS
        assert synced[1].startswith(f".{JOURNAL}")
    assert names(partial_directory(path)) == sorted([JOURNAL, LOCK, ROWS])
