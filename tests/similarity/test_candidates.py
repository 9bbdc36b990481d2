"""Every candidate scorer leads to bitwise the same results."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx import TensorProto, helper
from vector_sets import assert_same

import onnxsim_embed
from onnxsim_embed.similarity import nearest
from onnxsim_embed.similarity.candidates import (
    Float32Scorer,
    Int8Scorer,
    PrefixRotation,
    int8_scoring_supported,
    principal_axes,
)
from onnxsim_embed.similarity.scoring import exact_scores
from onnxsim_embed.similarity.selection import TopPairs, top_k_of_rows
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.tiles import TiledComparison
from onnxsim_embed.similarity.unit_rows import unit_vectors

needs_int8 = pytest.mark.skipif(
    not int8_scoring_supported(40), reason="int8 products saturate here"
)

ROWS, DIM = 400, 40


def hostile_vectors():
    """Clusters, duplicates, zero rows, single components, huge beside tiny ones, constant rows."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ROWS, DIM))
    vectors[:120] += 3 * rng.standard_normal(DIM)
    vectors[::7] = vectors[1]
    vectors[[5, 399]] = 0
    vectors[9] = np.eye(DIM)[3]
    vectors[50] = np.where(np.arange(DIM) < 2, [1, 1e-5] * (DIM // 2), 0)
    vectors[60] = 1
    vectors[61] = -1
    vectors[62] *= 1e-30
    vectors[63, 0] = 1e6
    return unit_vectors(vectors)


def near_threshold(threshold=0.5):
    """Pairs whose cosine is within a few float32 steps of a threshold, on both sides."""
    rng = np.random.default_rng(1)
    base = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    rows = [base[0]]
    for step in range(-200, 200):
        cosine = threshold + step * 3e-8
        rows.append(cosine * base[0] + np.sqrt(1 - cosine**2) * base[1 + step % (DIM - 1)])
    return unit_vectors(np.array(rows))


SETS = {"hostile": hostile_vectors(), "near": near_threshold()}
each_set = pytest.mark.parametrize("vectors", SETS.values(), ids=SETS)
each_tile = pytest.mark.parametrize("tile_bytes", [3000, 1 << 23])


def scorers(sample):
    """Both scorers, of all components and of prefixes."""
    axes = principal_axes(sample)
    rotations = [PrefixRotation(axes, size) for size in (2, sample.shape[1] // 3) if size > 1]
    kinds = [Float32Scorer, *[Int8Scorer] * int8_scoring_supported(sample.shape[1])]
    return [partial(kind, rotation=r) for kind in kinds for r in (None, *rotations)]


def comparisons(left, right, tile_bytes):
    return [TiledComparison(left, right, tile_bytes, make) for make in scorers(right)]


def top_k(comparison, k, skip_self):
    return nearest.top_k(comparison, k, skip_self=skip_self)


def plain_top_k(scores, k, skip_self):
    """Indices by a stable sort of all exact scores."""
    scores = scores.copy()
    if skip_self:
        np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def all_scores(left, right):
    """The exact score of every pair, each on its own."""
    rows, columns = np.divmod(np.arange(len(left) * len(right)), len(right))
    one = [exact_scores(left, right, rows[i : i + 1], columns[i : i + 1]) for i in range(len(rows))]
    return np.concatenate(one).reshape(len(left), len(right))


@each_set
@each_tile
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("threshold", [-1, 0, 0.5, 0.9, 1])
def test_pairs_and_scores_are_the_same(vectors, tile_bytes, upper, threshold):
    first, *others = (
        build_matrix(comparison.above(threshold, upper=upper), len(vectors))
        for comparison in comparisons(vectors, vectors, tile_bytes)
    )
    for matrix in others:
        assert_same(matrix, first)


@each_set
@each_tile
@pytest.mark.parametrize(("k", "skip_self"), [(1, True), (10, False), (300, True)])
def test_the_top_k_are_the_same(vectors, tile_bytes, k, skip_self):
    first, *others = (
        top_k(comparison, k, skip_self) for comparison in comparisons(vectors, vectors, tile_bytes)
    )
    for top in others:
        assert_same(top, first)


@each_set
def test_two_sets_give_the_same(vectors):
    other = np.ascontiguousarray(vectors[::-3])
    first, *others = comparisons(vectors, other, 1 << 23)
    for comparison in others:
        for run in (
            lambda c: build_matrix(c.above(0.4, upper=False), len(other)),
            lambda c: top_k(c, 7, False),
        ):
            assert_same(run(comparison), run(first))


@st.composite
def unit_sets(draw):
    """Unit rows of all kinds that may break a bound: see `kind`."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    rows, dim = draw(st.integers(2, 40)), draw(st.integers(2, 48))
    kind = draw(
        st.sampled_from(["normal", "ties", "spikes", "copies", "narrow", "axes", "zeros", "huge"])
    )
    vectors = rng.standard_normal((rows, dim))
    if kind == "ties":
        vectors = rng.integers(-1, 2, (rows, dim)).astype(float)
    elif kind == "spikes":
        vectors[np.arange(rows), rng.integers(0, dim, rows)] *= 10.0 ** rng.integers(0, 6, rows)
    elif kind == "copies":  # scores within a few float32 steps of each other, and of 1
        vectors = vectors[rng.integers(0, 3, rows) % rows] + 1e-7 * vectors
    elif kind == "narrow":  # as BGE and E5: all scores above 0.6
        vectors = vectors[0] + 0.3 * vectors
    elif kind == "axes":  # no direction holds more energy than another: a rotation is useless
        vectors = np.eye(dim)[rng.integers(0, dim, rows)] + 0.01 * vectors
    elif kind == "zeros":
        vectors[rng.random(rows) < 0.7] = 0
    elif kind == "huge":
        vectors *= 10.0 ** rng.integers(-30, 31, (rows, 1))
    vectors[rng.random(rows) < 0.2] = vectors[0]
    return unit_vectors(vectors)


@settings(deadline=None, database=None, max_examples=60)
@given(unit_sets(), st.data())
def test_no_scorer_misses_a_pair_or_changes_a_score(vectors, data):
    expected = all_scores(vectors, vectors)
    values = [-1.0, 0.0, 0.3, 0.9, 1.0, *np.unique(expected)[-40:].tolist()]  # the last bit decides
    threshold, k = data.draw(st.sampled_from(values)), data.draw(st.integers(1, len(vectors) - 1))
    upper, skip_self = data.draw(st.booleans()), data.draw(st.booleans())
    other = data.draw(st.sampled_from([vectors, vectors[::2].copy()]))
    tile_bytes = data.draw(st.sampled_from([200, 2000, 1 << 20]))
    alone = other is vectors
    expected = expected if alone else expected[:, ::2]
    k = min(k, len(other) - (alone and skip_self))
    upper, skip_self = upper and alone, skip_self and alone
    above = expected > np.float32(threshold)
    rows, columns = np.nonzero(np.triu(above, 1) if upper else above)
    indices = plain_top_k(expected, k, skip_self)
    for comparison in comparisons(vectors, other, tile_bytes):
        matrix = build_matrix(comparison.above(threshold, upper=upper), len(other)).tocoo()
        assert_same((matrix.row, matrix.col), (rows.astype(np.int32), columns.astype(np.int32)))
        np.testing.assert_array_equal(matrix.data, expected[rows, columns])
        top = top_k(comparison, k, skip_self)
        np.testing.assert_array_equal(top[1], indices)
        np.testing.assert_array_equal(top[0], np.take_along_axis(expected, indices, axis=1))


@each_set
@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.6, 1])
def test_a_score_depends_on_its_two_rows_only(vectors, share):
    """However many pairs of a tile are scored, and in which order."""
    expected = all_scores(vectors[:30], vectors)
    mask = np.random.default_rng(0).random(expected.shape) < share
    rows, columns = np.nonzero(mask)
    scores = exact_scores(vectors[:30], vectors, rows, columns)
    np.testing.assert_array_equal(scores, expected[rows, columns])
    order = np.random.default_rng(1).permutation(len(rows))
    again = exact_scores(vectors[:30], vectors, rows[order], columns[order])
    np.testing.assert_array_equal(again, scores[order])


@each_set
def test_the_error_bounds_hold_and_leave_few_candidates(vectors):
    rows = slice(0, len(vectors))
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    for make in scorers(vectors):
        scorer = make(vectors, vectors)
        scores = scorer.scores(rows, rows)
        for threshold in (-0.5, 0.0, 0.3, 0.8):
            candidates = scores > scorer.bounds(threshold)
            assert (candidates | (exact <= threshold)).all()
            if make.keywords["rotation"] is None:
                assert not candidates[exact < threshold - 0.1].any()


def test_hardly_any_rows_or_nonzero_ones():
    vectors = np.zeros((ROWS, DIM), np.float32)
    vectors[[3, 200]] = hostile_vectors()[[3, 3]] * [[1], [-1]]
    for skip_self in (True, False):
        first, *others = (top_k(c, 399, skip_self) for c in comparisons(vectors, vectors, 1 << 20))
        for top in others:
            assert_same(top, first)
    for rows in (0, 1):
        left = hostile_vectors()[:rows]
        for make in scorers(hostile_vectors()):
            comparison = TiledComparison(left, hostile_vectors(), 1 << 20, make)
            assert len(list(comparison.above(0.5, upper=False))) == rows


def test_scores_do_not_depend_on_tiles():
    vectors = SETS["hostile"]
    first, *others = (
        build_matrix(TiledComparison(vectors, vectors, size).above(0.3, upper=True), ROWS)
        for size in (777, 50_000, 1 << 23)
    )
    for matrix in others:
        assert_same(matrix, first)


def test_the_product_is_onnx_own_operator_and_nothing_else():
    file = Path(onnxsim_embed.__file__).parent / "data/product.onnx"
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right", "zero"], ["scores"])],
        "product",
        [
            helper.make_tensor_value_info("left", TensorProto.UINT8, ["m", "k"]),
            helper.make_tensor_value_info("right", TensorProto.INT8, ["k", "n"]),
            helper.make_tensor_value_info("zero", TensorProto.UINT8, []),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.INT32, ["m", "n"])],
    )
    opset = [helper.make_opsetid("", 17)]
    assert onnx.load(file) == helper.make_model(
        graph, opset_imports=opset, ir_version=8, producer_name="onnxsim-embed"
    )


# selection

quietly = settings(deadline=None, database=None, max_examples=60)
few_values = st.integers(-1, 1).map(float)  # many ties


@quietly
@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=few_values)
)
def test_the_top_k_of_rows_are_those_of_a_stable_sort(scores):
    columns = np.broadcast_to(np.arange(scores.shape[1])[::-1], scores.shape)
    for k in range(1, scores.shape[1] + 2):
        top = top_k_of_rows(scores, k)
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(top.indices, expected)
        np.testing.assert_array_equal(top.scores, np.take_along_axis(scores, expected, axis=1))
        assert_same(top_k_of_rows(scores[:, ::-1], k, columns), top)


@quietly
@given(
    npst.arrays(np.float32, st.integers(2, 9).map(lambda n: (n, n)), elements=few_values),
    st.sampled_from([1, 2, 3, 5, 8, 40, None]),
    st.integers(1, 4),
)
def test_top_pairs_are_the_top_of_all_pairs_in_any_order(scores, limit, step):
    size = len(scores)
    left, right = np.triu_indices(size, 1)
    values = scores[left, right]
    expected = np.lexsort((right, left, -values))[:limit]
    best = TopPairs(size, limit)
    for start in range(0, size, step):  # from the last to the first, some of them twice
        part = slice(max(0, len(left) - start * size), len(left))
        best.add(right[part], left[part], values[part])
    best.add(left, right, values)
    assert_same(best.result(), (left[expected], right[expected], values[expected]))


def test_top_pairs_hold_little_more_than_their_limit():
    best, rng = TopPairs(10_000, 10), np.random.default_rng(0)
    for number in range(200):
        best.add(np.arange(50) + number * 50, np.full(50, 9999), rng.random(50))
        assert sum(len(keys) for keys, _ in best._added) <= 20
