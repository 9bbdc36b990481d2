"""Files of similarities: rows keep the numbers of the input, scores read back bit for bit."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import sparse

from onnxsim_embed.cli.graph_files import HEATMAP_ROWS, SimilarityJob
from onnxsim_embed.similarity.compare import neighbours, similar_pairs, similarity_matrix

TEXTS = ["a road", "the river, wide", "a road", 'the "old" bank\nby the sea', "", "the sun " * 30]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 4)).astype(np.float32)
VECTORS[2] = VECTORS[0]
KEPT = np.array([0, 1, 3, 4, 5])


@pytest.fixture
def whole():
    return SimilarityJob(VECTORS, TEXTS, None, len(TEXTS))


@pytest.fixture
def distinct():
    return SimilarityJob(VECTORS[KEPT], TEXTS, KEPT, len(TEXTS))


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_matrix_is_that_of_the_api(whole, tmp_path):
    count = whole.write_matrix(tmp_path / "m.npz", 0.1)
    read, expected = sparse.load_npz(tmp_path / "m.npz"), similarity_matrix(VECTORS, 0.1)
    assert count == read.nnz == expected.nnz
    np.testing.assert_array_equal(read.toarray(), expected.toarray())


def test_rows_left_out_are_empty_and_the_others_keep_their_numbers(distinct, tmp_path):
    distinct.write_matrix(tmp_path / "m.npz", 0.1)
    read = sparse.load_npz(tmp_path / "m.npz")
    expected = np.zeros((len(TEXTS), len(TEXTS)), np.float32)
    expected[np.ix_(KEPT, KEPT)] = similarity_matrix(VECTORS[KEPT], 0.1).toarray()
    assert (read.shape, read.dtype) == (expected.shape, np.float32)
    np.testing.assert_array_equal(read.toarray(), expected)


@pytest.mark.parametrize("job", ["whole", "distinct"])
def test_neighbours_are_those_of_the_api(job, request, tmp_path):
    rows = KEPT if job == "distinct" else np.arange(len(TEXTS))
    request.getfixturevalue(job).write_neighbours(tmp_path / "n.csv", 2)
    best = neighbours(VECTORS[rows], 2)
    table = read_rows(tmp_path / "n.csv")
    assert list(table[0]) == ["row", "rank", "neighbour", "score", "row_text", "neighbour_text"]
    assert [int(line["row"]) for line in table] == np.repeat(rows, 2).tolist()
    assert [int(line["rank"]) for line in table] == [1, 2] * len(rows)
    assert [int(line["neighbour"]) for line in table] == rows[best.indices.ravel()].tolist()
    assert [np.float32(line["score"]) for line in table] == best.scores.ravel().tolist()
    for line in table:
        assert line["row_text"] == TEXTS[int(line["row"])]
        assert line["neighbour_text"] == TEXTS[int(line["neighbour"])]


@pytest.mark.parametrize("job", ["whole", "distinct"])
def test_pairs_are_those_of_the_api(job, request, tmp_path):
    rows = KEPT if job == "distinct" else np.arange(len(TEXTS))
    count = request.getfixturevalue(job).write_pairs(tmp_path / "p.csv", -0.5)
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


def test_no_pairs_give_a_header_alone(whole, tmp_path):
    assert whole.write_pairs(tmp_path / "p.csv", 1) == 0
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    assert text == "left,right,score,left_text,right_text\n"


def test_closest_pairs_are_lines_of_score_rows_and_shortened_texts(whole, distinct):
    first, *rest = whole.closest(4)
    assert first == "1.0000  0: a road  ~  2: a road"
    assert len(rest) == 3
    shown = "\n".join(whole.closest(100))
    assert '3: the "old" bank by the sea' in shown
    assert "\n" not in next(distinct.closest(1))
    assert "5: " + ("the sun " * 30)[:59] + "…" in shown
    assert list(whole.closest(0)) == []


def test_closest_pairs_of_vectors_alone_name_rows():
    job = SimilarityJob(VECTORS, None, None, len(VECTORS))
    assert list(job.closest(1)) == ["1.0000  row 0  ~  row 2"]


def test_a_text_cannot_steer_the_terminal(whole):
    job = SimilarityJob(VECTORS, ["\x1b[2Jroad\x07", *TEXTS[1:]], None, len(TEXTS))
    assert all(line.isprintable() for line in job.closest(100))


def test_a_heatmap_is_drawn_of_the_rows_that_are_kept(distinct, tmp_path):
    distinct.draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_too_many_rows_for_a_heatmap_are_refused_before_they_are_compared(tmp_path):
    vectors = np.ones((HEATMAP_ROWS + 1, 2), np.float32)
    with pytest.raises(ValueError, match="at most 2,000 rows, got 2,001"):
        SimilarityJob(vectors, None, None, len(vectors)).draw(tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()


@pytest.mark.parametrize("write", ["write_matrix", "write_neighbours", "write_pairs"])
def test_a_failed_write_leaves_nothing_behind(tmp_path, write):
    vectors = VECTORS.copy()
    vectors[1, 1] = np.nan
    job = SimilarityJob(vectors, TEXTS, None, len(TEXTS))
    with pytest.raises(ValueError, match="row 1"):
        getattr(job, write)(tmp_path / "out.csv", 1)
    assert list(tmp_path.iterdir()) == []
