"""The functions of onnxsim_embed.util return what those of sentence_transformers.util return."""

from __future__ import annotations

import numpy as np
import pytest
from vector_sets import DIM, NEAR, crossing_vectors, dense, random_vectors

from onnxsim_embed import Embedder, similar_pairs, util
from onnxsim_embed.similarity import clustering

theirs = pytest.importorskip("sentence_transformers.util")
torch = pytest.importorskip("torch")


def clustered_vectors(rows, seed=0, spread=0.3):
    """Clusters of very different sizes; of any norm."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(3, rows // 20), DIM))
    vectors = centres[(rng.random(rows) ** 2 * len(centres)).astype(int)]
    vectors = vectors + rng.standard_normal((rows, DIM)) * spread
    return (vectors * rng.uniform(0.5, 2, (rows, 1))).astype(np.float32)


def of_theirs(function):
    """The same score function of sentence-transformers."""
    return getattr(theirs, function.__name__)


FORMS = {
    "array": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "list": lambda x: x.tolist(),
    "tensor": torch.from_numpy,
    "list of arrays": list,
    "list of tensors": lambda x: list(torch.from_numpy(x)),
}
SCORES = [util.cos_sim, util.dot_score, theirs.manhattan_sim]
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_score = pytest.mark.parametrize("score", SCORES, ids=[score.__name__ for score in SCORES])


# scores


@each_form
@pytest.mark.parametrize(
    ("name", "rows"),
    [("cos_sim", (7, 1)), ("cos_sim", (5, 9)), ("dot_score", (1, 1)), ("dot_score", (5, 9)),
     ("pairwise_cos_sim", (9, 9)), ("pairwise_dot_score", (9, 9))],
)  # fmt: skip
def test_scores_are_theirs(form, name, rows):
    a, b = random_vectors(rows[0]), random_vectors(rows[1], seed=1)
    scores = getattr(util, name)(form(a), form(b))
    assert isinstance(scores, np.ndarray)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, getattr(theirs, name)(a, b).numpy(), atol=1e-5)
    if not name.startswith("pairwise"):  # one vector is one row
        np.testing.assert_allclose(getattr(util, name)(form(a)[0], b), scores[:1], atol=1e-6)


# vectors


@pytest.mark.parametrize("rows", [slice(None), 3])
def test_normalized_vectors_are_theirs(rows):
    vectors = random_vectors(9)
    vectors[4] = 0
    unit = util.normalize_embeddings(vectors[rows])
    expected = theirs.normalize_embeddings(torch.from_numpy(vectors)[rows]).numpy()
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, expected, atol=NEAR)


@pytest.mark.parametrize("dim", [1, 8, 100, None])
def test_truncated_vectors_are_theirs(dim):
    vectors = random_vectors(5)
    ours, expected = (module.truncate_embeddings(vectors, dim) for module in (util, theirs))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("rows", [0, 2, 40])
def test_quantized_vectors_are_theirs(precision, rows):
    vectors = random_vectors(rows)
    ours = util.quantize_embeddings(vectors, precision)
    expected = theirs.quantize_embeddings(vectors, precision)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_ranges_are_passed_or_those_of_calibration_vectors(precision):
    vectors, calibration = random_vectors(6), random_vectors(50, seed=1)
    ranges = np.stack([calibration.min(axis=0), calibration.max(axis=0)])
    expected = theirs.quantize_embeddings(vectors, precision, ranges=ranges)
    for options in ({"ranges": ranges}, {"calibration_embeddings": calibration}):
        ours = util.quantize_embeddings(vectors, precision, **options)
        np.testing.assert_array_equal(ours, expected)


def test_quantized_vectors_are_not_quantized_again():
    with pytest.raises(ValueError, match="int8"):
        util.quantize_embeddings(np.ones((3, 4), np.int8), "binary")


# search


def assert_hits(ours, expected):
    assert len(ours) == len(expected)
    for hits, wanted in zip(ours, expected, strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in wanted]
        np.testing.assert_allclose(
            [hit["score"] for hit in hits], [hit["score"] for hit in wanted], atol=1e-5
        )
        assert all(type(hit["corpus_id"]) is int and type(hit["score"]) is float for hit in hits)


@each_score
@pytest.mark.parametrize("queries", [0, 1, 13])
@pytest.mark.parametrize("rows", [0, 9, 83])
@pytest.mark.parametrize("top_k", [0, 1, 10, 100])
def test_search_finds_what_theirs_finds(score, queries, rows, top_k):
    a, b = random_vectors(queries), random_vectors(rows, seed=1)
    expected = theirs.semantic_search(a, b, top_k=top_k, score_function=of_theirs(score))
    assert_hits(util.semantic_search(a, b, top_k=top_k, score_function=score), expected)


@pytest.mark.parametrize("chunks", [(1, 1), (5, 17), (17, 5), (100, 100)])
@each_score
def test_hits_and_pairs_do_not_depend_on_chunks(chunks, score, monkeypatch):
    a, b = random_vectors(13), random_vectors(seed=1)
    vectors, mining = clustered_vectors(60), util.paraphrase_mining_embeddings
    limits = ({}, {"top_k": 3}, {"max_pairs": 50})
    hits = util.semantic_search(a, b, score_function=score)
    pairs = [mining(vectors, score_function=score, **limit) for limit in limits]
    monkeypatch.setattr(clustering, "CHUNK_BYTES", 4 * 60 * 11)  # at most 11 rows
    assert_hits(util.semantic_search(a, b, *chunks, score_function=score), hits)
    for limit, expected in zip(limits, pairs, strict=True):
        assert_pairs(mining(vectors, *chunks, score_function=score, **limit), expected)


@each_form
def test_what_notebooks_hold_is_accepted(form):
    a, b = random_vectors(3), random_vectors(30, seed=1)
    for score in (util.cos_sim, util.dot_score):
        expected = util.semantic_search(a, b, score_function=score)
        assert_hits(util.semantic_search(form(a), form(b), score_function=score), expected)
    vectors = clustered_vectors(60)
    mining = util.paraphrase_mining_embeddings
    assert_pairs(mining(form(vectors)), mining(vectors))
    expected = util.community_detection(vectors, min_community_size=3)
    assert expected
    assert util.community_detection(form(vectors), min_community_size=3) == expected
    assert util.semantic_search(form(a)[1], form(b)) == util.semantic_search(a[1:2], b)
    assert util.semantic_search([], form(b)) == []
    assert util.semantic_search(form(a), []) == [[], [], []]


@pytest.mark.parametrize("score", [util.cos_sim, util.dot_score])
def test_equal_scores_are_ordered_by_row(score):
    vectors = crossing_vectors()
    scores = score(vectors, vectors)
    for row, hits in enumerate(util.semantic_search(vectors, vectors, score_function=score)):
        expected = np.argsort(-scores[row], kind="stable")[:10]
        assert [hit["corpus_id"] for hit in hits] == expected.tolist()


def test_a_score_function_receives_tensors_as_they_are():
    vectors, types = torch.from_numpy(random_vectors(9)), set()

    def score(a, b):
        types.update({type(a), type(b)})
        return a @ b.T

    expected = util.semantic_search(vectors, vectors, score_function=util.dot_score)
    assert_hits(util.semantic_search(vectors, vectors, score_function=score), expected)
    assert types == {torch.Tensor}


@pytest.mark.parametrize(
    ("score", "word"),
    [(lambda a, b: (a @ b.T)[:, :1], "shape"), (lambda a, b: a @ b.T * np.nan, "NaN")],
)
def test_a_score_function_that_returns_something_else_is_rejected(score, word):
    with pytest.raises(ValueError, match=word):
        util.semantic_search(np.ones((4, 2)), np.ones((6, 2)), score_function=score)


@pytest.mark.parametrize(
    ("name", "options"),
    [("chunk size", {"query_chunk_size": 0}), ("chunk size", {"corpus_chunk_size": -1}),
     ("top_k", {"top_k": -1}), ("max_pairs", {"max_pairs": -1})],
)  # fmt: skip
def test_limits_are_not_negative_and_chunk_sizes_positive(name, options):
    vectors = random_vectors(5)
    with pytest.raises(ValueError, match=name):
        util.paraphrase_mining_embeddings(vectors, score_function=util.dot_score, **options)
    if "max_pairs" not in options:
        with pytest.raises(ValueError, match=name):
            util.semantic_search(vectors, vectors, score_function=util.dot_score, **options)


# pairs


def as_table(pairs):
    assert all(type(score) is float and type(i) is type(j) is int for score, i, j in pairs)
    assert all(i < j for _, i, j in pairs)
    table = {(i, j): score for score, i, j in pairs}
    assert len(table) == len(pairs)
    assert [-score for score, _, _ in pairs] == sorted(-score for score, _, _ in pairs)
    return table


def assert_pairs(ours, expected):
    ours, expected = as_table(ours), {(i, j): score for score, i, j in expected}
    assert ours.keys() == expected.keys()
    np.testing.assert_allclose(
        [ours[pair] for pair in expected], list(expected.values()), rtol=1e-5, atol=1e-5
    )


def mined(vectors, **options):
    return theirs.paraphrase_mining_embeddings(torch.from_numpy(vectors), **options)


@each_score
@pytest.mark.parametrize("rows", [0, 1, 2, 90])
@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("max_pairs", [0, 40, 10**6])
def test_limits_give_the_pairs_of_theirs(score, rows, top_k, max_pairs):
    vectors, limits = clustered_vectors(rows), {"top_k": top_k, "max_pairs": max_pairs}
    ours = util.paraphrase_mining_embeddings(vectors, score_function=score, **limits)
    assert_pairs(ours, mined(vectors, score_function=of_theirs(score), **limits))


@each_score
@pytest.mark.parametrize("max_pairs", [7, 300, None])
def test_without_top_k_the_result_is_the_top_of_all_pairs(score, max_pairs):
    vectors = clustered_vectors(90)
    left, right = np.triu_indices(90, 1)
    scores = np.asarray(score(vectors, vectors))[left, right]
    order = np.argsort(-scores, kind="stable")[:max_pairs]
    expected = zip(scores[order], left[order], right[order], strict=True)
    ours = util.paraphrase_mining_embeddings(vectors, max_pairs=max_pairs, score_function=score)
    assert_pairs(ours, list(expected))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"max_pairs": 700}], ids=str)
def test_cosines_are_bitwise_those_of_similar_pairs(options, monkeypatch):
    monkeypatch.setattr(clustering, "CHUNK_BYTES", 4 * 300 * 70)
    vectors = (np.random.default_rng(0).standard_normal((300, 19)) * 3.7).astype(np.float32)
    table = as_table(util.paraphrase_mining_embeddings(vectors, **options))
    pairs = similar_pairs(vectors, -1)
    scores = {(i, j): s for i, j, s in zip(*(x.tolist() for x in pairs), strict=True)}
    assert table == {pair: scores[pair] for pair in table}
    if "max_pairs" in options:
        assert list(table) == list(scores)[:700]


@pytest.mark.parametrize("score", [util.cos_sim, util.dot_score])
def test_the_default_holds_the_top_pairs_and_every_pair_of_theirs(score, monkeypatch):
    monkeypatch.setattr(util, "DEFAULT_MAX_PAIRS", 400)
    monkeypatch.setattr(util, "DEFAULT_TOP_K", 3)
    vectors = clustered_vectors(200)
    alone = util.paraphrase_mining_embeddings(vectors, top_k=4, score_function=score)
    assert_pairs(alone, mined(vectors, top_k=4, score_function=of_theirs(score)))
    ours = util.paraphrase_mining_embeddings(vectors, score_function=score)
    best = util.paraphrase_mining_embeddings(vectors, max_pairs=400, score_function=score)
    limited = mined(vectors, max_pairs=400, top_k=3, score_function=of_theirs(score))
    both = as_table(best).keys() | as_table(limited).keys()
    assert as_table(ours).keys() == both
    assert 400 < len(both) <= 800  # theirs loses pairs, and ours holds what theirs has instead


def test_a_large_group_of_similar_rows_loses_no_pair():
    vectors = np.repeat(random_vectors(1), 150, axis=0) + 0.01 * random_vectors(150, seed=1)
    close = np.count_nonzero(np.triu(dense(vectors), 1) > 0.9)
    assert len(mined(vectors)) < close == 150 * 149 // 2
    assert len(util.paraphrase_mining_embeddings(vectors)) == close


def test_equal_pairs_are_ordered_by_rows():
    vectors = crossing_vectors()
    pairs = util.paraphrase_mining_embeddings(vectors)
    assert pairs == sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))
    assert len(pairs) == 60 * 59 // 2
    assert util.paraphrase_mining_embeddings(vectors, max_pairs=100) == pairs[:100]


class Model:
    """Any object with encode."""

    def encode(self, sentences, **options):
        self.options = options
        return random_vectors(len(sentences))


def test_mining_passes_options_to_the_model():
    model, sentences = Model(), ["a"] * 20
    pairs = util.paraphrase_mining(model, sentences, max_pairs=30)
    assert model.options == {}
    assert pairs == util.paraphrase_mining_embeddings(random_vectors(20), max_pairs=30)
    options = {"show_progress_bar": True, "batch_size": 8, "truncate_dim": 16, "prompt": "a "}
    util.paraphrase_mining(model, sentences, **options)
    assert model.options == options


def test_mining_accepts_an_embedder(artifact):
    texts = ["solar energy", "a road to the village", "energy solar", "the dog and the cat"]
    embedder = Embedder(artifact)
    pairs = util.paraphrase_mining(embedder, texts, True, 2, prompt_name="query")
    expected = dense(embedder.encode(texts, prompt_name="query"))
    assert_pairs(pairs, [(expected[i, j], i, j) for i in range(4) for j in range(i + 1, 4)])


def test_mining_names_or_drops_sentences_that_the_model_does_not_tell_apart(artifact, caplog):
    texts = ["☂", "solar energy", "☃", "Solar energy", ""]
    pairs = util.paraphrase_mining(Embedder(artifact), texts, max_pairs=2)
    assert [pair[1:] for pair in pairs] == [[0, 2], [1, 3]]
    assert "row 2 " in caplog.text
    pairs = util.paraphrase_mining(Embedder(artifact), texts, drop_unseen=True)
    assert pairs[0][1:] == [1, 3]
    assert {row for pair in pairs for row in pair[1:]} == {0, 1, 3, 4}


# communities


@pytest.mark.parametrize("rows", [1, 9, 10, 400])
@pytest.mark.parametrize("threshold", [0.3, 0.75, 0.9])
@pytest.mark.parametrize("min_size", [1, 3, 10])
def test_communities_are_theirs(rows, threshold, min_size):
    vectors = clustered_vectors(rows)
    arguments = (threshold, min_size, 7)
    ours = util.community_detection(vectors, *arguments)
    expected = theirs.community_detection(vectors, *arguments)
    scores = dense(vectors)
    assert [len(group) for group in ours] == [len(group) for group in expected]
    for group, wanted in zip(ours, expected, strict=True):
        assert group[0] == wanted[0]
        assert set(group) == set(wanted)
        assert all(type(row) is int for row in group)
        # The same order, except for scores that differ by less than float32 can tell.
        np.testing.assert_allclose(scores[group[0], group], scores[group[0], wanted], atol=NEAR)


def test_no_vectors_and_one_vector_have_the_communities_of_theirs():
    assert util.community_detection([]) == theirs.community_detection([]) == []
    one = random_vectors(1)[0]
    assert util.community_detection(one, 0.5, 1) == theirs.community_detection(one, 0.5, 1) == [[0]]
