"""Duplicates, communities, components and best pairs equal plain float64 computations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from onnxsim_embed.similarity import clustering as mining
from onnxsim_embed.similarity.clustering import (
    BestPairs,
    best_of_rows,
    communities,
    component_groups,
    components,
    deduplicate,
    score_chunks,
)

DIM = 16
NEAR = 1e-6  # float32 may land on either side of a threshold that is this close

quietly = settings(deadline=None, database=None, max_examples=60)


def clustered_vectors(seed, rows, centres=7, spread=0.25):
    """Centres with close companions, exact duplicates, and zero rows; of any norm."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((centres, DIM))[rng.integers(0, centres, rows)]
    vectors += rng.standard_normal((rows, DIM)) * spread
    vectors *= rng.uniform(0.1, 10, (rows, 1))
    vectors[[7, 20]] = vectors[3]
    vectors[[5, rows - 1]] = 0
    return vectors.astype(np.float32)


def crossing_vectors(rows=60):
    """Ones and zeros in four components: scores are exactly 0, 0.5 or 1 in float32, and ties abound."""
    masks = np.random.default_rng(2).choice([0, 1, 2, 4, 8, 15], rows)
    return ((masks[:, None] >> np.arange(4)) & 1).astype(np.float32)


CLUSTERED = {f"clustered{seed}": clustered_vectors(seed, 60 + 50 * seed) for seed in range(3)}

each_set = pytest.mark.parametrize("vectors", CLUSTERED.values(), ids=CLUSTERED)
each_chunk = pytest.mark.parametrize("chunk", [1, 5, 17, 4096])


def dense(vectors):
    """All cosines in float64; a zero row scores 0."""
    wide = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    wide = wide / np.where(norms > 0, norms, 1)
    return np.round(wide @ wide.T, 12)


def clear_scores(vectors, threshold):
    """All cosines, of which none lies where float32 could fall on the wrong side."""
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


@each_set
@each_chunk
@pytest.mark.parametrize("threshold", [-0.3, 0.2, 0.6, 0.8, 0.95])
def test_a_row_is_dropped_if_it_is_above_the_threshold_with_an_earlier_kept_row(
    vectors, chunk, threshold, monkeypatch
):
    monkeypatch.setattr(mining, "ROWS_AT_A_TIME", chunk)
    scores = clear_scores(vectors, threshold)
    assert_duplicates(deduplicate(vectors, threshold), scores, threshold)


@each_chunk
@pytest.mark.parametrize("threshold", [-1, -0.5, 0, 0.5, 1])
def test_a_duplicate_is_strictly_above_the_threshold(chunk, threshold, monkeypatch):
    monkeypatch.setattr(mining, "ROWS_AT_A_TIME", chunk)
    vectors = crossing_vectors()
    assert_duplicates(deduplicate(vectors, threshold), dense(vectors), threshold)


def test_likeness_is_not_passed_on():
    angles = np.radians([0, 20, 40, 50])
    found = deduplicate(np.stack([np.cos(angles), np.sin(angles)], axis=1), np.cos(np.radians(25)))
    np.testing.assert_array_equal(found.first, [0, 0, 2, 2])
    np.testing.assert_array_equal(found.kept, [0, 2])


def test_groups_hold_each_kept_row_with_those_it_stands_for():
    vectors = CLUSTERED["clustered1"]
    found = deduplicate(vectors, 0.8)
    groups = found.groups()
    assert [group[0] for group in groups] == [
        row for row in found.kept if np.count_nonzero(found.first == row) > 1
    ]
    for group in groups:
        np.testing.assert_array_equal(group, np.flatnonzero(found.first == group[0]))


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_have_no_duplicates(rows):
    found = deduplicate(np.ones((rows, 4)), 0.5)
    np.testing.assert_array_equal(found.kept, np.arange(rows))
    np.testing.assert_array_equal(found.first, np.arange(rows))
    assert found.groups() == []


def test_memory_is_bounded_where_all_rows_are_alike(monkeypatch):
    monkeypatch.setattr(mining, "ROWS_AT_A_TIME", 100)
    shapes = []
    real = mining.similarity_matrix

    def watched(*arguments, **options):
        matrix = real(*arguments, **options)
        shapes.append(matrix.nnz)
        return matrix

    monkeypatch.setattr(mining, "similarity_matrix", watched)
    assert len(deduplicate(np.ones((2000, 3)), 0.9).kept) == 1
    assert max(shapes) <= 100 * 100


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
@pytest.mark.parametrize("min_size", [1, 2, 5, 10, 500])
def test_communities_are_those_of_the_definition(vectors, threshold, min_size):
    scores = clear_scores(vectors, threshold)
    assert_communities(communities(vectors, threshold, min_size), scores, threshold, min_size)


