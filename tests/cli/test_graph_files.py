"""Files of similarities: rows keep the numbers of the input, scores read back bitwise."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import sparse

from onnxsim_embed.cli.graph_files import HEATMAP_ROWS, SimilarityJob
from onnxsim_embed.similarity import neighbours, similar_pairs, similarity_matrix
from onnxsim_embed.similarity.memory import ResultTooLargeError

TEXTS = ["a road", "the river, wide", "a road", 'the "old" bank\nby the sea', "", "the sun " * 30]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 4)).astype(np.float32)
VECTORS[2] = VECTORS[0]
KEPT = np.array([0, 1, 3, 4, 5])
ALL = SimilarityJob(VECTORS, TEXTS, None, len(TEXTS))
DISTINCT = SimilarityJob(VECTORS[KEPT], TEXTS, KEPT, len(TEXTS))

each_job = pytest.mark.parametrize(
    ("job", "rows"), [(ALL, np.arange(len(TEXTS))), (DISTINCT, KEPT)], ids=["all", "distinct"]
)


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@each_job
def test_the_matrix_has_rows_of_the_input(job, rows, tmp_path):
    count = job.write_matrix(tmp_path / "m.npz", 0.1)
    matrix = sparse.load_npz(tmp_path / "m.npz")
    expected = np.zeros((len(TEXTS), len(TEXTS)), np.float32)
    expected[np.ix_(rows, rows)] = similarity_matrix(VECTORS[rows], 0.1).toarray()
    assert (matrix.shape, matrix.dtype, matrix.nnz) == (expected.shape, np.float32, count)
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    np.testing.assert_array_equal(matrix.toarray(), expected)


@each_job
def test_neighbours_are_those_of_the_function(job, rows, tmp_path):
    job.write_neighbours(tmp_path / "n.csv", 2)
    top = neighbours(VECTORS[rows], 2)
    table = read_rows(tmp_path / "n.csv")
    assert list(table[0]) == ["row", "rank", "neighbour", "score", "row_text", "neighbour_text"]
    assert [int(line["row"]) for line in table] == np.repeat(rows, 2).tolist()
    assert [int(line["rank"]) for line in table] == [1, 2] * len(rows)
    assert [int(line["neighbour"]) for line in table] == rows[top.indices.ravel()].tolist()
    assert [np.float32(line["score"]) for line in table] == top.scores.ravel().tolist()
    for line in table:
        assert line["row_text"] == TEXTS[int(line["row"])]
        assert line["neighbour_text"] == TEXTS[int(line["neighbour"])]


@each_job
def test_pairs_are_those_of_the_function(job, rows, tmp_path):
    count = job.write_pairs(tmp_path / "p.csv", -0.5)
    pairs = similar_pairs(VECTORS[rows], -0.5)
    table = read_rows(tmp_path / "p.csv")
    assert count == len(table) == len(pairs.scores)
    assert [int(line["left"]) for line in table] == rows[pairs.left].tolist()
    assert [int(line["right"]) for line in table] == rows[pairs.right].tolist()
    assert [np.float32(line["score"]) for line in table] == pairs.scores.tolist()
    assert all(line["right_text"] == TEXTS[int(line["right"])] for line in table)


def test_without_texts_there_are_no_text_columns(tmp_path):
    job = SimilarityJob(VECTORS, None, None, len(VECTORS))
    job.write_pairs(tmp_path / "p.csv", 0)
    job.write_neighbours(tmp_path / "n.csv", 1)
    assert list(read_rows(tmp_path / "p.csv")[0]) == ["left", "right", "score"]
    assert list(read_rows(tmp_path / "n.csv")[0]) == ["row", "rank", "neighbour", "score"]
    assert list(job.closest(1)) == ["1.0000  row 0  ~  row 2"]


def test_no_pairs_give_a_header_only(tmp_path):
    assert ALL.write_pairs(tmp_path / "p.csv", 1) == 0
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    assert text == "left,right,score,left_text,right_text\n"


def test_closest_pairs_are_lines_of_score_rows_and_shortened_texts():
    first, *rest = ALL.closest(4)
    assert first == "1.0000  0: a road  ~  2: a road"
    assert len(rest) == 3
    lines = "\n".join(ALL.closest(100))
    assert '3: the "old" bank by the sea' in lines
    assert "\n" not in next(DISTINCT.closest(1))
    assert "5: " + ("the sun " * 30)[:59] + "…" in lines
    assert list(ALL.closest(0)) == []


def test_a_text_cannot_control_the_terminal():
    job = SimilarityJob(VECTORS, ["\x1b[2Jroad\x07", *TEXTS[1:]], None, len(TEXTS))
    assert all(line.isprintable() for line in job.closest(100))


def test_a_heatmap_is_drawn_of_the_kept_rows(tmp_path):
    DISTINCT.draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    vectors = np.ones((HEATMAP_ROWS + 1, 2), np.float32)
    with pytest.raises(ValueError, match="at most 2,000 rows, got 2,001"):
        SimilarityJob(vectors, None, None, len(vectors)).draw(tmp_path / "large.png")
    assert not (tmp_path / "large.png").exists()


@pytest.mark.parametrize("write", ["write_matrix", "write_neighbours", "write_pairs"])
def test_a_failed_write_leaves_nothing_and_advises_options(tmp_path, write):
    vectors = VECTORS.copy()
    vectors[1, 1] = np.nan
    with pytest.raises(ValueError, match="row 1"):
        getattr(SimilarityJob(vectors, TEXTS, None, len(TEXTS)), write)(tmp_path / "out.csv", 1)
    vectors, limit = np.ones((200, 4), np.float32), 1 if write == "write_neighbours" else 0.5
    job = SimilarityJob(vectors, None, None, 200, max_memory=100)
    with pytest.raises(ResultTooLargeError, match="write_graph"):
        getattr(job, write)(tmp_path / "out.csv", limit)
    assert list(tmp_path.iterdir()) == []
