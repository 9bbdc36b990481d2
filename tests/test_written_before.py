"""What the package wrote before its modules moved into wings (commit dd297de) still loads.

tests/fixtures/written_by_0_1_0.tar.gz holds a seeded toy artifact (mean pooling, Dense, Normalize), its
vectors of 20 texts as .npy and .parquet, the directory of shards that Ray wrote, and two similarity graphs.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from onnxsim_embed import Embedder, neighbours, open_graph, similarity_matrix
from onnxsim_embed.files.vector_directory import open_vectors
from onnxsim_embed.files.vectors import read_provenance, read_vectors

ARCHIVE = Path(__file__).parent / "fixtures" / "written_by_0_1_0.tar.gz"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


def test_artifact_encodes_the_same_vectors(written):
    texts = (written / "texts.txt").read_text().splitlines()
    model = Embedder.from_pretrained(written / "artifact", precision="fp32")
    np.testing.assert_allclose(
        model.encode(texts), read_vectors(written / "vectors.npy"), atol=1e-6
    )
    int8 = Embedder.from_pretrained(written / "artifact", precision="int8").encode(texts)
    assert int8.shape == (20, 16)


def test_vectors_name_the_model_that_made_them(written):
    found = [
        read_provenance(written / name) for name in ("vectors.npy", "vectors.parquet", "directory")
    ]
    assert {p.model_digest for p in found} == {found[0].model_digest}
    assert found[0].model == "tiny"
    assert found[0].dim == 16


def test_every_store_holds_the_same_vectors(written):
    vectors = read_vectors(written / "vectors.npy")
    np.testing.assert_array_equal(read_vectors(written / "vectors.parquet"), vectors)
    stored = open_vectors(written / "directory")
    np.testing.assert_array_equal(stored.read(), vectors)
    assert stored.ids()[:2] == ["000", "001"]


def test_graphs_read_back_as_they_would_be_computed_today(written):
    vectors = read_vectors(written / "vectors.npy")
    graph, expected = open_graph(written / "graph"), similarity_matrix(vectors, 0.2)
    assert (graph.rows, graph.threshold, graph.nnz) == (20, 0.2, expected.nnz)
    assert (graph.to_matrix() != expected).nnz == 0
    best = neighbours(vectors, 3)
    matrix = open_graph(written / "neighbours").to_matrix()
    for row in range(20):
        np.testing.assert_array_equal(matrix[[row]].indices, np.sort(best.indices[row]))
