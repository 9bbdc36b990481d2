"""A similarity graph is written shard by shard, continues after any interruption, and appears when complete."""

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
from onnxsim_embed.similarity import graph_writer
from onnxsim_embed.similarity.compare import neighbours, similarity_matrix
from onnxsim_embed.similarity.graph_writer import GraphCheckpoint, digest
from onnxsim_embed.similarity.out_of_core import AllPairs

VECTORS = clustered_vectors(rows=60)
ROWS = len(VECTORS)

each_kind = pytest.mark.parametrize("kind", [{"threshold": 0.4}, {"k": 3}], ids=str)


@pytest.fixture(autouse=True)
def shards_of_seven(monkeypatch, one_thread):
    monkeypatch.setattr(graph_writer, "SHARD_PAIRS", 7 * ROWS)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "graph"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def expected(kind, vectors=VECTORS):
    if "k" not in kind:
        return similarity_matrix(vectors, kind["threshold"])
    best = neighbours(vectors, kind["k"])
    rows = np.repeat(np.arange(len(vectors), dtype=np.int32), kind["k"])
    entries = (best.scores.ravel(), (rows, best.indices.ravel().astype(np.int32)))
    return sparse.csr_array(entries, shape=(len(vectors), len(vectors)))


class StopError(Exception):
    """Stops a run."""


def save_until(monkeypatch, number, error):
    """Let the writing of a shard (counted from 0) begin and then fail; return the shards written before."""
    save, calls = sparse.save_npz, []

    def failing(stream, matrix, **options):
        calls.append(1)
        if len(calls) > number:
            stream.write(b"half a shard")
            stream.flush()
            raise error
        save(stream, matrix, **options)

    monkeypatch.setattr(sparse, "save_npz", failing)
    return calls


def interrupt(target, monkeypatch, number=2, error=StopError, raises=StopError, **options):
    """Write a graph up to a shard; return the hidden directory."""
    with monkeypatch.context() as patch:
        save_until(patch, number, error)
        with pytest.raises(raises) as caught:
            write_graph(VECTORS, target, **({"threshold": 0.4} | options))
    if raises is TableError:
        assert str(caught.value).startswith(f"cannot write {target}: No space left: ")
    return GraphCheckpoint(target).directory


# what is written


@pytest.mark.parametrize("vectors", [*SETS.values(), VECTORS.astype(np.float16)])
@pytest.mark.parametrize(("threshold", "include_self"), [(-1, True), (0, False), (0.5, True), (0.5, False)])  # fmt: skip
def test_shards_make_up_the_matrix(target, vectors, threshold, include_self):
    options = {"threshold": threshold, "include_self": include_self}
    graph = write_graph(vectors, target, **options)
    assert len(graph.parts) > 3
    matrix = similarity_matrix(vectors, **options)
    assert_same(graph.to_matrix(), matrix)
    assert graph.nnz == matrix.nnz
    assert open_graph(target) == graph
    assert names(target.parent) == ["graph"]
    assert set(names(target)) == {"index.json", "diagonal.npy", *(s.file for s in graph.parts)}


@pytest.mark.parametrize("k", [1, 3, 39])
def test_shards_make_up_the_top_k(target, k):
    vectors = SETS["crossing"]
    graph = write_graph(vectors, target, k=np.int64(k))
    assert (len(graph.parts), graph.k) == (4, k)
    assert_same(graph.to_matrix(), expected({"k": k}, vectors))


@each_kind
@pytest.mark.parametrize("max_memory", [2000, 30_000, 60_000, None])
def test_no_entry_depends_on_memory(target, tmp_path, monkeypatch, kind, max_memory):
    monkeypatch.setattr(graph_writer, "SHARD_PAIRS", 1 << 31)
    vectors = on_disk(VECTORS, tmp_path / "v.npy")
    if max_memory == 2000:
        vectors = vectors[:20]
    graph = write_graph(vectors, target, max_memory=max_memory, **kind)
    assert_same(graph.to_matrix(), expected(kind, np.array(vectors)))
    assert (len(graph.parts) > 1) is (max_memory in (2000, 30_000))


def test_rows_with_more_pairs_than_usual_become_smaller_shards(target, monkeypatch, capsys):
    """Rows sorted by topic: those of a shard may all be in the largest cluster."""
    monkeypatch.setattr(graph_writer, "SHARD_PAIRS", 1 << 31)
    vectors = np.random.default_rng(0).standard_normal((800, 24)).astype(np.float32)
    vectors[:200] = vectors[0]
    options = {"threshold": 0.9, "max_memory": 352_000, "show_progress_bar": True}
    graph = write_graph(vectors, target, **options)
    sizes = [shard.rows for shard in graph.parts]
    assert sizes[0] < max(sizes)
    assert_same(graph.to_matrix(), similarity_matrix(vectors, 0.9))
    assert " 800/800 " in capsys.readouterr().err.split("\r")[-1]  # none is counted twice


