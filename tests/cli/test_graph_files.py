"""Files of similarities: rows keep the numbers of the input, scores read back bitwise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from support import read_rows

from onnxsim_embed.cli.graph_files import HEATMAP_ROWS, SimilarityJob
from onnxsim_embed.similarity import compare, neighbours, similar_pairs, similarity_matrix
from onnxsim_embed.similarity.memory import ResultTooLargeError

TEXTS = ["a road", "the river, wide", "a road", 'the "old" bank\nby the sea', "", "the sun " * 30]
VECTORS = np.random.default_rng(0).standard_normal((len(TEXTS), 4)).astype(np.float32)
VECTORS[2] = VECTORS[0]
KEPT = np.array([0, 1, 3, 4, 5])


def job_of(kept=None, threshold=0.1, **options):
    rows = np.arange(len(TEXTS)) if kept is None else kept
    texts = [TEXTS[row] for row in rows]
    return SimilarityJob(VECTORS[rows], rows, texts, threshold, kept, len(TEXTS), **options)


each_job = pytest.mark.parametrize(
    ("job", "rows"),
    [(job_of(), np.arange(len(TEXTS))), (job_of(KEPT), KEPT)],
    ids=["all", "distinct"],
)


@each_job
def test_the_matrix_has_rows_of_the_input(job, rows, tmp_path):
    count = job.write_matrix(tmp_path / "m.npz")
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


@pytest.mark.parametrize("earlier", [[], ["matrix"]], ids=["alone", "after the matrix"])
@pytest.mark.parametrize("threshold", [-0.5, 0.3])
def test_pairs_are_those_of_the_function_whatever_was_computed_before(
    tmp_path, monkeypatch, earlier, threshold
):
    rows, job = KEPT, job_of(KEPT, threshold)
    for name in earlier:
        getattr(job, name)
    monkeypatch.setattr(compare, "similarity_matrix", None)  # the scores are computed once
    count = job.write_pairs(tmp_path / "p.csv")
    pairs = similar_pairs(VECTORS[rows], threshold)
    table = read_rows(tmp_path / "p.csv")
    assert count == len(table) == len(pairs.scores)
    assert [int(line["left"]) for line in table] == rows[pairs.left].tolist()
    assert [int(line["right"]) for line in table] == rows[pairs.right].tolist()
    assert [np.float32(line["score"]) for line in table] == pairs.scores.tolist()
    assert all(line["right_text"] == TEXTS[int(line["right"])] for line in table)


def test_without_texts_there_are_no_text_columns(tmp_path):
    plain = SimilarityJob(VECTORS, range(len(VECTORS)), None, 0)
    for job in (plain, job_of(with_texts=False)):
        job.write_pairs(tmp_path / "p.csv")
        job.write_neighbours(tmp_path / "n.csv", 1)
        assert list(read_rows(tmp_path / "p.csv")[0]) == ["left", "right", "score"]
        assert list(read_rows(tmp_path / "n.csv")[0]) == ["row", "rank", "neighbour", "score"]
    assert list(plain.closest(1)) == ["1.0000  row 0  ~  row 2"]


def test_no_pairs_give_a_header_only(tmp_path):
    assert job_of(threshold=1).write_pairs(tmp_path / "p.csv") == 0
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    assert text == "left,right,score,left_text,right_text\n"


def test_closest_pairs_are_lines_of_score_rows_and_shortened_texts():
    job = job_of()
    first, *rest = job.closest(4)
    assert first == "1.0000  0: a road  ~  2: a road"
    assert len(rest) == 3
    lines = "\n".join(job.closest(100))
    assert '3: the "old" bank by the sea' in lines
    assert "\n" not in next(job_of(KEPT).closest(1))
    assert "5: " + ("the sun " * 30)[:59] + "…" in lines
    assert list(job.closest(0)) == []
    before = list(job.closest(5))
    assert len(job.pairs.scores) >= 5
    assert list(job.closest(5)) == before  # from the pairs


def test_a_text_cannot_control_the_terminal():
    job = job_of()
    job.texts = ["\x1b[2Jroad\x07", *TEXTS[1:]]
    assert all(line.isprintable() for line in job.closest(100))


def test_a_heatmap_is_drawn_of_the_kept_rows(tmp_path):
    job_of(KEPT).draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    vectors = np.ones((HEATMAP_ROWS + 1, 2), np.float32)
    with pytest.raises(ValueError, match="at most 2,000 rows, got 2,001"):
        SimilarityJob(vectors, range(len(vectors)), None, 0.5).draw(tmp_path / "large.png")
    assert not (tmp_path / "large.png").exists()


@pytest.mark.parametrize("write", ["write_matrix", "write_neighbours", "write_pairs"])
def test_a_failed_write_leaves_nothing_and_advises_options(tmp_path, write):
    call = [tmp_path / "out.csv"] + [1] * (write == "write_neighbours")
    job = job_of()
    job.vectors = np.array(VECTORS)
    job.vectors[1, 1] = np.nan
    with pytest.raises(ValueError, match="row 1"):
        getattr(job, write)(*call)
    job = SimilarityJob(np.ones((200, 4), np.float32), range(200), None, 0.5, max_memory=100)
    with pytest.raises(ResultTooLargeError, match="write_graph"):
        getattr(job, write)(*call)
    assert list(tmp_path.iterdir()) == []
