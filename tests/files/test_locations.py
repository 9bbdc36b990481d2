"""Files by path or URI: the same names on a disk, as file:// and in an object store."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from pyarrow import fs

from onnxsim_embed import open_graph, write_graph
from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import TableError
from onnxsim_embed.export import export_model
from onnxsim_embed.files import locations
from onnxsim_embed.files.atomic import atomic_directory, atomic_file, check_output
from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
from onnxsim_embed.files.locations import Directory, absolute, find_files, open_file
from onnxsim_embed.files.tables import row_writer, write_rows
from onnxsim_embed.files.texts import iter_texts, read_scored_pairs
from onnxsim_embed.files.uris import display_name, is_directory, is_uri, without_passwords
from onnxsim_embed.files.vectors import write_vectors
from onnxsim_embed.plot import heatmap

ODD = ["a b", "100%", "a%20b", "a#b", "a?b", "a[1]", "a&b=c", "naïve 漢字", "it's"]
OPTIONS = "?region=eu-west-1&scheme=http"


@pytest.fixture
def bucket(monkeypatch):
    """A file system in memory with the directory s3://bucket; lists the roots it was opened for."""
    system, _ = fs.FileSystem.from_uri("mock:///")
    system.create_dir("bucket")
    roots = []
    monkeypatch.setattr(
        locations, "_connect", lambda root: roots.append(root) or (system, "bucket")
    )
    return roots


@pytest.fixture(params=["path", "file", "s3", "s3 with options"])
def at(request, tmp_path):
    """A function that returns the location of a name in one directory."""
    if request.param == "path":
        return lambda name="": f"{tmp_path}/{name}"
    if request.param == "file":
        return lambda name="": f"file://{tmp_path}/{quote(name, safe='/*')}"
    request.getfixturevalue("bucket")
    options = OPTIONS if "options" in request.param else ""
    return lambda name="": f"s3://bucket/top/{quote(name, safe='/*')}{options}"


def put(at, *names, data=b"text\n"):
    for name in names:
        parent, _, last = name.rpartition("/")
        Directory(at(parent)).write(last, data)


def found(at, name=""):
    """Return the names of the files that are found, relative to the directory."""
    files = find_files(at(name))
    for file in files:
        with open_file(file) as stream:
            assert stream.read()
    start = display_name(absolute(at())) + "/"
    return [display_name(file).removeprefix(start) for file in files]


# Directories


def test_files_are_written_listed_read_and_deleted(at):
    directory = Directory(at("new/vectors"))
    assert directory.names() == []
    with pytest.raises(FileNotFoundError, match=r"there is no file .*vectors/b$"):
        directory.read("b")
    directory.delete("b")
    directory.write("b", b"1")
    directory.write("b", b"two")
    directory.write("a", b"")
    put(at, "new/vectors/sub/c")
    assert directory.names() == ["a", "b"]
    assert (directory.read("a"), directory.read("b")) == (b"", b"two")
    with directory.open("b") as stream:
        stream.seek(1)
        assert stream.read() == b"wo"
    directory.delete("b")
    assert directory.names() == ["a"]


def test_names_may_hold_any_character(at):
    directory = Directory(at("x"))
    for name in ODD:
        directory.write(name, name.encode())
        Directory(at(name)).write("inner.txt", b"2")
        assert Directory(at(name)).read("inner.txt") == b"2"
    assert directory.names() == sorted(ODD)
    assert [directory.read(name).decode() for name in ODD] == ODD


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    directory = Directory(tmp_path / "a.txt")
    assert directory.names() == []
    with pytest.raises(FileNotFoundError, match=r"a\.txt/b"):
        directory.read("b")
    with pytest.raises(TableError, match=r"cannot write .*a\.txt/b: "):
        directory.write("b", b"")


def test_a_relative_path_means_the_same_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = pickle.loads(pickle.dumps(Directory("vectors/")))
    monkeypatch.chdir("/")
    directory.write("a", b"1")
    assert (tmp_path / "vectors" / "a").read_bytes() == b"1"
    assert directory.local == tmp_path / "vectors"
    assert Directory(f"file://{tmp_path}/a%20b/").local == tmp_path / "a b"


