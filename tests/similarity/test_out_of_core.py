"""Sets larger than memory give bitwise the results of the in-memory comparison."""

from __future__ import annotations

from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from vector_sets import SETS, as_format, assert_same, clustered_vectors, on_disk, tiled

from onnxsim_embed.similarity import nearest, tiles, trial
from onnxsim_embed.similarity.candidates import Float32Scorer, Int8Scorer, int8_scoring_supported
from onnxsim_embed.similarity.compare import (
    closest_pairs,
    neighbours,
    similar_pairs,
    similarity_matrix,
    top_k,
)
from onnxsim_embed.similarity.out_of_core import AllPairs
from onnxsim_embed.similarity.sparse import build_matrix
from onnxsim_embed.similarity.unit_rows import UnitRows, unit_vectors

pytestmark = pytest.mark.usefixtures("one_thread")

TILE = 2000
OTHER = clustered_vectors(31, seed=3)

each_set = pytest.mark.parametrize("vectors", SETS.values(), ids=SETS)
each_tile = pytest.mark.parametrize("rows", [1, 5, 17])


def few(vectors, rows):
    """As much of a set as is twelve tiles: single rows make many comparisons."""
    return vectors[: 12 * rows]


def alone(vectors, rows=None):
    """A comparison of a set with itself, in tiles of so many rows or in memory."""
    units = UnitRows(vectors) if rows is None else tiled(vectors, rows)
    return AllPairs(units, units, TILE)


def above(pairs, threshold, **options):
    return build_matrix(pairs.above(threshold, **options), pairs.right.rows)


def best(pairs, k, **options):
    return pairs.top_k(k, **options)


# comparisons


@each_set
@each_tile
@pytest.mark.parametrize("threshold", [-1, 0.3, 1])
def test_pairs_above_a_threshold_are_the_same(vectors, rows, threshold):
    vectors, some = few(vectors, rows), slice(4, 11)
    in_memory, tiles = alone(vectors), alone(vectors, rows)
    for upper in (True, False):
        expected = above(in_memory, threshold, upper=upper)
        assert_same(above(tiles, threshold, upper=upper), expected)
        for pairs in (in_memory, tiles):
            assert_same(above(pairs, threshold, upper=upper, rows=some), expected[some])


@each_set
@each_tile
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_the_top_k_are_the_same(vectors, rows, k):  # of crossing vectors, most are ties
    vectors, some = few(vectors, rows), slice(4, 11)
    in_memory, tiles = alone(vectors), alone(vectors, rows)
    k = min(k, len(vectors) - 1)
    for skip_self in (True, False):
        expected = best(in_memory, k, skip_self=skip_self)
        assert_same(best(tiles, k, skip_self=skip_self), expected)
        for pairs in (in_memory, tiles):
            top = best(pairs, k, skip_self=skip_self, rows=some)
            assert_same(top, [values[some] for values in expected])


@pytest.mark.parametrize(("left", "right"), [(None, 5), (1, 1), (5, 17), (17, 5), (17, None)])
def test_two_sets_give_the_same(left, right):
    one, other = (few(x, min(left or 5, right or 5)) for x in (SETS["clustered"], OTHER))
    in_memory = AllPairs(UnitRows(one), UnitRows(other), TILE)
    tiles = AllPairs(
        UnitRows(one) if left is None else tiled(one, left),
        UnitRows(other) if right is None else tiled(other, right),
        TILE,
    )
    assert_same(above(tiles, 0.3, upper=False), above(in_memory, 0.3, upper=False))
    for k in (1, 7, len(other)):
        assert_same(best(tiles, k, skip_self=False), best(in_memory, k, skip_self=False))


@pytest.mark.parametrize("rows", [None, 3])
def test_an_empty_set_leaves_the_shape_of_the_other(rows):
    one, none = SETS["random"], UnitRows(SETS["random"][:0])
    units = UnitRows(one) if rows is None else tiled(one, rows)
    assert above(AllPairs(units, none, TILE), 0, upper=False).shape == (len(one), 0)
    assert above(AllPairs(none, units, TILE), 0, upper=False).shape == (0, len(one))


@each_tile
def test_pairs_are_reported_as_soon_as_they_are_found(rows):
    """A tile's chunks are complete only after all columns; a memory limit must not wait for that."""
    vectors = few(SETS["clustered"], rows)
    for pairs in (alone(vectors), alone(vectors, rows)):
        found, yielded = [], 0
        for chunk in pairs.above(0, upper=True, on_pairs=found.append):
            yielded += len(chunk.scores)
            assert sum(len(part.scores) for part in found) >= yielded
        assert yielded == above(pairs, 0, upper=True).nnz

    class FullError(Exception):
        pass

    def stop(part):
        if len(part.scores):
            raise FullError

    with pytest.raises(FullError):
        next(alone(np.ones((40, 3)), 10).above(0, upper=True, on_pairs=stop))


# chunks of rows, as tasks on a cluster take them


@settings(deadline=None, database=None, max_examples=25)
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 3)),
        elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),  # of which most are ties
    ),
    st.integers(1, 5),
    st.sampled_from([-1.0, 0.0, 0.4]),
    st.integers(1, 9),
    st.booleans(),
)
def test_chunks_of_rows_give_together_what_all_give(vectors, height, threshold, k, flag):
    pairs, in_memory = alone(vectors, height), alone(vectors)
    chunks = pairs.left.tiles()
    found = [pairs.above(threshold, upper=flag, rows=rows) for rows in chunks]
    matrix = build_matrix(chain.from_iterable(found), len(vectors))
    assert_same(matrix, above(in_memory, threshold, upper=flag))
    if k := min(k, len(vectors) - flag):
        top = [pairs.top_k(k, skip_self=flag, rows=rows) for rows in chunks]
        merged = map(np.vstack, zip(*top, strict=True))
        assert_same(merged, best(in_memory, k, skip_self=flag))


