"""Atomic writes: a file or directory appears complete, or not at all."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from support import names

from onnxsim_embed.files.atomic import (
    atomic_directory,
    atomic_file,
    check_output,
    durable_file,
    write_json,
)


@pytest.fixture
def target(tmp_path):
    """A directory with one old file."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target/old").write_text("old")
    return tmp_path / "target"


@pytest.mark.parametrize("name", ["target", "link", "a/b"])
def test_a_directory_replaces_the_old_one(target, name):
    (target.parent / "link").symlink_to(target)
    path = target.parent / name
    with atomic_directory(path) as work:
        (work / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(path) == ["new"]
    assert set(names(target.parent)) <= {"a", "link", "target"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("renaming", [False, True])
def test_a_failure_leaves_the_old_directory(target, monkeypatch, error, renaming):
    rename = Path.rename

    def fail(self, other):
        if self.name.endswith(".partial"):
            raise error
        return rename(self, other)

    if renaming:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error), atomic_directory(target) as work:
        renaming or fail(work, None)
    assert names(target) == ["old"]
    assert names(target.parent) == ["target"]


def test_two_writers_do_not_disturb_each_other(target):
    with atomic_directory(target) as first:
        with atomic_directory(target) as second:
            (second / "second").write_text("2")
        assert names(target) == ["second"]
        (first / "first").write_text("1")
    assert names(target) == ["first"]
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("writer", [atomic_file, durable_file])
def test_a_file_replaces_the_old_one_unless_the_block_fails(tmp_path, monkeypatch, writer, error):
    monkeypatch.chdir(tmp_path)
    path = Path("vectors.npy")
    path.write_text("old")
    with pytest.raises(error) if error else nullcontext(), writer(path) as work:
        if writer is durable_file:
            work.write(b"new")
        elif error is not RuntimeError:  # which comes before anything is written
            work.write_text("new")
        assert path.read_text() == "old"
        if error:
            raise error
    assert path.read_text() == ("old" if error else "new")
    assert names(tmp_path) == ["vectors.npy"]


def test_two_writers_of_a_file_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as first:
        first.write_text("1")
        with atomic_file(path) as second:
            second.write_text("2")
        assert path.read_text() == "2"
    assert path.read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_modes_are_those_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "a"):
            pass
        write_json(tmp_path / "b", {"é": 1})
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o750, 0o640]
    assert (tmp_path / "b").read_text("utf-8") == '{\n  "é": 1\n}\n'


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_output(tmp_path / "file", force=True)
    check_output(tmp_path / "new", force=False)
    for path, force, error, reason in (
        (tmp_path / "file", False, FileExistsError, "force=True"),
        (tmp_path, True, FileExistsError, "directory"),
        (tmp_path / "a/b", True, FileNotFoundError, "no directory"),
    ):
        with pytest.raises(error, match=reason):
            check_output(path, force)

    def read_only(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(PermissionError, match="Read-only"):
        check_output(tmp_path / "new", force=False)
    assert names(tmp_path) == ["file"]