def test_a_row_that_does_not_fit_alone(target):
    with pytest.raises(MemoryError, match="raise the threshold or max_memory"):
        write_graph(np.ones((ROWS, 2)), target, threshold=0.5, max_memory=1000)
    assert not target.exists()


def test_other_memory_errors_are_not_taken_for_a_large_result(target, monkeypatch):
    def failing(*_, **__):
        raise MemoryError("of numpy")

    monkeypatch.setattr(AllPairs, "above", failing)
    with pytest.raises(MemoryError, match="of numpy"):
        write_graph(VECTORS, target, threshold=0.5)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_rows(target, rows, include_self):
    options = {"threshold": np.float32(0.5), "include_self": include_self}
    graph = write_graph(VECTORS[:rows], target, **options)
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS[:rows], **options))
    assert len(graph.parts) == rows


def test_a_bar_shows_progress_on_request(target, capsys):
    write_graph(VECTORS, target, k=2)
    assert capsys.readouterr().err == ""
    write_graph(VECTORS, target, k=2, force=True, show_progress_bar=True)
    assert "60/60" in capsys.readouterr().err


# continuing


KILLED = """
import os, signal, sys
import numpy as np
from scipy import sparse
from onnxsim_embed import write_graph
from onnxsim_embed.similarity import graph_writer
graph_writer.SHARD_PAIRS = int(sys.argv[3])
save, shards = sparse.save_npz, []
def killing(stream, matrix, **options):
    if len(shards) == 4:
        stream.write(b"half a shard")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    shards.append(1)
    save(stream, matrix, **options)
sparse.save_npz = killing
write_graph(np.load(sys.argv[1]), sys.argv[2], **eval(sys.argv[4]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
@each_kind
def test_a_killed_run_continues_with_the_missing_shard(tmp_path, target, monkeypatch, kind):
    np.save(tmp_path / "v.npy", VECTORS)
    arguments = [tmp_path / "v.npy", target, 7 * ROWS, kind]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    shards = GraphCheckpoint(target).shards
    done = {path.name: path.stat().st_mtime_ns for path in shards.glob("part-*.npz")}
    assert len(done) == 4
    assert len(names(shards)) == 5  # and half a shard
    rows = []
    with monkeypatch.context() as patch:
        for name in ("above", "top_k"):
            call = getattr(AllPairs, name)
            patch.setattr(
                AllPairs, name,
                lambda self, *a, call=call, **o: rows.append(o["rows"].start) or call(self, *a, **o),
            )  # fmt: skip
        graph = write_graph(np.load(tmp_path / "v.npy"), target, **kind)
    assert rows == [28, 35, 42, 49, 56]
    assert {name: (target / name).stat().st_mtime_ns for name in done} == done
    assert_same(graph.to_matrix(), expected(kind))
    write_graph(VECTORS, tmp_path / "at-once", **kind)
    assert files(target) == files(tmp_path / "at-once")
    assert names(tmp_path) == ["at-once", "graph", "v.npy"]


@each_kind
@pytest.mark.parametrize("number", range(9))
def test_an_interruption_at_any_shard_changes_no_byte(tmp_path, monkeypatch, kind, number):
    write_graph(VECTORS, tmp_path / "at-once", **kind)
    options = {"threshold": None} | kind
    interrupt(tmp_path / "graph", monkeypatch, number, **options)
    write_graph(VECTORS, tmp_path / "graph", **kind)
    assert files(tmp_path / "graph") == files(tmp_path / "at-once")


@pytest.mark.parametrize(
    ("error", "raises"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left"), TableError)],
    ids=["interrupt", "disk"],
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 3])
def test_an_interruption_or_a_full_disk_costs_one_shard(target, monkeypatch, error, raises, number):
    work = interrupt(target, monkeypatch, number, error, raises)
    assert names(target.parent) == [".graph.partial"]
    assert len(names(work / "parts")) == number
    monkeypatch.setattr(graph_writer, "SHARD_PAIRS", 30 * ROWS)  # the journal's rows stay
    calls = save_until(monkeypatch, 100, error)
    graph = write_graph(VECTORS, target, max_memory=50_000_000, threshold=0.4)
    assert len(calls) == 9 - number
    assert [shard.rows for shard in graph.parts] == [7] * 8 + [4]
    assert names(target.parent) == ["graph"]


def test_a_run_of_the_version_before_continues(target, monkeypatch):
    """The hidden directory as commit dd297de wrote it: the settings beside the progress."""
    work = interrupt(target, monkeypatch)
    journal = {"format_version": 1, "rows": 60, "threshold": 0.4, "k": None, "include_self": True,
               "vectors": digest(VECTORS), "part_rows": 7, "replaces": False}  # fmt: skip
    (work / "job.json").write_text(json.dumps(journal, indent=2))
    calls = save_until(monkeypatch, 100, None)
    assert len(write_graph(VECTORS, target, threshold=0.4).parts) == 9
    assert len(calls) == 7


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
def test_a_file_that_grows_too_large_is_one_error(tmp_path, target):
    np.save(tmp_path / "v.npy", VECTORS)
    arguments = [sys.executable, "-c", FULL, str(tmp_path / "v.npy"), str(target)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == (
        "",
        f"cannot write {target}: {os.strerror(errno.EFBIG)}\n",
    )
    graph = write_graph(VECTORS, target, threshold=-1)
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, -1))


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (VECTORS, {"threshold": 0.5}, r"threshold: 0.4, now 0.5\)"),
        (VECTORS, {"k": 3}, r"threshold: 0.4, now None, k: None, now 3, include_self: True, now False\)"),
        (VECTORS[:59], {"threshold": 0.4}, r"\(rows: 60, now 59, vectors: \w{16}, now \w{16}\)"),
        (VECTORS.astype(np.float64), {"threshold": 0.4}, r"\(vectors: \w{16}, now \w{16}\)"),
    ],
)  # fmt: skip
def test_a_run_with_other_settings_is_rejected(target, monkeypatch, vectors, options, message):
    work = interrupt(target, monkeypatch)
    before = files(work / "parts")
    with pytest.raises(ValueError, match=message):
        write_graph(vectors, target, **options)
    assert files(work / "parts") == before
    graph = write_graph(vectors, target, force=True, **options)
    assert graph.vectors == digest(vectors)
    assert names(target.parent) == ["graph"]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", None])
def test_a_damaged_shard_is_computed_again(target, monkeypatch, content):
    path = interrupt(target, monkeypatch) / "parts/part-00001.npz"
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    calls = save_until(monkeypatch, 100, StopError())
    graph = write_graph(VECTORS, target, threshold=0.4)
    assert len(calls) == 8  # all but the first
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.4))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"part_rows": 7}', b'{"replaces": false, "part_rows": 0}', b'{"replaces": 1, "part_rows": 7}',
     b'{"format_version": 2, "replaces": false, "part_rows": 7}'],
)  # fmt: skip
def test_a_damaged_journal_is_named_and_nothing_is_dropped(target, monkeypatch, content):
    work = interrupt(target, monkeypatch)
    before = files(work / "parts")
    (work / "job.json").write_bytes(content)
    with pytest.raises(TableError, match=r"job\.json is damaged"):
        write_graph(VECTORS, target, threshold=0.4)
    assert files(work / "parts") == before
    write_graph(VECTORS, target, threshold=0.4, force=True)
    assert names(target.parent) == ["graph"]


@pytest.mark.parametrize("max_memory", [None, 20_000])
def test_a_row_that_is_not_finite_is_named_and_nothing_is_left(target, max_memory):
    vectors = VECTORS.copy()
    vectors[[33, 50]] = np.inf
    with pytest.raises(ValueError, match=r"first in row 33$"):
        write_graph(vectors, target, threshold=0.4, max_memory=max_memory)
    assert names(target.parent) == []


# the target


def test_a_second_process_is_rejected_at_once(target, monkeypatch):
    rejected = []
    save = sparse.save_npz

    def meanwhile(stream, matrix, **options):
        with pytest.raises(TableError, match="another process"):
            write_graph(VECTORS, target, k=2, force=True)
        rejected.append(1)
        save(stream, matrix, **options)

    monkeypatch.setattr(sparse, "save_npz", meanwhile)
    graph = write_graph(VECTORS, target, threshold=0.4)
    assert len(rejected) == 9
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.4))


@each_kind
def test_a_finished_graph_is_returned_for_the_same_call_only(target, monkeypatch, kind):
    before, written = write_graph(VECTORS, target, **kind), files(target)
    monkeypatch.setattr(AllPairs, "__init__", None)  # nothing is compared
    assert write_graph(VECTORS.copy(), str(target), **kind) == before
    for vectors, options, reason in [
        (VECTORS, {"threshold": 0.5}, "now 0.5"),
        (VECTORS, {"k": 4}, "now 4"),
        (VECTORS[:59], kind, "rows: 60, now 59"),
        (VECTORS[::-1], kind, "vectors: "),
    ]:
        with pytest.raises(FileExistsError, match=rf"{reason}.*force=True"):
            write_graph(vectors, target, **options)
    assert files(target) == written
    (target / "part-00003.npz").unlink()
    with pytest.raises(FileExistsError, match="damaged"):
        write_graph(VECTORS, target, **kind)


def test_a_graph_is_replaced_on_request_and_at_the_end(target, monkeypatch):
    write_graph(VECTORS, target, threshold=0.4)
    before = files(target)
    with pytest.raises(FileExistsError):
        write_graph(VECTORS, target, k=3)
    interrupt(target, monkeypatch, threshold=None, k=3, force=True)
    assert files(target) == before
    assert_same(write_graph(VECTORS, target, k=3).to_matrix(), expected({"k": 3}))  # no force again
    assert names(target.parent) == ["graph"]


def test_a_graph_that_came_later_is_not_replaced_unasked(target, monkeypatch, tmp_path):
    interrupt(target, monkeypatch)
    write_graph(VECTORS, tmp_path / "other", k=3).directory.rename(target)
    with pytest.raises(FileExistsError):
        write_graph(VECTORS, target, threshold=0.4)
    assert open_graph(target).k == 3


@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_while_a_graph_is_replaced_loses_neither(target, monkeypatch, number):
    """When the old graph has been moved away, or not even that."""
    write_graph(VECTORS, target, k=3)
    move = os.replace

    def interrupted(source, *others):
        if number == 0 or os.path.isdir(source):
            raise KeyboardInterrupt
        move(source, *others)

    with monkeypatch.context() as patch:
        patch.setattr(*((type(target), "rename") if number == 0 else (os, "replace")), interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_graph(VECTORS, target, threshold=0.4, force=True)
    kept = target if number == 0 else GraphCheckpoint(target).directory / "old"
    assert open_graph(kept).k == 3
    graph = write_graph(VECTORS, target, threshold=0.4)
    assert_same(graph.to_matrix(), similarity_matrix(VECTORS, 0.4))
    assert names(target.parent) == ["graph"]


def test_what_is_not_a_graph_is_never_replaced(target):
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    (target.parent / "file").write_text("mine")
    for path in (target, target.parent / "file"):
        for force in (False, True):
            with pytest.raises(FileExistsError, match="not a similarity graph"):
                write_graph(VECTORS, path, threshold=0.4, force=force)
    assert files(target) == {"thesis.txt": b"mine"}
    with pytest.raises(FileNotFoundError, match="no directory"):
        write_graph(VECTORS, target.parent / "none/graph", threshold=0.4)
    assert names(target.parent) == ["file", "graph"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (60, {}, "threshold or k"),
        (60, {"threshold": 0.5, "k": 3}, "threshold or k"),
        (60, {"threshold": 1.5}, "threshold"),
        (60, {"k": 0}, "from 1 to 59"),
        (60, {"k": 60}, "from 1 to 59"),
        (1, {"k": 1}, "no other rows"),
        (60, {"k": 3, "max_memory": 0}, "max_memory"),
        (60, {"k": 3, "block_bytes": 0}, "block_bytes"),
    ],
)
def test_invalid_arguments_leave_nothing(target, rows, options, message):
    with pytest.raises(ValueError, match=message):
        write_graph(VECTORS[:rows], target, **options)
    assert names(target.parent) == []


def test_a_digest_tells_vectors_apart(tmp_path, monkeypatch):
    first = digest(VECTORS)
    monkeypatch.setattr(graph_writer, "DIGEST_BYTES", 100)
    assert digest(VECTORS) == first  # read in chunks
    assert digest(np.asfortranarray(VECTORS)) == first
    assert digest(np.asarray(on_disk(VECTORS, tmp_path / "v.npy"))) == first
    changed = VECTORS.copy()
    changed[59, 23] = np.nextafter(changed[59, 23], 9)
    others = [changed, VECTORS[::-1], VECTORS.reshape(30, 48), VECTORS.astype(">f4"), VECTORS[:, :0],
              VECTORS[:0], VECTORS.astype(np.float16), VECTORS.view(np.int32)]  # fmt: skip
    assert len({first, *map(digest, others)}) == 9
