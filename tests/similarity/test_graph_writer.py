"""A graph is written part by part, goes on after any stop, and appears when it is whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse
from vector_sets import SETS, assert_same, clustered_vectors, on_disk

from onnxsim_embed import open_graph, write_graph
from onnxsim_embed.errors import TableError
from onnxsim_embed.similarity import graph_writer as graph_job
from onnxsim_embed.similarity.compare import neighbours, similarity_matrix
from onnxsim_embed.similarity.graph_writer import GraphCheckpoint, digest
from onnxsim_embed.similarity.out_of_core import AllPairs

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = clustered_vectors(rows=60)
ROWS = len(VECTORS)

each_kind = pytest.mark.parametrize("kind", [{"threshold": 0.4}, {"k": 3}], ids=str)


@pytest.fixture(autouse=True)
def parts_of_seven(monkeypatch):
    monkeypatch.setattr(graph_job, "SHARD_PAIRS", 7 * ROWS)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "graph"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def matrix_of_best(vectors, k):
    best = neighbours(vectors, k)
    rows = np.repeat(np.arange(len(vectors), dtype=np.int32), k)
    entries = (best.scores.ravel(), (rows, best.indices.ravel().astype(np.int32)))
    return sparse.csr_array(entries, shape=(len(vectors), len(vectors)))


def expected(kind, vectors=VECTORS):
    if "k" in kind:
        return matrix_of_best(vectors, kind["k"])
    return similarity_matrix(vectors, kind["threshold"])


class StopError(Exception):
    pass


@pytest.fixture
def fails_at(monkeypatch):
    """Let the writing of a part (counted from 0) begin and then fail."""

    def prepare(number, error):
        save, calls = sparse.save_npz, []

        def failing(stream, matrix, **options):
            calls.append(1)
            if len(calls) > number:
                stream.write(b"half a part")
                stream.flush()
                raise error
            save(stream, matrix, **options)

        monkeypatch.setattr(sparse, "save_npz", failing)
        return calls

    return prepare


# what is written


@pytest.mark.parametrize("vectors", [*SETS.values(), VECTORS.astype(np.float16)])
@pytest.mark.parametrize("threshold", [-1, 0, 0.5])
@pytest.mark.parametrize("include_self", [True, False])
def test_parts_make_up_the_matrix(target, vectors, threshold, include_self):
    options = {"threshold": threshold, "include_self": include_self}
    graph = write_graph(vectors, target, **options)
    assert len(graph.parts) > 3
    matrix = similarity_matrix(vectors, **options)
    assert_same(graph.to_matrix(), matrix)
    assert graph.nnz == matrix.nnz
    assert open_graph(target) == graph
    assert names(target.parent) == ["graph"]
    named = {"index.json", "diagonal.npy", *(part.file for part in graph.parts)}
    assert set(names(target)) == named


@pytest.mark.parametrize("k", [1, 3, 39])
def test_parts_make_up_the_k_best(target, k):
    vectors = SETS["crossing"]
    graph = write_graph(vectors, target, k=k)
    assert len(graph.parts) == 4
    assert_same(graph.to_matrix(), expected({"k": k}, vectors))


@each_kind
@pytest.mark.parametrize("max_memory", [2000, 30_000, 60_000, None])
def test_no_entry_depends_on_memory(target, tmp_path, monkeypatch, kind, max_memory):
    monkeypatch.setattr(graph_job, "SHARD_PAIRS", 1 << 31)
    vectors = on_disk(VECTORS, tmp_path / "v.npy")
    if max_memory == 2000:
        vectors = vectors[:20]
    graph = write_graph(vectors, target, max_memory=max_memory, **kind)
    assert_same(graph.to_matrix(), expected(kind, np.array(vectors)))
    assert (len(graph.parts) > 1) is (max_memory in (2000, 30_000))


def test_rows_that_find_more_than_usual_are_written_in_smaller_parts(target, monkeypatch, capsys):
    """Sorted by topic, the rows of one part may be those of the largest cluster."""
    monkeypatch.setattr(graph_job, "SHARD_PAIRS", 1 << 31)
    vectors = np.random.default_rng(0).standard_normal((800, 24)).astype(np.float32)
    vectors[:200] = vectors[0]
    options = {"threshold": 0.9, "max_memory": 470_000, "show_progress_bar": True}
    graph = write_graph(vectors, target, **options)
    sizes = [part.rows for part in graph.parts]
    assert sizes[0] < max(sizes)
    assert_same(graph.to_matrix(), similarity_matrix(vectors, 0.9))
    assert " 800/800 " in capsys.readouterr().err.split("\r")[-1]  # none is counted twice


def test_a_row_that_does_not_fit_alone_is_refused(target):
    with pytest.raises(MemoryError, match="raise the threshold or max_memory"):
        write_graph(np.ones((ROWS, 2)), target, threshold=0.5, max_memory=1000)
    assert not target.exists()


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_rows(target, rows, include_self):
    options = {"threshold": 0.5, "include_self": include_self}
    graph = write_graph(VECTORS[:rows], target, **options)
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS[:rows], **options))
    assert len(graph.parts) == rows


def test_settings_may_be_numbers_of_numpy(target):
    graph = write_graph(VECTORS, target, threshold=np.float32(0.5))
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.5))
    graph = write_graph(VECTORS, target, k=np.int64(2), force=True)
    assert graph.k == 2


def test_a_bar_shows_progress_on_request(target, capsys):
    write_graph(VECTORS, target, k=2)
    assert capsys.readouterr().err == ""
    write_graph(VECTORS, target, k=2, force=True, show_progress_bar=True)
    assert "60/60" in capsys.readouterr().err


# going on


KILLED = """
import os, signal, sys
import numpy as np
from scipy import sparse
from onnxsim_embed import write_graph
from onnxsim_embed.similarity import graph_writer as graph_job
graph_job.SHARD_PAIRS = int(sys.argv[3])
save, parts = sparse.save_npz, []
def killing(stream, matrix, **options):
    if len(parts) == 4:
        stream.write(b"half a part")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    parts.append(1)
    save(stream, matrix, **options)
