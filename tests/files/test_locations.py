"""Files by path or URI: the same names mean the same on a disk, as file:// and in a store like s3."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from urllib.parse import quote

import pytest
from pyarrow import fs

from onnxsim_embed.errors import MissingExtraError, TableError
from onnxsim_embed.files import locations as storage
from onnxsim_embed.files.locations import Directory, absolute, find_files, open_file
from onnxsim_embed.files.uris import display_name, is_directory

ODD = ["a b", "100%", "a%20b", "a#b", "a?b", "a[1]", "a&b=c", "naïve 漢字", "it's"]
OPTIONS = "?region=eu-west-1&scheme=http"


@pytest.fixture
def bucket(monkeypatch):
    """A file system in memory, in which s3://bucket is a directory, as pyarrow's own is."""
    system, _ = fs.FileSystem.from_uri("mock:///")
    system.create_dir("bucket")
    asked = []

    def connect(root):
        asked.append(root)
        return system, "bucket"

    monkeypatch.setattr(storage, "_connect", connect)
    return asked


@pytest.fixture(params=["path", "file", "s3", "s3 with options"])
def place(request, tmp_path):
    """A function: the location of names in one directory, quoted where they have to be."""
    if request.param == "path":
        return lambda name="": f"{tmp_path}/{name}"
    if request.param == "file":
        return lambda name="": f"file://{tmp_path}/{quote(name, safe='/*')}"
    request.getfixturevalue("bucket")
    options = OPTIONS if "options" in request.param else ""
    return lambda name="": f"s3://bucket/top/{quote(name, safe='/*')}{options}"


def put(place, *names, data=b"text\n"):
    for name in names:
        above, _, last = name.rpartition("/")
        Directory(place(above)).write(last, data)


def found(place, what=""):
    """The names of the files that are found, below the place."""
    files = find_files(place(what))
    for file in files:
        with open_file(file) as stream:  # each is a location of a file that is there
            assert stream.read()
    start = display_name(absolute(place())) + "/"
    assert all(display_name(file).startswith(start) for file in files)
    return [display_name(file).removeprefix(start) for file in files]


# a directory


def test_files_are_written_listed_read_and_deleted(place):
    directory = Directory(place("new/vectors"))
    assert directory.names() == []
    with pytest.raises(FileNotFoundError, match=r"there is no file .*vectors/b$"):
        directory.read("b")
    directory.delete("b")
    directory.write("b", b"1")
    directory.write("b", b"two")
    directory.write("a", b"")
    assert directory.names() == ["a", "b"]
    assert (directory.read("a"), directory.read("b")) == (b"", b"two")
    with directory.open("b") as stream:
        stream.seek(1)
        assert stream.read() == b"wo"
    directory.delete("b")
    assert directory.names() == ["a"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_may_hold_any_character(place, name):
    directory = Directory(place("x"))
    directory.write(name, b"1")
    assert directory.names() == [name]
    assert directory.read(name) == b"1"
    Directory(place(name)).write("inner.txt", b"2")
    assert Directory(place(name)).read("inner.txt") == b"2"


def test_only_files_are_listed(place):
    put(place, "a.txt", "sub/b.txt")
    assert Directory(place()).names() == ["a.txt"]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert Directory(tmp_path / "a.txt").names() == []
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.txt/b"):
        Directory(tmp_path / "a.txt").read("b")
    with pytest.raises(TableError, match=r"cannot write .*a\.txt/b: "):
        Directory(tmp_path / "a.txt").write("b", b"")


def test_a_file_that_cannot_be_written_leaves_what_there_was(tmp_path, monkeypatch):
    directory = Directory(tmp_path)
    directory.write("a", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TableError, match=r"cannot write .*/a: .*No space left"):
        directory.write("a", b"new")
    assert directory.names() == ["a"]
    assert directory.read("a") == b"old"


def test_relative_paths_mean_the_same_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = pickle.loads(pickle.dumps(Directory("vectors/")))
    monkeypatch.chdir("/")
    directory.write("a", b"1")
    assert (tmp_path / "vectors" / "a").read_bytes() == b"1"
    assert directory.local == tmp_path / "vectors"


def test_what_is_on_a_disk_has_a_path(tmp_path, bucket):
    assert Directory("s3://bucket/a").local is None
    assert Directory(tmp_path).local == tmp_path


def test_a_path_on_a_disk_may_be_a_quoted_uri(tmp_path):
    assert Directory(f"file://{tmp_path}/a%20b/").local == tmp_path / "a b"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://bucket/a/", "s3://bucket/a"),
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/a/?region=x", "s3://bucket/a?region=x"),
        ("file:///", "file:///"),
        (Path("/a/../b/"), "/b"),
        ("/", "/"),
    ],
)
def test_locations_end_without_a_slash(given, kept):
    assert absolute(given) == kept == absolute(kept)


