"""Stored graphs read back as what they are, and anything else is refused with a clear error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse
from vector_sets import assert_same, clustered_vectors

from onnxsim_embed import open_graph, write_graph
from onnxsim_embed.errors import TableError
from onnxsim_embed.similarity import graph_writer as graph_job
from onnxsim_embed.similarity.compare import neighbours, similarity_matrix

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = clustered_vectors(rows=60)


@pytest.fixture
def graph(tmp_path, monkeypatch):
    """A graph of five parts."""
    monkeypatch.setattr(graph_job, "SHARD_PAIRS", 12 * len(VECTORS))
    return write_graph(VECTORS, tmp_path / "graph", threshold=0.4)


def change_index(graph, **changes):
    path = graph.directory / "index.json"
    table = json.loads(path.read_text())
    parts = [part | changes.pop("part", {}) for part in table["parts"][:1]] + table["parts"][1:]
    path.write_text(json.dumps(table | {"parts": parts} | changes))


def test_a_graph_is_opened_without_its_parts(graph):
    for part in graph.parts:
        (graph.directory / part.file).unlink()
    opened = open_graph(str(graph.directory))
    assert opened == graph
    assert (opened.rows, opened.threshold, opened.k, opened.include_self) == (60, 0.4, None, True)
    assert opened.nnz == similarity_matrix(VECTORS, 0.4).nnz


def test_blocks_are_the_rows_beyond_the_diagonal(graph):
    upper = sparse.triu(similarity_matrix(VECTORS, 0.4), 1, format="csr")
    rows = [first for first, _ in graph.blocks()]
    assert rows == [0, 12, 24, 36, 48]
    for first, block in graph.blocks():
        assert isinstance(block, sparse.csr_array)
        assert_same(block, sparse.csr_array(upper[first : first + 12]))


def test_scipy_reads_a_part(graph):
    part = graph.parts[1]
    matrix = sparse.load_npz(graph.directory / part.file)
    assert (matrix.shape, matrix.nnz, matrix.dtype) == ((12, 60), part.entries, np.float32)


def test_a_matrix_that_does_not_fit_is_refused(graph):
    with pytest.raises(
        MemoryError, match=r"graph takes .* max_memory allows 1 kB: go .*blocks\(\)"
    ):
        graph.to_matrix(max_memory=1000)
    assert_same(graph.to_matrix(max_memory=24 * graph.nnz), similarity_matrix(VECTORS, 0.4))
    with pytest.raises(ValueError, match="max_memory must be positive, got 0"):
        graph.to_matrix(max_memory=0)


def test_what_is_no_graph_is_said_to_be_none(tmp_path):
    for name in ("nothing", "."):
        with pytest.raises(FileNotFoundError, match=r"is no similarity graph: it holds no index"):
            open_graph(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"null", b"7", b'"text"', b"\xff\xfe", b"[" * 100_000,
     b'{"format_version": 1}', b'{"format_version": 1, "parts": 3}',
     b'{"format_version": 1, "parts": [3]}', b'{"format_version": 1, "parts": null}',
     b'{"format_version": 1, "parts": [{}], "rows": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_damaged_index_is_one_clear_error(graph, content):
    (graph.directory / "index.json").write_bytes(content)
    with pytest.raises(TableError, match=r"index\.json is damaged.*make the graph again") as caught:
        open_graph(graph.directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"part": {"file": name}} for name in (
            "../x", "..", ".", "", "/etc/passwd", "a/part-00000.npz", "part-00001.npz", "part-0.npz",
            "index.json", "part-00000.npz\0", 7, None)),
        *({"part": {name: value}} for name in ("first", "rows", "entries")
          for value in (-1, "12", 12.0, None, True, 10**30, [1])),
        {"part": {"first": 1}}, {"part": {"rows": 11}}, {"part": {"rows": 13}},
        {"part": {"entries": 12 * 60 + 1}}, {"part": {"more": 1}},
        *({"rows": value} for value in (-1, "60", 60.0, 61, 10**30, None, True)),
        *({"threshold": value} for value in (None, "0.4", 2, float("nan"), [0.4], True)),
        *({"k": value} for value in (3, "3", 0)),
        {"threshold": None, "k": 60}, {"threshold": None, "k": 0}, {"threshold": None, "k": 2.0},
        {"include_self": 1}, {"include_self": None}, {"vectors": 3}, {"vectors": None},
        {"format_version": 0}, {"format_version": 2}, {"format_version": "1"},
        {"more": 1}, {"directory": "/etc"}, {"parts": []}, {"parts": {}},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_that_cannot_be_is_refused(graph, changes):
    change_index(graph, **changes)
    with pytest.raises(
        TableError, match=r"index\.json is damaged, or of another version"
    ) as caught:
        open_graph(graph.directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["part-00002.npz", "diagonal.npy"])
@pytest.mark.parametrize("share", [None, 0, 0.1, 0.5, 0.99])
def test_a_file_that_is_missing_or_cut_short_is_named(graph, name, share):
    path = graph.directory / name
    data = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(TableError, match=rf"{name} is damaged: .*; make the graph again"):
        open_graph(graph.directory).to_matrix()


def test_no_wrong_byte_of_a_part_does_more_than_raise_an_error(graph):
    path = graph.directory / graph.parts[0].file
    data, refused = path.read_bytes(), 0
    for place in range(0, len(data), 23):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        try:
            next(graph.blocks())
        except TableError:
            refused += 1
    assert refused > len(data) / 23 / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part[:11],
        lambda part: sparse.csr_array(part[:, :59]),
        lambda part: part.astype(np.float64),
        lambda part: part.astype(np.int32),
        lambda part: sparse.csr_array(part > 2),
        lambda part: sparse.coo_array(part[:5]),
        lambda part: part - part,
    ],
)
def test_a_part_of_another_kind_is_refused(graph, change):
    path = graph.directory / graph.parts[0].file
    sparse.save_npz(path, change(sparse.load_npz(path)))
    with pytest.raises(
        TableError, match=r"part-00000\.npz is not the part that index\.json describes"
    ):
        graph.to_matrix()


@pytest.mark.parametrize("column", [-1, 60, 2**31 - 1])
def test_a_column_out_of_bounds_is_refused(graph, column):
    path = graph.directory / graph.parts[0].file
    matrix = sparse.load_npz(path)
    matrix.indices[3] = column
    sparse.save_npz(path, matrix)
    with pytest.raises(TableError, match=r"part-00000\.npz is damaged"):
        graph.to_matrix()


def test_objects_are_not_unpickled(graph):
    np.save(graph.directory / "diagonal.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(TableError, match=r"diagonal\.npy is damaged"):
        graph.to_matrix()


@pytest.mark.parametrize("values", [np.ones(59, np.float32), np.ones(60), np.ones((60, 1), "f4")])
def test_a_diagonal_of_another_kind_is_refused(graph, values):
    np.save(graph.directory / "diagonal.npy", values)
    with pytest.raises(TableError, match=r"diagonal\.npy is not of the graph"):
        _ = graph.nnz


def test_a_graph_of_the_k_best_has_no_diagonal(tmp_path):
    graph = write_graph(VECTORS, tmp_path / "graph", k=3)
    assert sorted(path.name for path in graph.directory.iterdir()) == [
        "index.json",
        "part-00000.npz",
    ]
    assert graph.nnz == graph.to_matrix().nnz == 180
    assert (graph.threshold, graph.k, graph.include_self) == (None, 3, False)
    best = neighbours(VECTORS, 3)
    dense = graph.to_matrix().toarray()
    np.testing.assert_array_equal(np.take_along_axis(dense, best.indices, axis=1), best.scores)
