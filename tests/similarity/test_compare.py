"""Blocked similarities equal the dense float64 computation, for every block size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import sparse

from onnxsim_embed.similarity.compare import (
    closest_pairs,
    cos_sim,
    neighbours,
    score_all,
    score_pairs,
    similar_pairs,
    similarity_matrix,
    top_k,
    unit_vectors,
)

ROWS, DIM = 83, 24
NEAR = 1e-6  # float32 may land on either side of a threshold that is this close

quietly = settings(deadline=None, database=None, max_examples=60)


def random_vectors(seed=0, rows=ROWS):
    return np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)


def clustered_vectors(seed=1, rows=ROWS):
    """Six centres with close companions, exact duplicates, and zero rows; of any norm."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((6, DIM))[rng.integers(0, 6, rows)]
    vectors += rng.standard_normal((rows, DIM)) * 0.2
    vectors *= rng.uniform(0.1, 10, (rows, 1))
    vectors[7] = vectors[3] = vectors[50 % rows]
    vectors[[5, rows - 1]] = 0
    return vectors.astype(np.float32)


def crossing_vectors(rows=40):
    """Ones and zeros in four components: scores are exact in float32, and ties abound."""
    masks = np.random.default_rng(2).choice([0, 1, 2, 4, 8, 15], rows)
    return ((masks[:, None] >> np.arange(4)) & 1).astype(np.float32)


SETS = {
    "random": random_vectors(),
    "clustered": clustered_vectors(),
    "crossing": crossing_vectors(),
}

each_set = pytest.mark.parametrize("vectors", SETS.values(), ids=SETS)
each_block = pytest.mark.parametrize("rows", [1, 5, 17, ROWS])
each_threshold = pytest.mark.parametrize("threshold", [-1, -0.3, 0, 0.2, 0.5, 0.8, 1])


def block_of(rows, columns):
    return 4 * columns * rows


def dense(a, b=None):
    """All cosines in float64; a zero row scores 0."""
    left, right = (np.asarray(x, np.float64) for x in (a, a if b is None else b))
    left, right = (
        x / np.where((norm := np.linalg.norm(x, axis=1, keepdims=True)) > 0, norm, 1)
        for x in (left, right)
    )
    return left @ right.T


def stored(matrix):
    """Which entries a sparse matrix holds, zeros among them."""
    held = np.zeros(matrix.shape, bool)
    entries = matrix.tocoo()
    held[entries.row, entries.col] = True
    return held


def assert_above(matrix, scores, threshold, exact=False):
    """Assert that a sparse matrix holds the scores above a threshold and no others."""
    assert isinstance(matrix, sparse.csr_array)
    assert matrix.dtype == np.float32
    assert matrix.shape == scores.shape
    for start, end in zip(matrix.indptr, matrix.indptr[1:], strict=False):
        assert (np.diff(matrix.indices[start:end]) > 0).all()  # sorted, no duplicates
    held, slack = stored(matrix), 0 if exact else NEAR
    assert not (held & (scores <= threshold - slack)).any()
    assert not (~held & (scores > threshold + slack)).any()
    np.testing.assert_allclose(matrix.toarray()[held], scores[held], atol=NEAR)


# the matrix


@each_set
@each_block
@each_threshold
def test_the_matrix_holds_exactly_the_scores_above_the_threshold(vectors, rows, threshold):
    matrix = similarity_matrix(vectors, threshold, block_bytes=block_of(rows, len(vectors)))
    assert_above(matrix, dense(vectors), threshold)
    mirrored = matrix.T.tocsr()
    np.testing.assert_array_equal(matrix.indices, mirrored.indices)
    np.testing.assert_array_equal(matrix.data, mirrored.data)  # symmetric to the bit


@each_block
@each_threshold
def test_a_second_set_gives_a_rectangle(rows, threshold):
    left, right = clustered_vectors(), clustered_vectors(rows=31)
    matrix = similarity_matrix(left, threshold, other=right, block_bytes=block_of(rows, 31))
    assert_above(matrix, dense(left, right), threshold)


@pytest.mark.parametrize("threshold", [-1, -0.5, 0, 0.5, 1])
def test_above_means_strictly_above(threshold):
    vectors = crossing_vectors()
    exact = np.round(dense(vectors), 12)  # 0, 0.5 and 1
    assert_above(similarity_matrix(vectors, threshold), exact, threshold, exact=True)
    matrix = similarity_matrix(vectors, threshold, other=vectors)
    assert_above(matrix, exact, threshold, exact=True)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_above_one(seed):
    vectors = np.repeat(random_vectors(seed), 3, axis=0)
    assert similarity_matrix(vectors, 1).nnz == 0
    assert similarity_matrix(vectors, 1, other=vectors).nnz == 0
    assert len(similar_pairs(vectors, 1).scores) == 0


