"""Sets that memory does not hold give bit for bit what they give in one go."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from test_compare import SETS, assert_above, clustered_vectors, dense
from test_unit_rows import as_format, in_panels, on_disk

from onnxsim_embed.similarity import compare as similarity
from onnxsim_embed.similarity import scoring as blocks
from onnxsim_embed.similarity.candidates import Float32Scorer, Int8Scorer, int8_scoring_supported
from onnxsim_embed.similarity.compare import (
    closest_pairs,
    neighbours,
    similar_pairs,
    similarity_matrix,
    top_k,
)
from onnxsim_embed.similarity.out_of_core import AllPairs, merge_top_k
from onnxsim_embed.similarity.scoring import TiledComparison
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import UnitRows
from onnxsim_embed.system import threads

BLOCK = 2000
OTHER = clustered_vectors(seed=3, rows=31)


# Panels of a row or two are many searches: without threads and limits on BLAS, each takes a fifteenth.
@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "available_cpus", lambda: 1)
        patch.setattr(threads, "single_blas_thread", nullcontext)
        yield


each_set = pytest.mark.parametrize("vectors", SETS.values(), ids=SETS)
each_panel = pytest.mark.parametrize("rows", [1, 5, 17])
each_threshold = pytest.mark.parametrize("threshold", [-1, 0.3, 1])
needs_int8 = pytest.mark.skipif(
    not int8_scoring_supported(24), reason="int8 products saturate here"
)


def few(vectors, rows):
    """The set, or as much of it as is twelve tiles: single rows make for many searches."""
    return vectors[: 12 * rows]


def alone(vectors, rows=None):
    """A comparison of a set with itself, in tiles of so many rows or in one go."""
    units = UnitRows(vectors) if rows is None else in_panels(vectors, rows)
    return AllPairs(units, units, BLOCK)


def above(pairs, threshold, **options):
    return build_matrix(pairs.above(threshold, **options), pairs.right.rows)


def best(pairs, k, **options):
    parts = list(pairs.top_k(k, **options))
    return [np.concatenate([getattr(part, name) for part in parts]) for name in parts[0]._fields]


def assert_same(ours, theirs):
    """Assert that matrices, or tuples of arrays, are equal to the bit."""
    names = ("data", "indices", "indptr")
    if hasattr(ours, "indptr"):
        assert ours.shape == theirs.shape
        ours, theirs = ([getattr(x, name) for name in names] for x in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


# comparisons


@each_set
@each_panel
@each_threshold
def test_the_pairs_above_a_threshold_are_the_same(vectors, rows, threshold):
    vectors = few(vectors, rows)
    whole, tiles = alone(vectors), alone(vectors, rows)
    for upper in (True, False):
        expected = above(whole, threshold, upper=upper)
        assert_same(above(tiles, threshold, upper=upper), expected)
        some = slice(4, 11)
        part = above(tiles, threshold, upper=upper, rows=some)
        assert_same(part, above(whole, threshold, upper=upper, rows=some))
        assert_same(part, expected[some])


@each_set
@each_panel
@pytest.mark.parametrize("k", [1, 4, 30])
def test_the_k_best_are_the_same(vectors, rows, k):  # of crossing vectors, most are ties
    vectors = few(vectors, rows)
    whole, tiles = alone(vectors), alone(vectors, rows)
    k = min(k, len(vectors) - 1)
    for skip_self in (True, False):
        expected = best(whole, k, skip_self=skip_self)
        assert_same(best(tiles, k, skip_self=skip_self), expected)
        some = slice(4, 11)
        part = best(tiles, k, skip_self=skip_self, rows=some)
        assert_same(part, [values[some] for values in expected])


@each_set
def test_all_others_are_the_best_of_each_row(vectors):
    k = len(vectors) - 1
    expected = best(alone(vectors), k, skip_self=True)
    assert_same(best(alone(vectors, 5), k, skip_self=True), expected)


@pytest.mark.parametrize("left", [None, 1, 5, 17])
@pytest.mark.parametrize("right", [None, 1, 5, 17])
def test_two_sets_give_the_same(left, right):
    one, other = (
        few(vectors, min(left or 5, right or 5)) for vectors in (SETS["clustered"], OTHER)
    )
    whole = AllPairs(UnitRows(one), UnitRows(other), BLOCK)
    tiles = AllPairs(
        UnitRows(one) if left is None else in_panels(one, left),
        UnitRows(other) if right is None else in_panels(other, right),
        BLOCK,
    )
    assert_same(above(tiles, 0.3, upper=False), above(whole, 0.3, upper=False))
    for k in (1, 7, len(other)):
        assert_same(best(tiles, k, skip_self=False), best(whole, k, skip_self=False))


@pytest.mark.parametrize("rows", [None, 3])
def test_a_set_without_rows_leaves_the_shape_of_the_other(rows):
    one, none = SETS["random"], UnitRows(SETS["random"][:0])
    units = UnitRows(one) if rows is None else in_panels(one, rows)
    assert above(AllPairs(units, none, BLOCK), 0, upper=False).shape == (len(one), 0)
    assert above(AllPairs(none, units, BLOCK), 0, upper=False).shape == (0, len(one))


@each_panel
def test_pairs_are_seen_when_they_are_found(rows):
    """A tile's strips are whole only after all columns: a limit of memory must not wait for that."""
    vectors, seen = few(SETS["clustered"], rows), []
    for pairs in (alone(vectors), alone(vectors, rows)):
        given = 0
        for part in pairs.above(0, upper=True, on_pairs=lambda part: seen.append(len(part.scores))):
            given += len(part.scores)
            assert sum(seen) >= given
        assert sum(seen) == given == above(pairs, 0, upper=True).nnz
        seen.clear()

    class FullError(Exception):
        pass

    def stop(part):
        if len(part.scores):
            raise FullError

    with pytest.raises(FullError):
        next(alone(np.ones((40, 3)), 10).above(0, upper=True, on_pairs=stop))