@pytest.mark.parametrize(
    "compare_all",
    [lambda pairs: above(pairs, 0.4, upper=True), lambda pairs: best(pairs, 6, skip_self=True)],
    ids=["above", "top_k"],
)
def test_the_scorer_is_chosen_once_for_all_tiles(monkeypatch, compare_all):
    trials, products = [], []

    class Counted(Float32Scorer):
        def scores(self, *tile):
            products.append(tile)
            return super().scores(*tile)

    monkeypatch.setattr(tiles, "choose_scorer", lambda *_, **__: trials.append(1) or Counted)
    pairs = alone(SETS["clustered"], 17)
    result = compare_all(pairs)
    assert len(trials) == 1
    assert len(products) > len(list(pairs.left.tiles()))
    assert_same(result, compare_all(alone(SETS["clustered"])))


@pytest.mark.parametrize(("pair", "kinds", "dim"), [(0, (2, 1), 8), (1, (1, 2), 48)])
def test_the_scorer_of_least_estimated_time_is_chosen(monkeypatch, pair, kinds, dim):
    """Seconds of a pair's score, and of a product in float32 and int8; six axes hold the energy."""
    seconds, threshold = iter((pair * 2048, kinds[1])), 0.1
    clock = SimpleNamespace(thread_time=iter((0, kinds[0])).__next__)
    monkeypatch.setattr(trial, "time", clock)
    for name in ("MIN_PAIRS", "MIN_ROWS", "PREFIX_PAIRS"):
        monkeypatch.setattr(trial, name, 1)
    monkeypatch.setattr(trial, "_seconds", lambda run: next(seconds))
    scale = np.where(np.arange(48) < 6, 1, 1e-3)
    vectors = np.random.default_rng(0).standard_normal((1100, 48)) * scale
    pairs = alone(vectors.astype(np.float32), 550)
    result = above(pairs, threshold, upper=True)
    scorer = pairs._make_scorer(vectors, vectors)
    assert scorer._left.shape == (1100, dim)
    assert isinstance(scorer, Int8Scorer) == (pair == 0 and int8_scoring_supported(48))
    monkeypatch.undo()
    assert_same(result, above(alone(vectors), threshold, upper=True))


@pytest.mark.parametrize("rows", [None, 552])
@pytest.mark.parametrize("other", [False, True])
def test_the_top_k_by_prefixes_are_the_same(monkeypatch, rows, other):
    rng, rotations = np.random.default_rng(0), []
    clusters = rng.standard_normal((138, 48)) * np.where(np.arange(48) < 6, 1, 1e-3)
    vectors = np.repeat(clusters, 8, axis=0) + rng.normal(0, 1e-4, (1104, 48))

    class Recorded(trial.PrefixRotation):
        def __init__(self, axes, dim):
            rotations.append(dim)
            super().__init__(axes, dim)

    def nearest_rows():
        units = UnitRows(vectors) if rows is None else tiled(vectors, rows)
        right = UnitRows(vectors[::-1]) if other else units
        return best(AllPairs(units, right, 1 << 16), 5, skip_self=not other)

    expected = nearest_rows()
    for module, name in [(trial, "MIN_ROWS"), (trial, "PREFIX_PAIRS"), (nearest, "PREFIX_PAIRS")]:
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(trial, "MIN_PAIRS", 1)
    monkeypatch.setattr(trial._Trial, "_cost", lambda self, share, *_: share)
    monkeypatch.setattr(trial, "PrefixRotation", Recorded)
    assert_same(nearest_rows(), expected)
    assert rotations


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("kind", [Float32Scorer, Int8Scorer])
def test_candidates_by_prefixes_are_scored_for_several_heights_at_once(monkeypatch, upper, kind):
    if kind is Int8Scorer and not int8_scoring_supported(48):
        pytest.skip("int8 products saturate on this processor")
    monkeypatch.setattr(tiles, "available_cpus", lambda: 1)
    monkeypatch.setattr(tiles, "CHUNKS_PER_CPU", 1)
    rows = unit_vectors(np.repeat(np.random.default_rng(0).standard_normal((350, 48)), 2, axis=0))
    rotated = partial(kind, rotation=trial.PrefixRotation(trial.principal_axes(rows), 12))
    whole, prefixes = (
        list(tiles.TiledComparison(rows, rows, 4 * 64 * 64, make).above(0.3, upper=upper))
        for make in (kind, rotated)
    )
    assert [len(pairs.counts) for pairs in whole] == [64] * 10 + [60]
    assert [len(pairs.counts) for pairs in prefixes] == [256, 256, 188]
    assert_same(build_matrix(prefixes, len(rows)), build_matrix(whole, len(rows)))


# public functions


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
        closest_pairs(vectors, 20, **options),
    ]


@pytest.mark.filterwarnings("ignore:.*compared as numbers")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
@pytest.mark.parametrize("mapped", [False, True], ids=["array", "memmap"])
def test_public_functions_do_not_depend_on_memory(tmp_path, monkeypatch, dtype, mapped):
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