def test_no_dense_score_is_above_one():
    vectors = np.repeat(random_vectors(), 3, axis=0)
    assert np.abs(cos_sim(vectors, -vectors)).max() <= 1


def test_the_diagonal_is_one_but_for_zero_rows_and_left_out_on_request():
    vectors = clustered_vectors()
    matrix = similarity_matrix(vectors, -1)
    np.testing.assert_array_equal(matrix.diagonal(), vectors.any(axis=1))
    without = similarity_matrix(vectors, -1, include_self=False)
    held = stored(matrix)
    np.fill_diagonal(held, False)
    np.testing.assert_array_equal(stored(without), held)


def test_zero_vectors_score_zero():
    vectors = np.array([[0, 0], [1, 0], [0, 0]], np.float32)
    np.testing.assert_array_equal(cos_sim(vectors, vectors), np.diag([0, 1, 0]))
    assert similarity_matrix(vectors, 0).nnz == 1
    np.testing.assert_array_equal(top_k(vectors, vectors, 3).scores[0], 0)


def test_the_matrix_survives_saving(tmp_path):
    matrix = similarity_matrix(clustered_vectors(), 0.5)
    sparse.save_npz(tmp_path / "matrix.npz", matrix)
    read = sparse.load_npz(tmp_path / "matrix.npz")
    assert isinstance(read, sparse.csr_array)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(read, name), getattr(matrix, name))


def test_memory_stays_far_below_the_dense_matrix():
    vectors = random_vectors(rows=3000)
    tracemalloc.start()
    try:
        similarity_matrix(vectors, 0.9, block_bytes=1 << 18)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 3000 * 3000 / 4


# pairs


@each_set
@each_block
@pytest.mark.parametrize("threshold", [-1, 0, 0.5, 0.9])
def test_similar_pairs_are_those_of_the_matrix_each_once_best_first(vectors, rows, threshold):
    pairs = similar_pairs(vectors, threshold, block_bytes=block_of(rows, len(vectors)))
    assert (pairs.left < pairs.right).all()
    assert pairs.left.dtype == pairs.right.dtype == np.int64
    assert pairs.scores.dtype == np.float32
    expected = np.triu(stored(similarity_matrix(vectors, threshold)), 1)
    assert set(zip(pairs.left, pairs.right, strict=True)) == set(
        zip(*np.nonzero(expected), strict=True)
    )
    assert len(pairs.left) == expected.sum()
    keys = list(zip(-pairs.scores, pairs.left, pairs.right, strict=True))
    assert keys == sorted(keys)
    np.testing.assert_allclose(pairs.scores, dense(vectors)[pairs.left, pairs.right], atol=NEAR)


def test_pairs_of_two_sets_are_those_of_the_rectangle():
    left, right = clustered_vectors(), clustered_vectors(rows=31)
    pairs = similar_pairs(left, 0.5, other=right)
    expected = np.nonzero(stored(similarity_matrix(left, 0.5, other=right)))
    assert sorted(zip(pairs.left, pairs.right, strict=True)) == list(zip(*expected, strict=True))


@pytest.mark.parametrize("count", [0, 1, 5, 60, 100_000])
@each_set
def test_closest_pairs_are_the_head_of_all_pairs(vectors, count):
    scores = dense(vectors)
    left, right = np.triu_indices(len(vectors), 1)
    order = np.lexsort((right, left, -np.round(scores[left, right], 12)))[:count]
    pairs = closest_pairs(vectors, count)
    np.testing.assert_allclose(pairs.scores, scores[left, right][order], atol=NEAR)
    if vectors is SETS["crossing"]:  # exact scores, so that ties have one right order
        np.testing.assert_array_equal(pairs.left, left[order])
        np.testing.assert_array_equal(pairs.right, right[order])
    assert len(set(zip(pairs.left, pairs.right, strict=True))) == len(order)


# the k best


def select_top_k(scores, k):
    """Columns of the k best by score, then index."""
    return np.argsort(-np.round(scores, 12), axis=1, kind="stable")[:, :k]


@each_set
@each_block
@pytest.mark.parametrize("k", [1, 3, 10, "all"])
def test_top_k_equals_sorting_the_dense_scores(vectors, rows, k):
    queries = vectors[::3]
    k = len(vectors) if k == "all" else k
    best = top_k(queries, vectors, k, block_bytes=block_of(rows, len(vectors)))
    scores = dense(queries, vectors)
    expected = select_top_k(scores, k)
    assert best.scores.dtype == np.float32
    assert best.indices.dtype == np.int64
    assert best.indices.shape == (len(queries), k)
    assert (np.diff(best.scores, axis=1) <= 0).all()
    np.testing.assert_allclose(best.scores, np.take_along_axis(scores, expected, axis=1), atol=NEAR)
    np.testing.assert_allclose(
        best.scores, np.take_along_axis(scores, best.indices, axis=1), atol=NEAR
    )
    assert all(len(set(row)) == k for row in best.indices.tolist())
    if vectors is SETS["crossing"]:
        np.testing.assert_array_equal(best.indices, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17, 130])
