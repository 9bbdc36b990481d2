"""CandidateScorer scores: int8 and float32 lead to the same result, bit for bit, whatever the vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxsim_embed
from onnxsim_embed.similarity.candidates import Float32Scorer, Int8Scorer, int8_scoring_supported
from onnxsim_embed.similarity.compare import unit_vectors
from onnxsim_embed.similarity.scoring import TiledComparison
from onnxsim_embed.similarity.sparse import build_matrix

pytestmark = pytest.mark.skipif(
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
    """Pairs whose cosine lies within a few float32 steps of a threshold, on both sides."""
    rng = np.random.default_rng(1)
    base = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    rows = [base[0]]
    for step in range(-200, 200):
        cosine = threshold + step * 3e-8
        rows.append(cosine * base[0] + np.sqrt(1 - cosine**2) * base[1 + step % (DIM - 1)])
    return unit_vectors(np.array(rows))


SETS = {"hostile": hostile_vectors(), "near": near_threshold()}
each_set = pytest.mark.parametrize("vectors", SETS.values(), ids=SETS)
each_block = pytest.mark.parametrize("block_bytes", [3000, 1 << 23])


def searches(left, right, block_bytes):
    return [
        TiledComparison(left, right, block_bytes, kind(left, right))
        for kind in (Float32Scorer, Int8Scorer)
    ]


def select_top_k(search, k, skip_self):
    parts = list(search.top_k(k, skip_self=skip_self))
    return [np.concatenate([getattr(part, name) for part in parts]) for name in parts[0]._fields]


@each_set
@each_block
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("threshold", [-1, -0.2, 0, 0.5, 0.9, 1])
def test_both_find_the_same_pairs_and_scores(vectors, block_bytes, upper, threshold):
    plain, whole = (
        build_matrix(search.above(threshold, upper=upper), len(vectors))
        for search in searches(vectors, vectors, block_bytes)
    )
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(plain, name))


@each_set
@each_block
@pytest.mark.parametrize("skip_self", [True, False])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_both_find_the_same_k_best(vectors, block_bytes, skip_self, k):
    plain, whole = (
        select_top_k(search, k, skip_self) for search in searches(vectors, vectors, block_bytes)
    )
    np.testing.assert_array_equal(whole[0], plain[0])
    np.testing.assert_array_equal(whole[1], plain[1])


@each_set
def test_two_sets_give_the_same_too(vectors):
    other = np.ascontiguousarray(vectors[::-3])
    plain, whole = searches(vectors, other, 1 << 23)
    a, b = (build_matrix(s.above(0.4, upper=False), len(other)) for s in (plain, whole))
    np.testing.assert_array_equal(a.toarray(), b.toarray())
    for ours, theirs in zip(
        select_top_k(plain, 7, False), select_top_k(whole, 7, False), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@each_set
def test_the_bound_of_the_error_holds(vectors):
    scorer = Int8Scorer(vectors, vectors)
    rows = slice(0, len(vectors))
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    scores = scorer.block(rows, slice(0, len(vectors)))
    trusted = np.setdiff1d(np.arange(len(vectors)), scorer.outliers)
    for threshold in (-0.5, 0.0, 0.3, 0.8):
        passed = scores > scorer.limits(rows, threshold)
        assert (passed | (exact <= threshold))[:, trusted].all()
    least = scorer.exact_below(rows, scores[:, trusted[0]].astype(np.float64))
    assert (exact[:, trusted[0]] >= least[:, 0]).all()


@each_set
def test_int8_leaves_few_pairs_that_do_not_count(vectors):
    scorer = Int8Scorer(vectors, vectors)
    rows = slice(0, len(vectors))
    passed = scorer.block(rows, rows) > scorer.limits(rows, 0.5)
    exact = vectors @ vectors.T
    assert not passed[exact < 0.4].any()
    assert len(scorer.outliers) <= 0.05 * len(vectors)


@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_rows(rows):
    vectors = hostile_vectors()[:rows]
    for search in searches(vectors, hostile_vectors(), 1 << 20):
        assert len(list(search.above(0.5, upper=False))) == rows


def test_scores_do_not_depend_on_the_blocks():
    vectors = SETS["hostile"]
    matrices = [
        build_matrix(TiledComparison(vectors, vectors, size).above(0.3, upper=True), ROWS)
        for size in (777, 50_000, 1 << 23)
    ]
    for matrix in matrices[1:]:
        np.testing.assert_array_equal(matrix.data, matrices[0].data)
        np.testing.assert_array_equal(matrix.indices, matrices[0].indices)


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
    expected = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="onnxsim-embed",
    )
    assert onnx.load(file) == expected