# some columns at a time


def groups_of(tiles, height, rows):
    """Columns in groups of so many tiles, as slices."""
    step = tiles * height
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def entries(parts, first):
    """Row, column and score of each pair of several searches of the same rows, sorted."""
    found = []
    for part in parts:
        row = first
        for each in part:
            rows = np.repeat(np.arange(row, row + len(each.counts)), each.counts)
            found += zip(rows.tolist(), each.columns.tolist(), each.scores.tolist(), strict=True)
            row += len(each.counts)
    return sorted(found)


def merged(parts, k):
    """The k best of what several searches of the same rows found."""
    whole = [[np.concatenate([getattr(x, name) for x in part]) for name in ("scores", "indices")]
             for part in map(list, parts)]  # fmt: skip
    return merge_top_k(np.hstack([x[0] for x in whole]), np.hstack([x[1] for x in whole]), k)


@settings(deadline=None, database=None, max_examples=25)
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 3)),
        elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),  # of which most are ties
    ),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([-1.0, 0.0, 0.4]),
    st.integers(1, 9),
    st.booleans(),
)
def test_groups_of_columns_give_together_what_all_give(vectors, height, step, threshold, k, flag):
    pairs, n = alone(vectors, height), len(vectors)
    groups = groups_of(step, height, n)
    for rows in groups_of(1, height, n):
        parts = [pairs.above(threshold, upper=flag, rows=rows, columns=c) for c in groups]
        expected = pairs.above(threshold, upper=flag, rows=rows)
        assert entries(parts, rows.start) == entries([expected], rows.start)
        found = merged((pairs.top_k(k, skip_self=flag, rows=rows, columns=c) for c in groups), k)
        assert found[0].shape[1] == min(k, n - flag)
        if found[0].shape[1]:
            whole = pairs.top_k(found[0].shape[1], skip_self=flag, rows=rows)
            assert_same(found, merged([whole], k))