def test_equal_vectors_are_ranked_by_index(rows):
    vectors = np.random.default_rng(0).standard_normal((13, 100)).astype(np.float32)
    vectors = np.tile(vectors, (10, 1))
    best = top_k(vectors[:13], vectors, 10, block_bytes=block_of(rows, len(vectors)))
    np.testing.assert_array_equal(best.indices, np.arange(13)[:, None] + 13 * np.arange(10))


@each_block
def test_neighbours_are_the_best_of_the_others(rows):
    vectors = crossing_vectors()
    scores = dense(vectors)
    np.fill_diagonal(scores, -np.inf)
    best = neighbours(vectors, 7, block_bytes=block_of(rows, len(vectors)))
    np.testing.assert_array_equal(best.indices, select_top_k(scores, 7))
    np.testing.assert_allclose(
        best.scores, np.take_along_axis(scores, best.indices, axis=1), atol=NEAR
    )


def test_one_query_may_be_a_vector():
    vectors = clustered_vectors()
    one, row = top_k(vectors[4], vectors, 5), top_k(vectors[4:5], vectors, 5)
    np.testing.assert_array_equal(one.indices, row.indices)
    assert one.indices.shape == (1, 5)


@pytest.mark.parametrize("k", [0, -1, ROWS + 1])
def test_k_out_of_bounds_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be from 1 to {ROWS} .*got {k}"):
        top_k(random_vectors(), random_vectors(), k)


def test_a_row_is_no_neighbour_of_its_own():
    with pytest.raises(ValueError, match=rf"k must be from 1 to {ROWS - 1} .*got {ROWS}"):
        neighbours(random_vectors(), ROWS)


# values and shapes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8])
def test_any_real_dtype_is_taken(dtype):
    vectors = np.random.default_rng(0).integers(0, 9, (20, 6)).astype(dtype)
    for block in (1, 1 << 20):
        matrix = similarity_matrix(vectors, 0.6, block_bytes=block)
        assert_above(matrix, dense(vectors), 0.6)
    assert cos_sim(vectors, vectors).dtype == top_k(vectors, vectors, 2).scores.dtype == np.float32
    np.testing.assert_allclose(cos_sim(vectors.tolist(), vectors), dense(vectors), atol=NEAR)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e37, 1e-44])
def test_norms_of_any_size_give_the_same_scores(scale):
    vectors = crossing_vectors()
    scaled = vectors.copy()
    scaled[::2] *= np.float32(scale)
    np.testing.assert_allclose(cos_sim(scaled, scaled), dense(vectors), atol=NEAR)
    assert_above(similarity_matrix(scaled, 0.4), dense(vectors), 0.4)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_float64_beyond_float32_gives_the_same_scores(scale):
    vectors = random_vectors().astype(np.float64)
    np.testing.assert_allclose(cos_sim(vectors * scale, vectors), dense(vectors), atol=NEAR)


def test_unit_vectors_leave_their_input_alone():
    vectors = random_vectors()
    unit = unit_vectors(vectors)
    np.testing.assert_array_equal(vectors, random_vectors())
    np.testing.assert_allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1, atol=NEAR)


def uses(vectors):
    """Every function that takes vectors, on these."""
    good = random_vectors()[:, : vectors.shape[1] if vectors.ndim == 2 else DIM]
    return [
        lambda: similarity_matrix(vectors),
        lambda: similarity_matrix(good, other=vectors),
        lambda: similar_pairs(vectors),
        lambda: similar_pairs(good, other=vectors),
        lambda: top_k(good, vectors, 1),
        lambda: neighbours(vectors, 1),
        lambda: closest_pairs(vectors, 1),
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("number", range(7))
def test_a_row_that_is_not_finite_is_named(value, number):
    vectors = random_vectors()
    vectors[[11, 40], 3] = value
    with pytest.raises(ValueError, match="NaN or infinity, first in row 11"):
        uses(vectors)[number]()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones(3), r"shape \(n, dim\), got \(3,\)"),
        (np.ones((2, 3, 4)), r"shape \(n, dim\), got \(2, 3, 4\)"),
        (np.array([["a", "b"]]), "must be numbers, got dtype <U1"),
        (np.ones((2, 3), complex), "must be numbers, got dtype complex128"),
        (np.ones((2, 3), bool), "must be numbers, got dtype bool"),
        (np.array([[None, 1]]), "must be numbers, got dtype object"),
    ],
)
@pytest.mark.parametrize("number", range(7))
def test_what_is_no_set_of_vectors_is_refused(vectors, message, number):
    with pytest.raises(ValueError, match=message):
        uses(vectors)[number]()