@pytest.mark.parametrize("threshold", [-0.5, 0, 0.5, 1])
@pytest.mark.parametrize("min_size", [1, 3, 11])
def test_a_community_reaches_as_far_as_the_threshold_itself(threshold, min_size):
    vectors = crossing_vectors()
    scores = dense(vectors)
    found = communities(vectors, threshold, min_size)
    assert_communities(found, scores, threshold, min_size)
    for rows in found:  # exact scores: ties have one right order
        rest = rows[1:]
        np.testing.assert_array_equal(rest, rest[np.lexsort((rest, -scores[rows[0], rest]))])


def test_a_centre_comes_first_even_where_it_is_no_closer_than_others():
    found = communities([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], -0.5, 1)
    assert [rows.tolist() for rows in found] == [[2, 0, 1]]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows_are_a_community_where_that_is_enough(rows):
    found = communities(np.ones((rows, 4)), 0.5, 2)
    assert [group.tolist() for group in found] == ([[0, 1]] if rows == 2 else [])


@pytest.mark.parametrize("threshold", [-1, -1.5, 1.01, float("nan")])
def test_communities_refuse_a_threshold_without_meaning(threshold):
    with pytest.raises(ValueError, match="threshold must be above -1 and at most 1, got"):
        communities(np.ones((3, 4)), threshold)


def test_a_community_has_a_row():
    with pytest.raises(ValueError, match="min_size must be at least 1, got 0"):
        communities(np.ones((3, 4)), min_size=0)


# components


def reachable(scores, threshold):
    """Which rows a chain of pairs connects, by squaring until nothing is new."""
    reach = (scores > threshold) | np.eye(len(scores), dtype=bool)
    while ((wider := reach.astype(int) @ reach > 0) != reach).any():
        reach = wider
    return reach


@each_set
@pytest.mark.parametrize("threshold", [-0.5, 0.6, 0.8, 0.9, 0.99])
def test_components_are_what_chains_connect(vectors, threshold):
    reach = reachable(clear_scores(vectors, threshold), threshold)
    labels = components(vectors, threshold)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels[:, None] == labels, reach)
    firsts = np.unique(labels, return_index=True)[1]
    assert (np.diff(firsts) > 0).all()  # numbered by first row
    assert set(labels.tolist()) == set(range(len(firsts)))


@pytest.mark.parametrize("threshold", [-1, 0, 0.5, 1])
def test_only_pairs_strictly_above_the_threshold_connect(threshold):
    vectors = crossing_vectors()
    labels = components(vectors, threshold)
    np.testing.assert_array_equal(labels[:, None] == labels, reachable(dense(vectors), threshold))


@each_set
@pytest.mark.parametrize("min_size", [1, 2, 8])
def test_component_groups_are_the_components_largest_first_centre_first(vectors, min_size):
    labels = components(vectors, 0.8)
    sizes = np.bincount(labels)
    groups = component_groups(vectors, 0.8, min_size)
    wanted = [label for label in np.argsort(-sizes, kind="stable") if sizes[label] >= min_size]
    assert [labels[group[0]] for group in groups] == wanted
    wide = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(norms > 0, norms, 1)
    for label, group in zip(wanted, groups, strict=True):
        assert sorted(group.tolist()) == np.flatnonzero(labels == label).tolist()
        assert (np.diff(unit[group] @ unit[group].mean(axis=0)) <= NEAR).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_are_connected_to_nothing(rows):
    np.testing.assert_array_equal(components(np.ones((rows, 4)), 0.5), np.zeros(rows))
    assert [group.tolist() for group in component_groups(np.ones((rows, 4)))] == [[0]] * rows


# what cannot be used