@each_set
@pytest.mark.parametrize("step", [1, 2, 12])
def test_groups_of_columns_give_what_one_go_gives(vectors, step):
    vectors = few(vectors, 5)
    whole, pairs = alone(vectors), alone(vectors, 5)
    n, k = len(vectors), 7
    groups = groups_of(step, 5, n)
    for upper in (True, False):
        parts = [pairs.above(0.3, upper=upper, columns=columns) for columns in groups]
        assert entries(parts, 0) == entries([whole.above(0.3, upper=upper)], 0)
    expected = best(whole, k, skip_self=True)
    for rows in groups_of(1, 5, n):
        parts = (pairs.top_k(k, skip_self=True, rows=rows, columns=columns) for columns in groups)
        assert_same(merged(parts, k), [values[rows] for values in expected])


def test_columns_before_the_rows_hold_no_pairs_beyond_them():
    pairs = alone(SETS["clustered"][:20], 5)
    rows, columns = slice(10, 15), slice(0, 10)
    found = list(pairs.above(-1, upper=True, rows=rows, columns=columns))
    assert sum(len(part.counts) for part in found) == 5
    assert sum(len(part.scores) for part in found) == 0


def test_groups_of_columns_of_another_set():
    one, other = SETS["clustered"][:23], OTHER
    whole = AllPairs(UnitRows(one), UnitRows(other), BLOCK)
    pairs = AllPairs(in_panels(one, 4), in_panels(other, 3), BLOCK)
    groups = groups_of(2, 3, len(other))
    parts = [pairs.above(0.2, upper=False, columns=columns) for columns in groups]
    assert entries(parts, 0) == entries([whole.above(0.2, upper=False)], 0)
    parts = (pairs.top_k(4, skip_self=False, columns=columns) for columns in groups)  # of 6 and 1
    assert_same(merged(parts, 4), best(whole, 4, skip_self=False))


# the kind of scorer scores


@needs_int8
@pytest.mark.parametrize("search", ["above", "best"])
@pytest.mark.parametrize("rows", [17])
def test_int8_rough_scores_are_chosen_once_and_carried_on(monkeypatch, rows, search):
    asked, used = [], []

    def faster(self, run):
        asked.append(self)
        return True

    monkeypatch.setattr(TiledComparison, "_int8_is_faster", faster)
    keep = Int8Scorer.block
    monkeypatch.setattr(Int8Scorer, "block", lambda *args: used.append(1) or keep(*args))
    calls = {
        "above": lambda pairs: above(pairs, 0.4, upper=True),
        "best": lambda pairs: best(pairs, 6, skip_self=True),
    }
    vectors = SETS["clustered"]
    tiles = alone(vectors, rows)
    found = calls[search](tiles)
    assert len(asked) == 1
    assert len(used) > len(list(tiles.left.tiles()))
    monkeypatch.undo()
    assert_same(found, calls[search](alone(vectors)))


@needs_int8
@pytest.mark.parametrize(("step", "kind"), [(-1, Int8Scorer), (1, Float32Scorer)])
def test_the_first_panel_is_where_both_kinds_are_tried(monkeypatch, step, kind):
    """A clock on which each measurement takes less (or more) time than the one before."""
    times = (time for turn in count() for time in (0, 10 + step * turn))
    monkeypatch.setattr(blocks, "TRIAL_PAIRS", 1)
    monkeypatch.setattr(blocks, "TRIAL_CHUNKS", 2)
    monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    kinds = []
    made = TiledComparison.__init__

    def record(self, *arguments):
        made(self, *arguments)
        kinds.append(self.kind)

    monkeypatch.setattr(TiledComparison, "__init__", record)
    vectors = np.random.default_rng(0).standard_normal((1100, 8)).astype(np.float32)
    found = above(alone(vectors, 550), 0.9, upper=True)
    assert kinds == [None, None, kind, kind]  # the second is the trial's own
    monkeypatch.undo()
    assert_same(found, above(alone(vectors), 0.9, upper=True))