sparse.save_npz = killing
write_graph(np.load(sys.argv[1]), sys.argv[2], **eval(sys.argv[4]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
@each_kind
def test_a_killed_job_goes_on_with_the_part_that_is_missing(tmp_path, target, monkeypatch, kind):
    np.save(tmp_path / "v.npy", VECTORS)
    arguments = [tmp_path / "v.npy", target, 7 * ROWS, kind]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    parts = GraphCheckpoint(target).directory / "parts"
    done = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.npz")}
    assert len(done) == 4
    assert len(names(parts)) == 5  # and half a part
    rows = []
    for name in ("above", "top_k"):
        call = getattr(AllPairs, name)
        monkeypatch.setattr(
            AllPairs, name,
            lambda self, *a, call=call, **o: rows.append(o["rows"].start) or call(self, *a, **o),
        )  # fmt: skip
    graph = write_graph(np.load(tmp_path / "v.npy"), target, **kind)
    assert rows == [28, 35, 42, 49, 56]
    assert {target / path.name: time for path, time in done.items()} == {
        target / path.name: (target / path.name).stat().st_mtime_ns for path in done
    }
    monkeypatch.undo()
    assert_same(graph.to_matrix(), expected(kind))
    monkeypatch.setattr(graph_job, "SHARD_PAIRS", 7 * ROWS)
    write_graph(VECTORS, tmp_path / "at-once", **kind)
    assert files(target) == files(tmp_path / "at-once")
    assert names(tmp_path) == ["at-once", "graph", "v.npy"]


@each_kind
@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left"), TableError)],
    ids=["interrupt", "disk"],
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 3])
def test_an_interrupted_job_or_a_full_disk_costs_a_part(
    target, fails_at, monkeypatch, kind, error, raised, number
):
    fails_at(number, error)
    with pytest.raises(raised) as caught:
        write_graph(VECTORS, target, **kind)
    if raised is TableError:
        assert str(caught.value) == f"cannot write {target}: No space left"
    assert names(target.parent) == [".graph.partial"]
    assert len(names(GraphCheckpoint(target).directory / "parts")) == number
    monkeypatch.undo()
    monkeypatch.setattr(graph_job, "SHARD_PAIRS", 30 * ROWS)  # not asked again
    calls = fails_at(100, error)
    graph = write_graph(VECTORS, target, max_memory=50_000_000, **kind)
    assert len(calls) == 9 - number
    assert [part.rows for part in graph.parts] == [7] * 8 + [4]
    assert_same(graph.to_matrix(), expected(kind))
    assert names(target.parent) == ["graph"]