@pytest.mark.parametrize("use", [deduplicate, communities, components, component_groups])
def test_values_that_are_not_finite_are_named(use):
    vectors = CLUSTERED["clustered0"].copy()
    vectors[11, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity, first in row 11"):
        use(vectors)


@pytest.mark.parametrize("use", [deduplicate, components, component_groups])
@pytest.mark.parametrize("threshold", [-1.01, 1.01, float("nan")])
@pytest.mark.parametrize("rows", [0, 3])
def test_thresholds_are_cosines(use, threshold, rows):
    with pytest.raises(ValueError, match="threshold must be from -1 to 1, got"):
        use(np.ones((rows, 4)), threshold)


# strips and the best of them


@pytest.mark.parametrize("chunks", [(1, 1), (5, 3), (17, 1000), (1000, 17)])
@pytest.mark.parametrize("upper", [False, True])
def test_strips_cover_all_scores_once_in_chunks(chunks, upper):
    left = np.arange(23.0)[:, None]
    right = left if upper else np.arange(31.0)[:, None]
    sizes = []

    def score(a, b):
        sizes.append((len(a), len(b)))
        return a - b.T

    seen = np.full((len(left), len(right)), np.nan)
    for start, scores in score_chunks(left, right, score, chunks, upper=upper):
        first = start if upper else 0
        seen[start : start + len(scores), first:] = scores
    assert max(rows for rows, _ in sizes) <= chunks[0]
    assert max(columns for _, columns in sizes) <= chunks[1]
    wanted = left - right.T
    held = np.triu(np.ones(wanted.shape, bool)) if upper else np.ones(wanted.shape, bool)
    np.testing.assert_array_equal(seen[held], wanted[held])


def test_strips_stay_small(monkeypatch):
    monkeypatch.setattr(mining, "CHUNK_BYTES", 4 * 50 * 3)
    heights = [len(s) for _, s in score_chunks(np.ones((10, 2)), np.ones((50, 2)), _dot, (99, 99))]
    assert heights == [3, 3, 3, 1]


def _dot(a, b):
    return a @ b.T


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda a, b: (a @ b.T)[:, :1], r"must return \(4, 6\) numbers, got shape \(4, 1\)$"),
        (lambda a, b: a @ b.T * np.nan, r"must return \(4, 6\) numbers, .* with NaN$"),
    ],
)
def test_a_score_function_that_returns_something_else_is_named(score, message):
    with pytest.raises(ValueError, match=message):
        list(score_chunks(np.ones((4, 2)), np.ones((6, 2)), score, (10, 10)))


@pytest.mark.parametrize("chunks", [(0, 5), (5, -1)])
def test_chunks_are_positive(chunks):
    with pytest.raises(ValueError, match="chunk sizes must be positive"):
        list(score_chunks(np.ones((4, 2)), np.ones((6, 2)), _dot, chunks))


few_values = st.integers(-1, 1).map(float)  # ties abound


@quietly
@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=few_values)
)
def test_the_best_of_rows_are_those_of_a_stable_sort(scores):
    for k in range(1, scores.shape[1] + 1):
        columns, best = best_of_rows(scores, k)
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(columns, expected)
        np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))


@quietly
@given(
    npst.arrays(np.float32, st.integers(2, 9).map(lambda n: (n, n)), elements=few_values),
    st.sampled_from([1, 2, 3, 5, 8, 40, None]),
    st.integers(1, 4),
    st.booleans(),
)
def test_the_best_pairs_are_the_best_of_all_pairs(scores, limit, step, as_strips):
    size = len(scores)
    left, right = np.triu_indices(size, 1)
    wanted = np.lexsort((right, left, -scores[left, right]))[:limit]
    best = BestPairs(limit)
    for start in range(0, size, step):
        if as_strips:
            best.add_upper(start, scores[start : start + step, start:], size)
        else:  # from the last to the first, some of them twice
            part = slice(max(0, len(left) - start * size), len(left))
            best.add((left * size + right)[part], scores[left, right][part])
    if not as_strips:
        best.add(left * size + right, scores[left, right])
    keys, kept = best.result()
    assert (np.diff(keys) > 0).all()
    assert dict(zip(keys.tolist(), kept.tolist(), strict=True)) == {
        int(left[i] * size + right[i]): float(scores[left[i], right[i]]) for i in wanted
    }


def test_best_pairs_hold_little_more_than_their_limit():
    best, rng = BestPairs(10), np.random.default_rng(0)
    for number in range(200):
        best.add(np.arange(50) + number * 50, rng.random(50))
        assert sum(len(keys) for keys, _ in best._parts) <= 20