def test_messages_tell_no_passwords():
    assert display_name("s3://KEY:SECRET@bucket/a%20b?region=x") == "s3://bucket/a b"
    assert display_name("abfss://box@host.net/a") == "abfss://box@host.net/a"
    assert display_name("/a%20b?c") == "/a%20b?c"
    assert str(Directory("s3://KEY:SECRET@bucket/a%20b/?region=x")) == "s3://bucket/a b"


@pytest.mark.parametrize("uri", ["file://USER:SECRET@host/x", "nope://USER:SECRET@host/x"])
def test_no_error_tells_a_password(uri, refuse):
    with pytest.raises(ValueError, match="cannot open") as caught:
        find_files(uri)
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in refuse("search", "a road", "--in", uri)


def test_a_uri_is_taken_for_a_directory(tmp_path):
    (tmp_path / "file").touch()
    assert is_directory(tmp_path)
    assert is_directory("s3://bucket/a")
    assert not is_directory(str(tmp_path / "file"))
    assert not is_directory(tmp_path / "nowhere")


def test_one_connection_serves_all_files_of_a_bucket(bucket):
    names = [f"{i}.txt" for i in range(9)]
    put(lambda name: f"s3://bucket/a/{name}{OPTIONS}", *names)
    put(lambda name: f"s3://bucket/b/{name}", *names)
    assert set(bucket) == {f"s3://bucket/{OPTIONS}", "s3://bucket/"}


@pytest.mark.parametrize("uri", ["nope://x/y", "file://host/x"])
def test_a_uri_that_is_none_is_refused(uri):
    with pytest.raises(ValueError, match=r"cannot open .*: ") as caught:
        find_files(uri)
    assert "\n" not in str(caught.value)


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'onnxsim-embed\[parquet\]'"):
        find_files("a.csv")


# what is read of an input


def test_a_directory_means_its_files_of_texts(place):
    put(
        place, "b.csv", "a.jsonl.gz", "sub/c.parquet", "sub/deep/d.TXT", "z.tsv",
        "README.md", "data", "_SUCCESS", "_tmp/x.csv", ".hidden.csv", ".git/y.txt", "sub/.z.csv",
    )  # fmt: skip
    files = ["a.jsonl.gz", "b.csv", "sub/c.parquet", "sub/deep/d.TXT", "z.tsv"]
    assert found(place) == files
    assert found(place, "sub") == files[2:4]
    assert found(place, "sub/") == files[2:4]


def test_files_of_odd_names_are_found_in_the_same_order_everywhere(place):
    names = sorted(f"{name}.csv" for name in [*ODD, "a", "a!", "a1"])
    put(place, *names)
    assert found(place) == names
    assert found(place, "*.csv") == names


@pytest.mark.parametrize("name", ODD)
def test_a_file_is_itself_whatever_its_name(place, name):
    put(place, f"{name}.csv", "a1.csv", "axb.csv")
    assert found(place, f"{name}.csv") == [f"{name}.csv"]
    put(place, f"in {name}/c.csv")
    assert found(place, f"in {name}") == [f"in {name}/c.csv"]


def test_a_file_of_any_ending_is_taken_if_it_is_named(place):
    put(place, "export.dat", "_a.csv")
    assert found(place, "export.dat") == ["export.dat"]
    assert found(place, "*.dat") == ["export.dat"]
    assert found(place, "_a.csv") == ["_a.csv"]


