"""Duplicates, communities and components equal plain float64 computations."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from vector_sets import NEAR, clustered_vectors, crossing_vectors, dense

from onnxsim_embed.similarity import clustering, duplicates, similar_pairs
from onnxsim_embed.similarity.clustering import (
    communities,
    component_groups,
    components,
    least_similarities,
)
from onnxsim_embed.similarity.duplicates import Duplicates, deduplicate, unseen_rows

pytestmark = pytest.mark.filterwarnings("ignore:one component holds")

CLUSTERED = {
    f"clustered{seed}": clustered_vectors(60 + 50 * seed, seed, 7, 0.25) for seed in range(3)
}
each_set = pytest.mark.parametrize("vectors", CLUSTERED.values(), ids=CLUSTERED)


def clear_scores(vectors, threshold):
    """All cosines, none of them where float32 could fall on the wrong side of the threshold."""
    scores = dense(vectors)
    assert np.abs(scores - threshold).min() > NEAR
    return scores


# duplicates


def greedy(scores, threshold):
    first = []
    for row in range(len(scores)):
        above = [k for k in range(row) if first[k] == k and scores[row, k] > threshold]
        first.append(min(above, default=row))
    return np.array(first, np.int64)


def assert_duplicates(found, scores, threshold):
    first = greedy(scores, threshold)
    np.testing.assert_array_equal(found.first, first)
    np.testing.assert_array_equal(found.kept, np.flatnonzero(first == np.arange(len(first))))
    assert found.first.dtype == found.kept.dtype == np.int64
    assert found.scores.dtype == np.float32
    own = np.where(first == np.arange(len(first)), 1, scores[np.arange(len(first)), first])
    np.testing.assert_allclose(found.scores, own, atol=NEAR)


@pytest.mark.parametrize("chunk", [1, 5, 17, 4096])
def test_a_row_strictly_above_the_threshold_with_an_earlier_kept_row_is_dropped(chunk, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", chunk)
    for threshold in (-0.3, 0.2, 0.6, 0.8, 0.95):
        for vectors in CLUSTERED.values():
            scores = clear_scores(vectors, threshold)
            assert_duplicates(deduplicate(vectors, threshold), scores, threshold)
    vectors = crossing_vectors()
    for threshold in (-1, -0.5, 0, 0.5, 1):
        exclusive = min(threshold, 1 - 1e-7)  # at 1, equal rows
        assert_duplicates(deduplicate(vectors, threshold), dense(vectors), exclusive)


def test_similarity_is_not_transitive():
    angles = np.radians([0, 20, 40, 50])
    found = deduplicate(np.stack([np.cos(angles), np.sin(angles)], axis=1), np.cos(np.radians(25)))
    np.testing.assert_array_equal(found.first, [0, 0, 2, 2])
    np.testing.assert_array_equal(found.kept, [0, 2])


def test_groups_hold_each_kept_row_with_its_duplicates():
    found = deduplicate(CLUSTERED["clustered1"], 0.8)
    groups = found.groups()
    assert [group[0] for group in groups] == [
        row for row in found.kept if np.count_nonzero(found.first == row) > 1
    ]
    for group in groups:
        np.testing.assert_array_equal(group, np.flatnonzero(found.first == group[0]))


@pytest.mark.parametrize("threshold", [-0.3, 0.2, 0.6, 1])
@pytest.mark.parametrize("seed", range(4))
def test_equal_vectors_of_other_texts_are_no_duplicates(seed, threshold, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 7)
    rng = np.random.default_rng(seed)
    vectors = clustered_vectors(20, seed, 4, 0.3)[rng.integers(0, 20, 60)]
    texts = rng.choice(["a", "b", "c", ""], 60).tolist()
    scores = clear_scores(vectors, threshold) if threshold < 1 else dense(vectors)
    equal = (vectors[:, None] == vectors).all(axis=2)
    differ = np.array([[a != b or a == "" for a in texts] for b in texts])
    scores[equal] = np.where(differ[equal], -1, 1)
    exclusive = min(threshold, 1 - 1e-7)
    found = deduplicate(vectors, threshold, texts=texts)
    assert found.first.tolist() == greedy(scores, exclusive).tolist()
    assert found.kept.tolist() == np.flatnonzero(found.first == np.arange(60)).tolist()
    scores[equal] = 1
    found = deduplicate(vectors, threshold, texts=texts, drop_unseen=True)
    assert found.first.tolist() == greedy(scores, exclusive).tolist()


def test_unseen_rows_differ_by_more_than_case_accents_and_spaces():
    texts = [
        "Straße 1",
        "strasse 1",
        "S\u200btrasse  1\n",
        "Stra\u0301ße 1",
        "strasse 2",
        "",
        " ",
        "कि",
        "के",
    ]
    assert unseen_rows(np.ones((9, 3)), texts).tolist() == [4, 5, 6, 7, 8]
    assert unseen_rows(np.eye(9), texts).tolist() == []
    with pytest.raises(ValueError, match="9 texts for 2 vectors"):
        deduplicate(np.ones((2, 3)), texts=texts)


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_have_no_duplicates_communities_or_connections(rows):
    vectors = np.ones((rows, 4))
    result = deduplicate(vectors, 0.5)
    np.testing.assert_array_equal(result.kept, np.arange(rows))
    np.testing.assert_array_equal(result.first, np.arange(rows))
    assert result.groups() == communities(vectors, 0.5, 2) == []
    np.testing.assert_array_equal(components(vectors, 0.5), np.zeros(rows))
    assert [group.tolist() for group in component_groups(vectors)] == [[0]] * rows


def test_memory_is_bounded_if_all_rows_are_similar(monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 100)
    sizes, above = [], duplicates.AllPairs.above

    def watched(self, *arguments, **options):
        for pairs in above(self, *arguments, **options):
            sizes.append(len(pairs.scores))
            yield pairs

    monkeypatch.setattr(duplicates.AllPairs, "above", watched)
    assert len(deduplicate(np.ones((2000, 3)), 0.9).kept) == 1
    assert max(sizes) <= 100 * 100


@pytest.mark.parametrize("memory", [30_000, 1 << 30])
@pytest.mark.parametrize("threshold", [-0.3, 0.6, 0.8, 1])
def test_rows_of_a_reference_set_come_first(memory, threshold, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 16)
    reference, vectors = clustered_vectors(40, 5), clustered_vectors(90, 6)
    vectors[[3, 50]] = reference[[20, 20]] * 2
    together = np.concatenate([reference, vectors])
    scores = dense(together)
    np.fill_diagonal(scores[:40, :40], -2)
    scores[:40, :40] = -2  # the reference is kept as it is
    first = greedy(scores, min(threshold, 1 - 1e-7))[40:]
    found = deduplicate(vectors, threshold, reference=reference, max_memory=memory)
    excluded = first < 40
    np.testing.assert_array_equal(found.reference, np.where(excluded, first, -1))
    np.testing.assert_array_equal(found.first, np.where(excluded, -1, first - 40))
    own = np.arange(90)
    np.testing.assert_array_equal(found.kept, own[first - 40 == own])
    expected = np.where(first - 40 == own, 1, scores[own + 40, first])
    np.testing.assert_allclose(found.scores, expected, atol=NEAR)
    assert all((found.first[group] == group[0]).all() for group in found.groups())
    with pytest.raises(ValueError, match="24 and 3"):
        deduplicate(vectors, reference=np.ones((2, 3)))


@pytest.mark.parametrize("memory", [3_000, 100_000])
def test_duplicates_do_not_depend_on_memory(memory, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 16)
    vectors = CLUSTERED["clustered2"]
    for threshold in (0.2, 0.8):
        expected = deduplicate(vectors, threshold)
        found = deduplicate(vectors, threshold, max_memory=memory)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_dropped_rows_are_listed_and_a_higher_threshold_brings_some_back():
    found = deduplicate(CLUSTERED["clustered1"], 0.6)
    kept, first, scores = found  # a tuple of three, as ever
    dropped = found.dropped()
    rows = np.flatnonzero(first != np.arange(len(first)))
    assert sorted(dropped.right.tolist()) == rows.tolist()
    np.testing.assert_array_equal(dropped.left, first[dropped.right])
    np.testing.assert_array_equal(dropped.scores, scores[dropped.right])
    assert (np.diff(dropped.scores) >= 0).all()
    assert found.dropped(3).right.tolist() == dropped.right[:3].tolist()
    threshold = float(dropped.scores[len(rows) // 2])  # of a row, which is then kept
    fewer = found.rethreshold(threshold)
    still = dropped.right[dropped.scores > np.float32(threshold)]
    np.testing.assert_array_equal(fewer.dropped().right, still)
    np.testing.assert_array_equal(fewer.kept, np.setdiff1d(np.arange(len(first)), still))
    assert (fewer.scores[fewer.kept] == 1).all()
    assert found.rethreshold(0.6).kept.tolist() == kept.tolist()
    assert set(kept) < set(fewer.rethreshold(1).kept)
    with pytest.raises(ValueError, match=r"from 0\.6"):
        found.rethreshold(0.5)
    again = pickle.loads(pickle.dumps(fewer))
    assert (type(again), again.threshold) == (Duplicates, threshold)


# one normalization


def unnormalized_vectors():
    """Rows whose unit vectors do not have a norm of exactly 1, so that normalizing twice shows."""
    return (np.random.default_rng(0).standard_normal((300, 19)) * 3.7).astype(np.float32)


@pytest.mark.parametrize("position", np.linspace(0, 2000, 12).astype(int))
def test_duplicates_and_components_decide_bitwise_as_similar_pairs(position, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 64)
    vectors = unnormalized_vectors()
    pairs = similar_pairs(vectors, 0.2)
    threshold = float(pairs.scores[position])  # exactly a score: the last bit decides
    pairs = similar_pairs(vectors, threshold)
    score = {(i, j): s for i, j, s in zip(*(x.tolist() for x in pairs), strict=True)}
    found = deduplicate(vectors, threshold)
    for row, (first, value) in enumerate(zip(found.first, found.scores, strict=True)):
        earlier = [k for k in found.kept if k < row and (k, row) in score]
        assert first == min(earlier, default=row)
        assert value == score.get((first, row), 1)
    labels = components(vectors, threshold)
    assert (labels[pairs.left] == labels[pairs.right]).all()
    reach = np.eye(len(vectors), dtype=bool)
    reach[pairs.left, pairs.right] = reach[pairs.right, pairs.left] = True
    np.testing.assert_array_equal(labels[:, None] == labels, connected(reach))
    groups = component_groups(vectors, threshold)
    assert sorted(sorted(group.tolist()) for group in groups) == sorted(
        np.flatnonzero(labels == label).tolist() for label in set(labels.tolist())
    )


# communities


def by_definition(scores, threshold, min_size):
    """Communities of exact scores, without order within."""
    near = [np.flatnonzero(row >= threshold) for row in scores]
    used, found = set(), []
    for centre in sorted(range(len(scores)), key=lambda row: -len(near[row])):
        free = set(near[centre].tolist()) - used
        if centre not in used and len(near[centre]) >= min_size and len(free) >= min_size:
            found.append((centre, free | {centre}))
            used |= free
    return sorted(found, key=lambda pair: -len(pair[1]))


def assert_communities(found, scores, threshold, min_size):
    expected = by_definition(scores, threshold, min_size)
    assert [(rows[0], set(rows.tolist())) for rows in found] == expected
    for rows in found:
        assert rows.dtype == np.int64
        assert len(set(rows.tolist())) == len(rows)
        assert (np.diff(scores[rows[0], rows[1:]]) <= NEAR).all()


@each_set
@pytest.mark.parametrize("threshold", [-0.5, 0.3, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("min_size", [1, 2, 10, 500])
def test_communities_are_those_of_the_definition(vectors, threshold, min_size):
    scores = clear_scores(vectors, threshold)
    assert_communities(communities(vectors, threshold, min_size), scores, threshold, min_size)


@pytest.mark.parametrize("threshold", [-0.5, 0, 0.5, 1])
@pytest.mark.parametrize("min_size", [1, 3, 11])
def test_a_community_includes_the_threshold_itself(threshold, min_size):
    vectors = crossing_vectors()
    scores = dense(vectors)
    found = communities(vectors, threshold, min_size)
    assert_communities(found, scores, threshold, min_size)
    for rows in found:  # exact scores: ties have one right order
        rest = rows[1:]
        np.testing.assert_array_equal(rest, rest[np.lexsort((rest, -scores[rows[0], rest]))])


def test_a_centre_comes_first_even_if_others_are_as_close():
    found = communities([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], -0.5, 1)
    assert [rows.tolist() for rows in found] == [[2, 0, 1]]


# components


def connected(reach):
    """Which rows chains connect, by squaring until nothing is new."""
    while ((wider := reach.astype(int) @ reach > 0) != reach).any():
        reach = wider
    return reach


@each_set
@pytest.mark.parametrize("threshold", [-0.5, 0.6, 0.8, 0.9, 0.99])
def test_components_are_what_chains_connect(vectors, threshold):
    reach = clear_scores(vectors, threshold) > threshold
    labels = components(vectors, threshold)
    assert labels.dtype == np.int64
    expected = connected(reach | np.eye(len(vectors), dtype=bool))
    np.testing.assert_array_equal(labels[:, None] == labels, expected)
    firsts = np.unique(labels, return_index=True)[1]
    assert (np.diff(firsts) > 0).all()  # numbered by first row
    assert set(labels.tolist()) == set(range(len(firsts)))


@pytest.mark.parametrize("threshold", [-1, 0, 0.5, 1])
def test_only_pairs_strictly_above_the_threshold_connect(threshold):
    vectors = crossing_vectors()
    labels = components(vectors, threshold)
    reach = (dense(vectors) > min(threshold, 1 - 1e-7)) | np.eye(len(vectors), dtype=bool)
    np.testing.assert_array_equal(labels[:, None] == labels, connected(reach))


@each_set
@pytest.mark.parametrize("min_size", [1, 2, 8])
def test_component_groups_are_the_components_largest_first_centre_first(vectors, min_size):
    labels = components(vectors, 0.8)
    sizes = np.bincount(labels)
    groups = component_groups(vectors, 0.8, min_size)
    expected = [label for label in np.argsort(-sizes, kind="stable") if sizes[label] >= min_size]
    assert [labels[group[0]] for group in groups] == expected
    unit = clustering.unit_vectors(vectors).astype(float)
    for label, group in zip(expected, groups, strict=True):
        assert sorted(group.tolist()) == np.flatnonzero(labels == label).tolist()
        assert (np.diff(unit[group] @ unit[group].mean(axis=0)) <= NEAR).all()


@pytest.mark.parametrize("few", [1, 256])
def test_the_least_similarity_of_a_group_is_that_of_its_least_similar_pair(few, monkeypatch):
    monkeypatch.setattr(clustering, "FEW_ROWS", few)
    vectors = unnormalized_vectors()
    groups = [np.arange(60), np.array([9]), np.array([5, 7]), np.arange(100, 300)]
    found = least_similarities(vectors, groups)
    assert found.dtype == np.float32
    for rows, value in zip(groups, found, strict=True):
        assert value == similar_pairs(vectors[rows], -1).scores.min(initial=1)


def test_a_component_of_most_rows_is_warned_about():
    with pytest.warns(UserWarning, match=r"160 of 160 rows.*communities"):
        components(clustered_vectors(160), -0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        components(clustered_vectors(160), 0.99)
        components(clustered_vectors(90), -0.9)


# errors


@pytest.mark.parametrize("use", [deduplicate, communities, components, component_groups])
def test_values_and_thresholds_are_checked(use):
    vectors = CLUSTERED["clustered0"].copy()
    vectors[11, 2] = np.nan
    with pytest.raises(ValueError, match="row 11"):
        use(vectors)
    for threshold in (-1.01, 1.01, float("nan")):
        for rows in (0, 3):
            with pytest.raises(ValueError, match="threshold must be "):
                use(np.ones((rows, 4)), threshold)


@pytest.mark.parametrize("options", [{"threshold": -1}, {"min_size": 0}])
def test_communities_have_a_row_and_a_threshold_above_minus_one(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        communities(np.ones((3, 4)), **options)
    assert [rows.tolist() for rows in communities(np.ones((2, 4)), 0.5, 2)] == [[0, 1]]
