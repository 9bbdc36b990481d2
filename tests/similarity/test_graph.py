"""Stored similarity graphs: what they hold, and the errors for anything else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse
from vector_sets import assert_same, clustered_vectors

from onnxsim_embed import open_graph, write_graph
from onnxsim_embed.errors import TableError
from onnxsim_embed.similarity import graph_writer
from onnxsim_embed.similarity.compare import neighbours, similarity_matrix

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = clustered_vectors(rows=60)


@pytest.fixture
def graph(tmp_path, monkeypatch):
    """A graph of five shards."""
    monkeypatch.setattr(graph_writer, "SHARD_PAIRS", 12 * len(VECTORS))
    return write_graph(VECTORS, tmp_path / "graph", threshold=0.4)


def test_a_graph_is_opened_by_its_index_alone(graph):
    for shard in graph.parts:
        (graph.directory / shard.file).unlink()
    opened = open_graph(str(graph.directory))
    assert opened == graph
    assert (opened.rows, opened.threshold, opened.k, opened.include_self) == (60, 0.4, None, True)
    assert opened.nnz == similarity_matrix(VECTORS, 0.4).nnz


def test_blocks_are_the_rows_beyond_the_diagonal(graph):
    upper = sparse.triu(similarity_matrix(VECTORS, 0.4), 1, format="csr")
    assert [first for first, _ in graph.blocks()] == [0, 12, 24, 36, 48]
    for (first, block), shard in zip(graph.blocks(), graph.parts, strict=True):
        assert isinstance(block, sparse.csr_array)
        expected = sparse.csr_array(upper[first : first + 12])
        assert_same(block, expected)
        assert_same(sparse.csr_array(sparse.load_npz(graph.directory / shard.file)), expected)


def test_a_top_k_graph_has_no_diagonal(tmp_path):
    graph = write_graph(VECTORS, tmp_path / "graph", k=3)
    names = sorted(path.name for path in graph.directory.iterdir())
    assert names == ["index.json", "part-00000.npz"]
    assert graph.nnz == graph.to_matrix().nnz == 180
    assert (graph.threshold, graph.k, graph.include_self) == (None, 3, False)
    best = neighbours(VECTORS, 3)
    dense = graph.to_matrix().toarray()
    np.testing.assert_array_equal(np.take_along_axis(dense, best.indices, axis=1), best.scores)


def test_a_matrix_that_does_not_fit(graph):
    with pytest.raises(MemoryError, match=r"max_memory allows 1 kB.*blocks\(\)"):
        graph.to_matrix(max_memory=1000)
    assert_same(graph.to_matrix(max_memory=24 * graph.nnz), similarity_matrix(VECTORS, 0.4))
    with pytest.raises(ValueError, match="max_memory"):
        graph.to_matrix(max_memory=0)


# damage


@pytest.mark.parametrize("name", ["nothing", "."])
def test_a_directory_without_index_is_not_a_graph(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="index"):
        open_graph(tmp_path / name)


CHANGED_SHARDS = [{"file": name} for name in (
    "../x", "..", ".", "", "/etc/passwd", "a/part-00000.npz", "part-00001.npz", "index.json", "part-00000.npz\0", 7, None)]  # fmt: skip
CHANGED_SHARDS += [{name: value} for name in ("first", "rows", "entries")
                   for value in (-1, "12", 12.0, None, True, 10**30, [1])]  # fmt: skip
CHANGED_SHARDS += [{"first": 1}, {"rows": 11}, {"rows": 13}, {"entries": 12 * 60 + 1}, {"more": 1}]
CHANGES = [{key: value} for key, values in {
    "rows": (-1, "60", 60.0, 61, 10**30, None, True), "threshold": (None, "0.4", 2, float("nan"), [0.4], True),
    "k": (3, "3", 0), "include_self": (1, None), "vectors": (3, None), "format_version": (0, 2, "1"),
    "parts": ([], {}), "more": (1,), "directory": ("/etc",)}.items() for value in values]  # fmt: skip
CHANGES += [{"threshold": None, "k": k} for k in (60, 0, 2.0)]
CONTENTS = [b"", b"{", b"[]", b"{}", b"null", b"7", b'"text"', b"\xff\xfe", b"[" * 100_000,
            b'{"format_version": 1}', *(b'{"format_version": 1, "parts": %s}' % parts for parts in (
                b"3", b"[3]", b"null", b'[{}], "rows": ' + b"9" * 5000))]  # fmt: skip


@pytest.mark.parametrize(
    "change", [*CONTENTS, *CHANGES, *CHANGED_SHARDS], ids=lambda c: str(c)[:60]
)
def test_a_damaged_index_is_one_clear_error(graph, change):
    path = graph.directory / "index.json"
    if not isinstance(change, bytes):
        index = json.loads(path.read_text())
        if change in CHANGED_SHARDS:
            change = {"parts": [index["parts"][0] | change, *index["parts"][1:]]}
        change = json.dumps(index | change).encode()
    path.write_bytes(change)
    with pytest.raises(TableError, match=r"index\.json is damaged") as caught:
        open_graph(graph.directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["part-00002.npz", "diagonal.npy"])
@pytest.mark.parametrize("share", [None, 0, 0.5, 0.99])
def test_a_file_that_is_missing_or_truncated_is_named(graph, name, share):
    path = graph.directory / name
    content = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TableError, match=f"{name} is damaged"):
        open_graph(graph.directory).to_matrix()


def test_no_wrong_byte_of_a_shard_does_more_than_raise_an_error(graph):
    path = graph.directory / graph.parts[0].file
    content, rejected = path.read_bytes(), 0
    for position in range(0, len(content), 23):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            next(graph.blocks())
        except TableError:
            rejected += 1
    assert rejected > len(content) / 23 / 2


def with_column(column):
    def change(shard):
        shard.indices[3] = column
        return shard

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard[:11],
        lambda shard: sparse.csr_array(shard[:, :59]),
        lambda shard: shard.astype(np.float64),
        lambda shard: sparse.csr_array(shard > 2),
        lambda shard: sparse.coo_array(shard[:5]),
        lambda shard: shard - shard,
        *map(with_column, (-1, 60, 2**31 - 1)),
    ],
)
def test_another_matrix_in_place_of_a_shard(graph, change):
    path = graph.directory / graph.parts[0].file
    sparse.save_npz(path, change(sparse.load_npz(path)))
    with pytest.raises(TableError, match=r"part-00000\.npz is damaged"):
        graph.to_matrix()


@pytest.mark.parametrize(
    "values",
    [np.ones(59, "f4"), np.ones(60), np.ones((60, 1), "f4"), np.array([print], object)],
)
def test_another_array_in_place_of_the_diagonal(graph, values):
    np.save(graph.directory / "diagonal.npy", values, allow_pickle=True)
    with pytest.raises(TableError, match=r"diagonal\.npy is damaged"):
        _ = graph.nnz
