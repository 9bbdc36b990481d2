"""Atomic writes: a file or directory appears whole, or not at all."""

import os
from pathlib import Path

import pytest

from onnxsim_embed.files.atomic import (
    atomic_directory,
    atomic_file,
    check_output,
    durable_file,
    write_json,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def target(tmp_path) -> Path:
    """A directory with one old file."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target/old").write_text("old")
    return tmp_path / "target"


def test_a_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "a/b") as work:
        (work / "new").write_text("new")
        assert not (tmp_path / "a/b").exists()
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a/b") == ["new"]


def test_a_directory_takes_the_place_of_the_old(target):
    with atomic_directory(target) as work:
        (work / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(target.parent) == ["target"]


def write_and_fail(target: Path, error: type[BaseException]) -> None:
    with atomic_directory(target) as work:
        (work / "new").write_text("new")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_directory(target, error):
    with pytest.raises(error):
        write_and_fail(target, error)
    assert names(target) == ["old"]
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_while_changing_places_brings_the_old_directory_back(target, monkeypatch, error):
    rename = Path.rename

    def fail(self, other):
        if self.name.endswith(".partial"):
            raise error
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error), atomic_directory(target) as work:
        (work / "new").write_text("new")
    assert names(target) == ["old"]
    assert names(target.parent) == ["target"]


def test_two_writers_do_not_disturb_each_other(target):
    with atomic_directory(target) as first:
        (first / "first").write_text("1")
        with atomic_directory(target) as second:
            assert first != second
            (second / "second").write_text("2")
        assert names(target) == ["second"]
    assert names(target) == ["first"]
    assert names(target.parent) == ["target"]


def test_a_symbolic_link_is_followed_or_replaced_but_leaves_nothing_behind(target):
    link = target.parent / "link"
    link.symlink_to(target)
    with atomic_directory(link) as work:
        (work / "new").write_text("new")
    assert names(link) == ["new"]
    assert [name for name in names(target.parent) if name not in ("link", "target")] == []


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "vectors.npy"
    with atomic_file(path) as work:
        work.write_text("new")
        assert not path.exists()
        assert work.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == ["vectors.npy"]


def test_a_durable_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "job.json"
    with durable_file(path) as stream:
        stream.write(b"new")
        assert not path.exists()
    with pytest.raises(RuntimeError):
        half_write(path, RuntimeError, True, durable_file)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["job.json"]


def half_write(path: Path, error: type[BaseException], written: bool, kind=atomic_file) -> None:
    with kind(path) as work:
        if written:
            work.write(b"half") if kind is durable_file else work.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_a_failure_leaves_the_old_file(tmp_path, error, written):
    path = tmp_path / "vectors.npy"
    path.write_text("old")
    with pytest.raises(error):
        half_write(path, error, written)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["vectors.npy"]


def test_a_relative_file_is_written_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_file(Path("out.txt")) as work:
        work.write_text("x")
    assert names(tmp_path) == ["out.txt"]


def test_modes_are_those_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "a"):
            pass
        write_json(tmp_path / "b", {"é": 1})
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").read_text("utf-8") == '{\n  "é": 1\n}\n'


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="force=True"):
        check_output(tmp_path / "file", force=False)
    check_output(tmp_path / "file", force=True)
    check_output(tmp_path / "new", force=False)
    with pytest.raises(FileExistsError, match="directory"):
        check_output(tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match="no directory"):
        check_output(tmp_path / "a/b", force=True)

    def read_only(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(PermissionError, match="Read-only"):
        check_output(tmp_path / "new", force=False)
    assert names(tmp_path) == ["file"]