# through the public functions


def results(vectors, other=OTHER, **options):
    return [
        similarity_matrix(vectors, 0.4, **options),
        similarity_matrix(vectors, 0.1, include_self=False, **options),
        similarity_matrix(vectors, 0.4, other=other, **options),
        similarity_matrix(other, 0.4, other=vectors, **options),
        similar_pairs(vectors, 0.4, **options),
        similar_pairs(vectors, 0.4, other=other, **options),
        top_k(other, vectors, 10, **options),
        top_k(vectors, other, 3, **options),
        neighbours(vectors, 7, **options),
        closest_pairs(vectors, 20),
    ]


@pytest.fixture
def small_panels(monkeypatch):
    """Let every set be loaded in tiles of so many rows."""

    def force(rows):
        monkeypatch.setattr(
            similarity, "UnitRows", lambda vectors, room: in_panels(np.asarray(vectors), rows)
        )

    return force


@each_set
@each_panel
def test_the_public_functions_do_not_depend_on_panels(small_panels, vectors, rows):
    other = OTHER[:, : vectors.shape[1]]
    vectors, other = np.tile(vectors[: 5 * rows], (2, 1)), other[: 4 + rows]  # ties
    expected = results(vectors, other)
    small_panels(rows)
    for ours, theirs in zip(results(vectors, other, block_bytes=700), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
@pytest.mark.parametrize("mapped", [False, True], ids=["array", "memmap"])
def test_the_public_functions_do_not_depend_on_memory(tmp_path, monkeypatch, dtype, mapped):
    wide = np.tile(np.concatenate([SETS["clustered"], OTHER]), (1, 25))  # 3.6 kB a loaded row
    vectors, other = as_format(wide[:83], dtype), as_format(wide[83:], dtype)
    vectors[20:40] = vectors[0]  # ties
    expected = results(vectors, other)
    if mapped:
        vectors, other = on_disk(vectors, tmp_path / "v.npy"), on_disk(other, tmp_path / "o.npy")
    sizes, load = set(), UnitRows.load

    def watched(self, rows):
        sizes.add(self.tile_rows)
        return load(self, rows)

    monkeypatch.setattr(UnitRows, "load", watched)
    for ours, theirs in zip(results(vectors, other, max_memory=250_000), expected, strict=True):
        assert_same(ours, theirs)
    assert min(sizes) == 17


@each_panel
def test_a_row_that_is_not_finite_is_named_by_its_place_in_the_set(small_panels, rows):
    bad = SETS["clustered"].copy()
    bad[[23, 60], 2] = np.nan
    small_panels(rows)
    for use in (
        lambda: similarity_matrix(bad),
        lambda: similarity_matrix(OTHER, other=bad),
        lambda: similarity_matrix(bad, other=OTHER),
        lambda: similar_pairs(bad),
        lambda: top_k(OTHER, bad, 2),
        lambda: neighbours(bad, 2),
        lambda: closest_pairs(bad, 2),
    ):
        with pytest.raises(ValueError, match=r"NaN or infinity, first in row 23$"):
            use()


@settings(deadline=None, database=None, max_examples=30)
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 5)),
        elements=st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0]),
    ),
    st.floats(-1, 1),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_small_sets_of_any_values(vectors, threshold, rows, k):
    pairs, scores = alone(vectors, rows), dense(vectors)
    assert_above(above(pairs, threshold, upper=False), scores, np.float32(threshold))
    assert_same(above(pairs, threshold, upper=True), above(alone(vectors), threshold, upper=True))
    k = min(k, len(vectors))
    found = best(pairs, k, skip_self=False)
    np.testing.assert_allclose(found[0], -np.sort(-scores, axis=1)[:, :k], atol=1e-6)