def test_vectors_of_different_widths_are_refused():
    left, right = np.ones((3, 4), np.float32), np.ones((3, 5), np.float32)
    for use in (
        lambda: cos_sim(left, right),
        lambda: similarity_matrix(left, other=right),
        lambda: similar_pairs(left, other=right),
        lambda: top_k(left, right, 1),
    ):
        with pytest.raises(ValueError, match="different dimensions: 4 and 5"):
            use()


@pytest.mark.parametrize("threshold", [-1.01, 1.5, np.nan, np.inf])
def test_a_threshold_that_no_cosine_can_pass_is_refused(threshold):
    for function in (similarity_matrix, similar_pairs):
        with pytest.raises(ValueError, match=f"threshold must be from -1 to 1, got {threshold}"):
            function(random_vectors(), threshold)


@pytest.mark.parametrize("block_bytes", [0, -1])
def test_a_block_of_no_bytes_is_refused(block_bytes):
    for use in (
        lambda: similarity_matrix(random_vectors(), block_bytes=block_bytes),
        lambda: similar_pairs(random_vectors(), block_bytes=block_bytes),
        lambda: top_k(random_vectors(), random_vectors(), 1, block_bytes=block_bytes),
    ):
        with pytest.raises(ValueError, match=f"block_bytes must be positive, got {block_bytes}"):
            use()


def test_empty_sets_give_empty_results():
    none, some = np.zeros((0, DIM), np.float32), random_vectors(rows=4)
    assert similarity_matrix(none).shape == (0, 0)
    assert similarity_matrix(none, other=some).shape == (0, 4)
    assert similarity_matrix(some, other=none).shape == (4, 0)
    assert similarity_matrix(some, other=none).nnz == 0
    assert cos_sim(none, some).shape == (0, 4)
    assert top_k(none, some, 2).indices.shape == (0, 2)
    for pairs in (similar_pairs(none), similar_pairs(some, other=none), closest_pairs(none)):
        assert [(part.shape, part.dtype) for part in pairs] == [
            ((0,), np.int64), ((0,), np.int64), ((0,), np.float32)
        ]  # fmt: skip
    one = random_vectors(rows=1)
    for empty in (
        lambda: top_k(some, none, 1),
        lambda: neighbours(none, 1),
        lambda: neighbours(one, 1),
    ):  # "from 1 to 0" would be no help
        with pytest.raises(ValueError, match=r"\bno\b"):
            empty()


def test_one_row_has_no_pairs():
    one = random_vectors(rows=1)
    assert similarity_matrix(one).toarray().tolist() == [[1.0]]
    assert len(similar_pairs(one, -1).scores) == len(closest_pairs(one).scores) == 0


@quietly
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 8), st.integers(1, 5)),
        elements=st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0]),
    ),
    st.floats(-1, 1),
    st.integers(1, 9),
)
def test_small_sets_of_any_values(vectors, threshold, rows):
    scores, block = dense(vectors), block_of(rows, len(vectors))
    matrix = similarity_matrix(vectors, threshold, block_bytes=block)
    assert_above(matrix, scores, np.float32(threshold))
    assert (matrix != matrix.T).nnz == 0
    k = min(3, len(vectors))
    best = top_k(vectors, vectors, k, block_bytes=block)
    np.testing.assert_allclose(best.scores, -np.sort(-scores, axis=1)[:, :k], atol=NEAR)


# other measures


MEASURES = {
    "cosine": lambda a, b: dense(a, b),
    "dot": lambda a, b: a @ b.T,
    "euclidean": lambda a, b: -np.linalg.norm(a[:, None] - b, axis=2),
    "manhattan": lambda a, b: -np.abs(a[:, None] - b).sum(axis=2),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_equals_its_definition(measure):
    left, right = clustered_vectors(), clustered_vectors(seed=5)
    expected = MEASURES[measure](left.astype(np.float64), right.astype(np.float64))
    every, paired = score_all(left, right, measure), score_pairs(left, right, measure)
    assert every.dtype == paired.dtype == np.float32
    np.testing.assert_allclose(every, expected, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(paired, expected.diagonal(), rtol=2e-6, atol=2e-5)


def test_an_unknown_measure_lists_those_there_are():
    for function in (score_all, score_pairs):
        with pytest.raises(ValueError, match="'jaccard' is not one of cosine, dot, euclidean, man"):
            function(random_vectors(), random_vectors(), "jaccard")


def test_pairwise_scores_need_equal_shapes():
    with pytest.raises(ValueError, match=r"two equal shapes, got \(4, 24\) and \(5, 24\)"):
        score_pairs(random_vectors(rows=4), random_vectors(rows=5), "dot")
