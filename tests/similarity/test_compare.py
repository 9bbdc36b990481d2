"""Similarities equal the dense float64 computation, for every tile size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import sparse
from vector_sets import (
    DIM,
    NEAR,
    ROWS,
    SETS,
    clustered_vectors,
    crossing_vectors,
    dense,
    random_vectors,
    stored,
)

import onnxsim_embed.similarity
from onnxsim_embed import (
    VectorIndex,
    communities,
    components,
    deduplicate,
    estimate_similarity,
    util,
    write_graph,
)
from onnxsim_embed.similarity import (
    closest_pairs,
    cos_sim,
    neighbours,
    score_all,
    score_pairs,
    similar_pairs,
    similarity_matrix,
    top_k,
)

each_set = pytest.mark.parametrize("vectors", SETS.values(), ids=SETS)
each_tile = pytest.mark.parametrize("rows", [1, 5, 17, ROWS])


def tile_of(rows, columns):
    return {"block_bytes": 4 * columns * rows}


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


def assert_top_k(top, scores, k, exact=False):
    """Assert the top-k of each row of dense scores."""
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert (top.scores.dtype, top.indices.dtype) == (np.float32, np.int64)
    assert top.scores.shape == top.indices.shape == expected.shape
    assert (np.diff(top.scores, axis=1) <= 0).all()
    for indices in (expected, top.indices):
        values = np.take_along_axis(scores, indices, axis=1)
        np.testing.assert_allclose(top.scores, values, atol=NEAR)
    assert all(len(set(row)) == k for row in top.indices.tolist())
    if exact:
        np.testing.assert_array_equal(top.indices, expected)


# the matrix


@each_set
@each_tile
@pytest.mark.parametrize("threshold", [-1, -0.3, 0, 0.2, 0.8, 1])
def test_the_matrix_holds_exactly_the_scores_above_the_threshold(vectors, rows, threshold):
    matrix = similarity_matrix(vectors, threshold, **tile_of(rows, len(vectors)))
    assert_above(matrix, dense(vectors), threshold, exact=vectors is SETS["crossing"])
    mirrored = matrix.T.tocsr()
    np.testing.assert_array_equal(matrix.indices, mirrored.indices)
    np.testing.assert_array_equal(matrix.data, mirrored.data)  # bitwise symmetric


@each_tile
@pytest.mark.parametrize("threshold", [-1, 0, 0.5, 1])
def test_a_second_set_gives_a_rectangle(rows, threshold):
    left, right = clustered_vectors(), clustered_vectors(31)
    matrix = similarity_matrix(left, threshold, other=right, **tile_of(rows, 31))
    assert_above(matrix, dense(left, right), threshold)
    vectors = crossing_vectors()
    matrix = similarity_matrix(vectors, threshold, other=vectors, **tile_of(rows, 60))
    assert_above(matrix, dense(vectors), threshold, exact=True)


@pytest.mark.parametrize("seed", range(3))
def test_equal_rows_score_exactly_one_and_nothing_is_above(seed):
    vectors = np.repeat(random_vectors(dim=384, seed=seed), 3, axis=0)
    vectors[9:12] = 0
    rows = np.flatnonzero(vectors.any(axis=1))
    twins = np.array([row // 3 == rows // 3 for row in rows]).nonzero()
    pairs = similar_pairs(vectors, 0.99)
    assert len(pairs.scores) == 3 * 82
    for scores in (
        pairs.scores,
        cos_sim(vectors, vectors)[rows][:, rows][twins],
        score_pairs(vectors[rows], vectors[rows], "cosine"),
        top_k(vectors[rows], vectors, 3).scores,
        neighbours(vectors[rows], 2).scores,
        onnxsim_embed.VectorIndex(vectors).search(vectors[rows], 3).scores,
        similarity_matrix(vectors, 0.99, other=vectors).data,
    ):
        assert (scores == 1).all()
    assert not cos_sim(vectors, vectors)[9:12].any()
    assert similarity_matrix(vectors, 1).nnz == len(similar_pairs(vectors, 1).scores) == 0
    assert np.abs(cos_sim(vectors, -vectors)).max() <= 1
    assert np.abs(score_pairs(vectors, -vectors, "cosine")).max() <= 1


def test_the_diagonal_is_one_except_for_zero_rows_and_omitted_on_request():
    vectors = clustered_vectors()
    matrix = similarity_matrix(vectors, -1)
    np.testing.assert_array_equal(matrix.diagonal(), vectors.any(axis=1))
    held = stored(matrix)
    np.fill_diagonal(held, False)
    without = similarity_matrix(vectors, -1, include_self=False)
    np.testing.assert_array_equal(stored(without), held)


def test_memory_stays_far_below_the_dense_matrix():
    vectors = random_vectors(3000)
    tracemalloc.start()
    try:
        similarity_matrix(vectors, 0.9, block_bytes=1 << 18)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3000 * 3000


# pairs


@each_set
@each_tile
@pytest.mark.parametrize("threshold", [-1, 0, 0.5, 0.9])
def test_similar_pairs_are_those_of_the_matrix_each_once_best_first(vectors, rows, threshold):
    pairs = similar_pairs(vectors, threshold, **tile_of(rows, len(vectors)))
    assert pairs.left.dtype == pairs.right.dtype == np.int64
    assert pairs.scores.dtype == np.float32
    expected = np.triu(stored(similarity_matrix(vectors, threshold)), 1)
    assert sorted(zip(pairs.left, pairs.right, strict=True)) == list(
        zip(*np.nonzero(expected), strict=True)
    )
    keys = list(zip(-pairs.scores, pairs.left, pairs.right, strict=True))
    assert keys == sorted(keys)
    np.testing.assert_allclose(pairs.scores, dense(vectors)[pairs.left, pairs.right], atol=NEAR)


def test_pairs_of_two_sets_are_those_of_the_rectangle():
    left, right = clustered_vectors(), clustered_vectors(31)
    pairs = similar_pairs(left, 0.5, other=right)
    expected = np.nonzero(stored(similarity_matrix(left, 0.5, other=right)))
    assert sorted(zip(pairs.left, pairs.right, strict=True)) == list(zip(*expected, strict=True))


@pytest.mark.parametrize("count", [0, 1, 5, 60, 100_000])
@each_set
def test_closest_pairs_are_the_first_of_all_pairs(vectors, count):
    scores = dense(vectors)
    left, right = np.triu_indices(len(vectors), 1)
    order = np.lexsort((right, left, -scores[left, right]))[:count]
    pairs = closest_pairs(vectors, count)
    np.testing.assert_allclose(pairs.scores, scores[left, right][order], atol=NEAR)
    if vectors is SETS["crossing"]:  # exact scores, so that ties have one right order
        np.testing.assert_array_equal(pairs.left, left[order])
        np.testing.assert_array_equal(pairs.right, right[order])
    assert len(set(zip(pairs.left, pairs.right, strict=True))) == len(order)


# top-k


@each_set
@each_tile
@pytest.mark.parametrize("k", [1, 10, "all"])
def test_top_k_equals_sorting_the_dense_scores(vectors, rows, k):
    queries, k = vectors[::3], len(vectors) if k == "all" else k
    top = top_k(queries, vectors, k, **tile_of(rows, len(vectors)))
    assert_top_k(top, dense(queries, vectors), k, exact=vectors is SETS["crossing"])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17, 130])
def test_equal_vectors_are_ranked_by_index(rows):
    vectors = np.tile(random_vectors(13, 100), (10, 1))
    top = top_k(vectors[:13], vectors, 10, **tile_of(rows, len(vectors)))
    np.testing.assert_array_equal(top.indices, np.arange(13)[:, None] + 13 * np.arange(10))


@each_tile
def test_neighbours_are_the_top_k_of_the_other_rows(rows):
    vectors = crossing_vectors()
    scores = dense(vectors)
    np.fill_diagonal(scores, -np.inf)
    assert_top_k(neighbours(vectors, 7, **tile_of(rows, 60)), scores, 7, exact=True)


def test_one_query_may_be_a_vector():
    vectors = clustered_vectors()
    one, row = top_k(vectors[4], vectors, 5), top_k(vectors[4:5], vectors, 5)
    np.testing.assert_array_equal(one.indices, row.indices)
    assert one.indices.shape == (1, 5)


@pytest.mark.parametrize("k", [0, -1, ROWS + 1])
def test_k_out_of_bounds_is_rejected(k):
    with pytest.raises(ValueError, match=rf"from 1 to {ROWS} .*got {k}"):
        top_k(random_vectors(), random_vectors(), k)
    with pytest.raises(ValueError, match=rf"from 1 to {ROWS - 1} "):
        neighbours(random_vectors(), max(k, 0))


# values and shapes


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(
    "compare",
    [
        lambda x: similarity_matrix(x), lambda x: similar_pairs(x), lambda x: top_k(x, x, 1), lambda x: cos_sim(x, x),
        lambda x: neighbours(x, 1), deduplicate, communities, components, VectorIndex,
    ],
    ids=range(9),
)  # fmt: skip
def test_bytes_may_be_quantized_vectors(compare, dtype):
    vectors = np.arange(12, dtype=dtype).reshape(3, 4)
    with pytest.warns(UserWarning, match=f"^{np.dtype(dtype)} vectors are compared as numbers"):
        compare(vectors)
    compare(vectors.astype(np.int64))  # and any other dtype without a warning


INTEGERS = {
    "top_k": lambda n: top_k(np.eye(4), np.eye(4), n),
    "neighbours": lambda n: neighbours(np.eye(4), n),
    "closest_pairs": lambda n: closest_pairs(np.eye(4), n),
    "block_bytes": lambda n: similarity_matrix(np.eye(4), block_bytes=n),
    "index": lambda n: VectorIndex(np.eye(4)).search(np.eye(4), n),
    "communities": lambda n: communities(np.eye(4), min_size=n),
    "estimate": lambda n: estimate_similarity(np.eye(4), k=n),
    "write_graph": lambda n: write_graph(np.eye(4), "graph", k=n, force=True),
    "mining": lambda n: util.paraphrase_mining_embeddings(np.eye(4), top_k=n),
    "max_pairs": lambda n: util.paraphrase_mining_embeddings(np.eye(4), max_pairs=n),
    "search": lambda n: util.semantic_search(np.eye(4), np.eye(4), top_k=n),
}


@pytest.mark.parametrize("call", INTEGERS.values(), ids=INTEGERS)
def test_integers_of_numpy_are_integers_and_others_are_not(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(np.uint8(2))
    for value in (True, np.True_, 2.0, "2", -1):
        with pytest.raises(ValueError, match="must be an integer"):
            call(value)


@pytest.mark.filterwarnings("ignore:.*compared as numbers")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8])
def test_any_real_dtype_is_accepted(dtype):
    vectors = np.random.default_rng(0).integers(0, 9, (20, 6)).astype(dtype)
    for size in (1, 1 << 20):
        assert_above(similarity_matrix(vectors, 0.6, block_bytes=size), dense(vectors), 0.6)
    assert cos_sim(vectors, vectors).dtype == top_k(vectors, vectors, 2).scores.dtype == np.float32
    np.testing.assert_allclose(cos_sim(vectors.tolist(), vectors), dense(vectors), atol=NEAR)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(s, np.float32) for s in (1e30, 1e-30, 1e37, 1e-44)] + [(1e200, float), (1e-200, float)],
)
def test_norms_of_any_size_give_the_same_scores(scale, dtype):
    vectors = crossing_vectors()
    scaled = vectors.astype(dtype)
    scaled[::2] *= dtype(scale)
    np.testing.assert_allclose(cos_sim(scaled, scaled), dense(vectors), atol=NEAR)
    scores = score_pairs(scaled, vectors[::-1], "cosine")
    np.testing.assert_allclose(scores, dense(vectors, vectors[::-1]).diagonal(), atol=NEAR)
    assert_above(similarity_matrix(scaled, 0.4), dense(vectors), 0.4)


def calls(vectors):
    """Every function that takes vectors, on these."""
    good = random_vectors(dim=vectors.shape[1] if vectors.ndim == 2 else DIM)
    return [
        lambda: similarity_matrix(vectors),
        lambda: similarity_matrix(good, other=vectors),
        lambda: similar_pairs(vectors),
        lambda: similar_pairs(good, other=vectors),
        lambda: top_k(good, vectors, 1),
        lambda: neighbours(vectors, 1),
        lambda: closest_pairs(vectors, 1),
        lambda: onnxsim_embed.estimate_similarity(vectors),
    ]


def not_finite(value):
    vectors = random_vectors()
    vectors[[11, 40], 3] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "word"),
    [
        *((not_finite(value), "row 11") for value in (np.nan, np.inf, -np.inf)),
        (np.ones((2, 3, 4)), r"\(2, 3, 4\)"),
        (np.array([["a", "b"]]), "<U1"),
        (np.ones((2, 3), complex), "complex128"),
        (np.ones((2, 3), bool), "bool"),
        (np.array([[None, 1]]), "object"),
    ],
)
def test_anything_but_a_matrix_of_finite_numbers_is_rejected(vectors, word):
    for call in calls(vectors):
        with pytest.raises(ValueError, match=word):
            call()


def test_different_dimensions_are_rejected():
    left, right = np.ones((3, 4), np.float32), np.ones((3, 5), np.float32)
    for call in (
        lambda: cos_sim(left, right),
        lambda: similarity_matrix(left, other=right),
        lambda: similar_pairs(left, other=right),
        lambda: top_k(left, right, 1),
        lambda: score_all(left, right, "dot"),
        lambda: score_pairs(left, right, "dot"),
        lambda: onnxsim_embed.estimate_similarity(left, other=right),
    ):
        with pytest.raises(ValueError, match=r"4.* and .*5"):
            call()


@pytest.mark.parametrize("threshold", [-1.01, 1.5, np.nan, np.inf])
def test_a_threshold_outside_the_range_of_a_cosine_is_rejected(threshold):
    for function in (similarity_matrix, similar_pairs, onnxsim_embed.estimate_similarity):
        with pytest.raises(ValueError, match=f"from -1 to 1, got {threshold}"):
            function(random_vectors(), threshold)


@pytest.mark.parametrize("block_bytes", [0, -1])
def test_block_bytes_are_positive(block_bytes):
    for function in (similarity_matrix, similar_pairs, neighbours):
        with pytest.raises(ValueError, match=f"block_bytes .*got {block_bytes}"):
            function(random_vectors(), 1, block_bytes=block_bytes)


def test_empty_sets_give_empty_results():
    none, some, one = random_vectors(0), random_vectors(4), random_vectors(1)
    assert similarity_matrix(none).shape == (0, 0)
    assert similarity_matrix(none, other=some).shape == (0, 4)
    assert similarity_matrix(some, other=none).shape == (4, 0)
    assert cos_sim(none, some).shape == (0, 4)
    assert top_k(none, some, 2).indices.shape == (0, 2)
    for pairs in (
        similar_pairs(none), similar_pairs(some, other=none), similar_pairs(one, -1),
        closest_pairs(none), closest_pairs(one),
    ):  # fmt: skip
        assert [(x.shape, x.dtype) for x in pairs] == [
            ((0,), np.int64), ((0,), np.int64), ((0,), np.float32)
        ]  # fmt: skip
    assert similarity_matrix(one).toarray().tolist() == [[1.0]]
    for arguments in ((some, none), (none, none), (one, none)):  # "from 1 to 0" would not help
        with pytest.raises(ValueError, match=r"\bno\b"):
            top_k(*arguments, 1)
    for vectors in (none, one):
        with pytest.raises(ValueError, match=r"\bno\b"):
            neighbours(vectors, 1)


@settings(deadline=None, database=None, max_examples=60)
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
    scores, tile = dense(vectors), tile_of(rows, len(vectors))
    matrix = similarity_matrix(vectors, threshold, **tile)
    assert_above(matrix, scores, np.float32(threshold))
    assert (matrix != matrix.T).nnz == 0
    k = min(3, len(vectors))
    top = top_k(vectors, vectors, k, **tile)
    np.testing.assert_allclose(top.scores, -np.sort(-scores, axis=1)[:, :k], atol=NEAR)


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


def test_an_unknown_measure_lists_the_known_ones():
    for function in (score_all, score_pairs):
        with pytest.raises(ValueError, match=r"'jaccard'.*cosine, dot, euclidean, manhattan"):
            function(random_vectors(), random_vectors(), "jaccard")