@pytest.mark.parametrize(
    ("location", "expected"),
    [("s3://bucket/a/", "s3://bucket/a"), ("s3://bucket", "s3://bucket/"), ("/", "/"),
     ("s3://bucket/a/?region=x", "s3://bucket/a?region=x"), (Path("/a/../b/"), "/b")],
)  # fmt: skip
def test_absolute_locations(location, expected):
    assert absolute(location) == expected == absolute(expected)


def test_one_connection_serves_all_files_of_a_bucket(bucket):
    put(lambda name: f"s3://bucket/a/{name}{OPTIONS}", "1", "2", "3")
    assert set(bucket) == {f"s3://bucket/{OPTIONS}"}
    assert Directory("s3://bucket/a").local is None


# URIs and credentials


def test_paths_and_uris():
    for uri in ("s3://bucket/a", Path("s3://bucket/a"), "file:///a"):
        assert is_uri(uri)
        assert is_directory(uri)
    for path in ("/a", "a:b", "C:/a", Path("a"), "-"):
        assert not is_uri(path)


PASSWORDS = ["SECRET", "SECRET/x", "SECRET x", "pa@SECRET", "pa:SECRET", "SECRET?x", "SECRET#x",
             "SECRET%2Fx", "12/SECRET", 'SECRET"x', "SECRET\nx"]  # fmt: skip
CREDENTIALS = [*(f"s3://user:{password}@bucket/a b" for password in PASSWORDS),
               "s3://SECRET@bucket/a b", "s3://:SECRET@bucket/a b",
               "s3://bucket/a b?secret_key=SECRET&access_key=A"]  # fmt: skip


@pytest.mark.parametrize("uri", CREDENTIALS)
def test_no_message_holds_credentials(uri, monkeypatch):
    assert display_name(uri) == str(Directory(uri)) == "s3://bucket/a b"
    assert "SECRET" not in without_passwords(f"error: cannot read {uri}")
    monkeypatch.setattr(locations, "_connect", lambda root: (_ for _ in ()).throw(ValueError(root)))
    for use in (find_files, open_file):
        with pytest.raises(ValueError, match="bucket") as caught, use(uri):
            pass
        assert "SECRET" not in str(caught.value)


def test_azure_containers_are_not_credentials():
    assert display_name("abfss://box@host.net/a%20b") == "abfss://box@host.net/a b"
    assert display_name("/a%20b?c") == "/a%20b?c"


@pytest.mark.parametrize("uri", ["nope://user:SECRET@x/y", "file://user:SECRET@host/x", "nope://x"])
def test_an_invalid_uri_is_rejected_without_credentials(uri):
    with pytest.raises(ValueError, match="cannot open") as caught:
        find_files(uri)
    assert "SECRET" not in str(caught.value)


# Files of an input


def test_a_directory_means_its_text_files(at):
    put(
        at, "b.csv", "a.jsonl.gz", "sub/c.parquet", "sub/deep/d.TXT", "z.tsv",
        "README.md", "data", "_SUCCESS", "_tmp/x.csv", ".hidden.csv", ".git/y.txt", "sub/.z.csv"
    )  # fmt: skip
    files = ["a.jsonl.gz", "b.csv", "sub/c.parquet", "sub/deep/d.TXT", "z.tsv"]
    assert found(at) == files
    assert found(at, "sub") == found(at, "sub/") == files[2:4]


def test_odd_names_are_found_in_the_same_order_everywhere(at):
    names = sorted(f"{name}.csv" for name in [*ODD, "a", "a!", "a1"])
    put(at, *names, "export.dat", "_a.csv")
    assert found(at) == found(at, "*.csv") == names
    for name in (*names, "export.dat", "_a.csv"):  # an existing file is no pattern
        assert found(at, name) == [name]
    assert found(at, "*.dat") == ["export.dat"]
    put(at, "in a[1]/c.csv")
    assert found(at, "in a[1]") == ["in a[1]/c.csv"]