FULL = """
import resource, sys
import numpy as np
from onnxsim_embed import write_graph
from onnxsim_embed.errors import TableError
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    write_graph(np.load(sys.argv[1]), sys.argv[2], threshold=-1)
except TableError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="no limit of file sizes")
def test_a_file_that_grows_too_large_is_one_error_and_nothing_else(tmp_path, target):
    np.save(tmp_path / "v.npy", VECTORS)
    arguments = [sys.executable, "-c", FULL, str(tmp_path / "v.npy"), str(target)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == f"cannot write {target}: {os.strerror(errno.EFBIG)}\n"
    assert not target.exists()
    assert_same(
        write_graph(VECTORS, target, threshold=-1).to_matrix(), similarity_matrix(VECTORS, -1)
    )


def half_done(target, fails_at, monkeypatch, **options):
    fails_at(2, StopError())
    with pytest.raises(StopError):
        write_graph(VECTORS, target, **({"threshold": 0.4} | options))
    monkeypatch.undo()
    monkeypatch.setattr(graph_job, "SHARD_PAIRS", 7 * ROWS)
    return GraphCheckpoint(target).directory


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (VECTORS, {"threshold": 0.5}, r"threshold: 0.4, now 0.5\)"),
        (VECTORS, {"k": 3}, r"threshold: 0.4, now None, k: None, now 3, include_self: True, now False\)"),
        (VECTORS, {"threshold": 0.4, "include_self": False}, r"\(include_self: True, now False\)"),
        (VECTORS[:59], {"threshold": 0.4}, r"\(rows: 60, now 59, vectors: \w{16}, now \w{16}\)"),
        (VECTORS + 1, {"threshold": 0.4}, r"\(vectors: \w{16}, now \w{16}\)"),
        (VECTORS.astype(np.float64), {"threshold": 0.4}, r"\(vectors: \w{16}, now \w{16}\)"),
    ],
)  # fmt: skip
def test_another_job_is_refused_and_named(target, fails_at, monkeypatch, vectors, options, message):
    work = half_done(target, fails_at, monkeypatch)
    before = files(work / "parts")
    with pytest.raises(ValueError, match=message):
        write_graph(vectors, target, **options)
    assert files(work / "parts") == before
    graph = write_graph(vectors, target, force=True, **options)
    assert graph.vectors == digest(vectors)
    assert names(target.parent) == ["graph"]


def test_parts_of_another_version_are_not_used(target, fails_at, monkeypatch):
    half_done(target, fails_at, monkeypatch)
    monkeypatch.setattr(GraphCheckpoint, "format_version", 2)
    with pytest.raises(TableError, match=r"format version 1, expected 2"):
        write_graph(VECTORS, target, threshold=0.4)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", None])
def test_a_damaged_part_is_computed_again(target, fails_at, monkeypatch, content):
    work = half_done(target, fails_at, monkeypatch)
    path = work / "parts/part-00001.npz"
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    calls = fails_at(100, StopError())
    graph = write_graph(VECTORS, target, threshold=0.4)
    assert len(calls) == 8  # all but the first
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.4))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"part_rows": 7}',
     *(b'{"replaces": false, "part_rows": %s}' % value
       for value in (b"0", b"-7", b'"7"', b"7.5", b"null", b"true", b"1e999")),
     b'{"replaces": 1, "part_rows": 7}'],
)  # fmt: skip
def test_a_damaged_journal_is_named_and_nothing_is_dropped(target, fails_at, monkeypatch, content):
    work = half_done(target, fails_at, monkeypatch)
    before = files(work / "parts")
    (work / "job.json").write_bytes(content)
    with pytest.raises(TableError, match=r"job\.json is damaged"):
        write_graph(VECTORS, target, threshold=0.4)
    assert files(work / "parts") == before
    write_graph(VECTORS, target, threshold=0.4, force=True)
    assert names(target.parent) == ["graph"]


def test_a_row_that_is_not_finite_is_named_and_nothing_is_left(target):
    vectors = VECTORS.copy()
    vectors[[33, 50]] = np.inf
    for max_memory in (None, 20_000):
        with pytest.raises(ValueError, match=r"first in row 33$"):
            write_graph(vectors, target, threshold=0.4, max_memory=max_memory)
        assert names(target.parent) == []


# the place


def test_a_second_process_is_refused_at_once(target, monkeypatch):
    tried = []
    save = sparse.save_npz

    def meanwhile(stream, matrix, **options):
        with pytest.raises(TableError, match=f"another process is writing {target}: wait for it"):
            write_graph(VECTORS, target, k=2, force=True)
        tried.append(1)
        save(stream, matrix, **options)

    monkeypatch.setattr(sparse, "save_npz", meanwhile)
    graph = write_graph(VECTORS, target, threshold=0.4)
    assert len(tried) == 9
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.4))


def test_a_graph_is_replaced_on_request_only_and_at_the_end_only(target, monkeypatch):
    write_graph(VECTORS, target, threshold=0.4)
    before = files(target)
    with pytest.raises(FileExistsError, match="graph exists; replace it with"):
        write_graph(VECTORS, target, k=3)
    save = sparse.save_npz
    seen = []
    monkeypatch.setattr(
        sparse, "save_npz", lambda *a, **o: seen.append(files(target)) or save(*a, **o)
    )
    graph = write_graph(VECTORS, target, k=3, force=True)
    assert seen == [before] * 9
    assert_same(graph.to_matrix(), expected({"k": 3}))
    assert names(target.parent) == ["graph"]


def test_replacing_a_graph_goes_on_without_asking_again(target, fails_at, monkeypatch):
    write_graph(VECTORS, target, k=3)
    before = files(target)
    half_done(target, fails_at, monkeypatch, force=True)
    assert files(target) == before
    calls = fails_at(100, StopError())
    graph = write_graph(VECTORS, target, threshold=0.4)
    assert len(calls) == 7
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.4))
    assert names(target.parent) == ["graph"]


def test_a_graph_that_came_later_is_not_replaced_unasked(target, fails_at, monkeypatch, tmp_path):
    half_done(target, fails_at, monkeypatch)
    write_graph(VECTORS, tmp_path / "other", k=3)
    (tmp_path / "other").rename(target)
    with pytest.raises(FileExistsError, match="graph exists; replace it with"):
        write_graph(VECTORS, target, threshold=0.4)
    assert open_graph(target).k == 3


@pytest.mark.parametrize("number", [0, 1])
def test_a_stop_while_a_graph_is_put_in_place_loses_neither(target, monkeypatch, number):
    """Between its parts, the old one has been moved away (or not even that)."""
    write_graph(VECTORS, target, k=3)
    move = os.replace

    def interrupted(source, *_):
        if number == 0 or os.path.isdir(source):
            raise KeyboardInterrupt
        move(source, *_)

    if number == 0:
        monkeypatch.setattr(type(target), "rename", interrupted)
    else:
        monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_graph(VECTORS, target, threshold=0.4, force=True)
    monkeypatch.undo()
    kept = target if number == 0 else GraphCheckpoint(target).directory / "old"
    assert open_graph(kept).k == 3
    graph = write_graph(VECTORS, target, threshold=0.4)
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.4))
    assert names(target.parent) == ["graph"]


def test_a_journal_without_parts_is_what_a_kill_after_the_end_leaves(target):
    write_graph(VECTORS, target, threshold=0.4)
    work = GraphCheckpoint(target).directory
    work.mkdir()
    settings = json.loads((target / "index.json").read_text())
    settings.pop("parts")
    (work / "job.json").write_text(json.dumps(settings | {"part_rows": 7, "replaces": True}))
    with pytest.raises(FileExistsError, match="force=True"):
        GraphCheckpoint(target).check_target(False)
    write_graph(VECTORS, target, threshold=0.4, force=True)
    assert names(target.parent) == ["graph"]


def test_what_is_no_graph_is_never_replaced(target):
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(FileExistsError, match="exists and is not a similarity graph"):
            write_graph(VECTORS, target, threshold=0.4, force=force)
    assert files(target) == {"thesis.txt": b"mine"}
    (target / "thesis.txt").rename(target.parent / "file")
    with pytest.raises(FileExistsError, match="file exists and is not a similarity graph"):
        write_graph(VECTORS, target.parent / "file", threshold=0.4, force=True)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        write_graph(VECTORS, target.parent / "none/graph", threshold=0.4)
    assert names(target.parent) == ["file", "graph"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either threshold or k"),
        ({"threshold": 0.5, "k": 3}, "either threshold or k"),
        ({"threshold": 1.5}, "threshold must be from -1 to 1, got 1.5"),
        ({"k": 0}, r"k must be from 1 to 59 \(the other rows\), got 0"),
        ({"k": 60}, r"k must be from 1 to 59 \(the other rows\), got 60"),
        ({"k": 3, "max_memory": 0}, "max_memory must be positive, got 0"),
        ({"k": 3, "block_bytes": 0}, "block_bytes must be positive, got 0"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(target, options, message):
    with pytest.raises(ValueError, match=message):
        write_graph(VECTORS, target, **options)
    assert names(target.parent) == []


def test_no_other_rows_to_choose_from(target):
    for rows in (0, 1):
        with pytest.raises(ValueError, match="there are no other rows to choose 1 from"):
            write_graph(VECTORS[:rows], target, k=1)


def test_a_digest_tells_vectors_apart(tmp_path, monkeypatch):
    first = digest(VECTORS)
    monkeypatch.setattr(graph_job, "DIGEST_BYTES", 100)
    assert digest(VECTORS) == first  # read in parts
    assert digest(np.asfortranarray(VECTORS)) == first
    assert digest(np.asarray(on_disk(VECTORS, tmp_path / "v.npy"))) == first
    changed = VECTORS.copy()
    changed[59, 23] = np.nextafter(changed[59, 23], 9)
    others = [changed, VECTORS[::-1], VECTORS.reshape(30, 48), VECTORS.astype(">f4"), VECTORS[:, :0],
              VECTORS[:0], VECTORS.astype(np.float16), VECTORS.view(np.int32)]  # fmt: skip
    assert len({first, *map(digest, others)}) == 9