TREE = ["a.csv", "b.csv", "b.txt", "x/a.csv", "x/y/a.csv", "x/y/z/c.csv", "w/a.csv", "x/_a.csv", ".h/a.csv"]  # fmt: skip
PATTERNS = {
    "*.csv": ["a.csv", "b.csv"],
    "b.*": ["b.csv", "b.txt"],
    "[!a].csv": ["b.csv"],
    "[bc].csv": ["b.csv"],
    "*/a.csv": ["w/a.csv", "x/a.csv"],
    "[x]/*.csv": ["x/a.csv"],
    "x/*/a.csv": ["x/y/a.csv"],
    "**/a.csv": ["a.csv", "w/a.csv", "x/a.csv", "x/y/a.csv"],
    "x/**/*.csv": ["x/a.csv", "x/y/a.csv", "x/y/z/c.csv"],
    "**/y/**": ["x/y/a.csv", "x/y/z/c.csv"],
    "**": ["a.csv", "b.csv", "b.txt", "w/a.csv", "x/a.csv", "x/y/a.csv", "x/y/z/c.csv"],
    "x/_*.csv": ["x/_a.csv"],
    ".*/a.csv": [".h/a.csv"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(place, pattern):
    put(place, *TREE)
    prefix = place().partition("?")[0]
    options = place().removeprefix(prefix)
    as_typed = lambda what="": f"{prefix}{what}{options}"  # noqa: E731
    assert found(as_typed, pattern) == PATTERNS[pattern]


def test_a_question_mark_is_a_character_of_a_path(tmp_path):
    put(lambda name: f"{tmp_path}/{name}", "a1.csv", "a12.csv")
    assert found(lambda name="": f"{tmp_path}/{name}", "a?.csv") == ["a1.csv"]


def test_a_pattern_looks_only_where_files_can_be(tmp_path, monkeypatch):
    put(lambda name: f"{tmp_path}/{name}", "a/1.csv", "b/2.csv", "a/deep/3.csv")
    looked = []
    real = storage._entries
    monkeypatch.setattr(storage, "_entries", lambda *a, **k: looked.append(a[1]) or real(*a, **k))
    find_files(f"{tmp_path}/a/*.csv")
    assert looked == [f"{tmp_path}/a"]


@pytest.mark.parametrize("name", ["a.csv", "sub", "a.csv/b.csv"])
def test_a_file_that_is_not_there_is_named(place, name):
    if "/" in name:
        put(place, "a.csv")
    with pytest.raises(FileNotFoundError) as caught:
        find_files(place(name))
    assert display_name(place(name)) in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["*.csv", "no/*.csv", "a.txt/*", "**/x*", "*", "sub/**", "**/_*"]
)
def test_a_pattern_without_files_is_named(place, pattern):
    put(place, *(["a.txt"] if pattern[0] != "*" else []))
    with pytest.raises(FileNotFoundError) as caught:
        find_files(place(pattern))
    assert display_name(place(pattern)) in str(caught.value)


def test_a_directory_without_texts_says_what_is_known(place):
    put(place, "sub/README.md", "sub/_SUCCESS")
    with pytest.raises(
        FileNotFoundError, match=r"no text files in .*csv, tsv, jsonl, parquet, txt"
    ):
        find_files(place("sub"))


def test_links_that_lead_in_a_circle_are_entered_once(tmp_path):
    put(lambda name: f"{tmp_path}/in/{name}", "a.csv", "x/b.csv", "y/c.csv")
    (tmp_path / "in/x/up").symlink_to("..")
    (tmp_path / "in/x/other").symlink_to("../y")
    (tmp_path / "in/y/other").symlink_to("../x")
    (tmp_path / "in/gone.csv").symlink_to("nowhere")
    names = [os.path.realpath(file) for file in find_files(tmp_path / "in")]
    assert sorted(names) == [f"{tmp_path}/in/{name}" for name in ("a.csv", "x/b.csv", "y/c.csv")]


def test_a_link_to_data_elsewhere_is_followed(tmp_path):
    put(lambda name: f"{tmp_path}/{name}", "data/a.csv", "in/b.csv")
    (tmp_path / "in/more").symlink_to("../data")
    assert [os.path.basename(file) for file in find_files(tmp_path / "in")] == ["b.csv", "a.csv"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_directory_that_cannot_be_read_is_no_empty_one(tmp_path):
    put(lambda name: f"{tmp_path}/{name}", "a.csv", "closed/b.csv")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(PermissionError):
            find_files(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)