TREE = ["a.csv", "b.csv", "b.txt", "x/a.csv", "x/y/a.csv", "x/y/z/c.csv", "w/a.csv", "x/_a.csv", ".h/a.csv"]  # fmt: skip
PATTERNS = {
    "*.csv": ["a.csv", "b.csv"],
    "b.*": ["b.csv", "b.txt"],
    "[!a].csv": ["b.csv"],
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


def test_patterns(at):
    put(at, *TREE)
    prefix, mark, options = at().partition("?")
    for pattern, files in PATTERNS.items():
        assert found(lambda name="": f"{prefix}{name}{mark}{options}", pattern) == files, pattern
    for pattern in ("*.tsv", "no/*.csv", "b.txt/*", "**/q*", "no", "b.txt/c"):
        with pytest.raises(FileNotFoundError) as caught:
            find_files(at(pattern))
        assert display_name(at(pattern)) in str(caught.value)


def test_a_question_mark_is_a_wildcard_of_a_path(tmp_path):
    put(lambda name: f"{tmp_path}/{name}", "a1.csv", "a12.csv", "sub/README.md")
    assert find_files(f"{tmp_path}/a?.csv") == [f"{tmp_path}/a1.csv"]
    with pytest.raises(FileNotFoundError, match="csv, tsv, jsonl, parquet, txt"):
        find_files(tmp_path / "sub")


def test_links_are_followed_once(tmp_path):
    put(lambda name: f"{tmp_path}/{name}", "in/a.csv", "in/x/b.csv", "in/y/c.csv", "data/d.csv")
    (tmp_path / "in/x/up").symlink_to("..")
    (tmp_path / "in/x/other").symlink_to("../y")
    (tmp_path / "in/y/other").symlink_to("../x")
    (tmp_path / "in/more").symlink_to("../data")
    (tmp_path / "in/gone.csv").symlink_to("nowhere")
    names = sorted(os.path.basename(file) for file in find_files(tmp_path / "in"))
    assert names == ["a.csv", "b.csv", "c.csv", "d.csv"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_directory_is_not_an_empty_one(tmp_path):
    put(lambda name: f"{tmp_path}/{name}", "a.csv", "closed/b.csv")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(PermissionError):
            find_files(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


URIS = ["s3://u:SEC/R@T@bucket/x", "https://TOKEN@host/x", "s3://bucket/x?secret_key=SECRET"]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("ending", ["", ".csv", ".npy", ".parquet"])
def test_no_function_of_paths_prints_credentials_or_takes_a_uri(
    tmp_path, monkeypatch, kind, uri, ending
):
    monkeypatch.chdir(tmp_path)
    location, data = kind(uri + ending), io.BytesIO(b"a,b\n\xff,1\n")
    calls = [
        lambda: list(iter_texts(location)),
        lambda: list(iter_texts(location, "a", kind="csv", source=data)),
        lambda: list(iter_texts(location, kind="parquet", source=data)),
        lambda: read_scored_pairs(location),
        lambda: row_writer(location, "csv", "csv", 1),
        lambda: write_rows({"a": [1]}, location),
        lambda: write_vectors(np.eye(2), location),
        lambda: EmbeddingCheckpoint(location),
        lambda: open_graph(location),
        lambda: write_graph(np.eye(2), location, k=1),
        lambda: heatmap(np.eye(2), location),
        lambda: locate_checkpoint(location),
        lambda: Artifact.open(location),
        lambda: export_model("minilm", location),
        lambda: check_output(location, force=False),
        lambda: atomic_file(location).__enter__(),
        lambda: atomic_directory(location).__enter__(),
    ]
    for call in calls:
        with pytest.raises((ValueError, TableError)) as caught:
            call()
        assert not re.search("SEC|T@|TOKEN", str(caught.value))
    assert not re.search("SEC|T@|TOKEN", repr(Directory(location)))
    assert not list(tmp_path.iterdir())
