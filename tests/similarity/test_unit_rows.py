"""Unit rows are bitwise the same in memory and in tiles, for every number format and storage."""

from __future__ import annotations

import numpy as np
import pytest
from vector_sets import NEAR, SETS, as_format, on_disk, random_vectors, tiled

from onnxsim_embed.similarity.unit_rows import COMPONENT_BYTES, UnitRows, unit_vectors

CLUSTERED = SETS["clustered"]  # with zero rows

each_tile = pytest.mark.parametrize("rows", [1, 5, 17])


def load_all(units):
    return np.concatenate([units.load(tile) for tile in units.tiles()])


@each_tile
@pytest.mark.filterwarnings("ignore:.*compared as numbers")
@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64, ">f4"]
)
def test_tiles_are_bitwise_the_rows_in_memory(tmp_path, dtype, rows):
    vectors = on_disk(as_format(CLUSTERED, dtype), tmp_path / "v.npy")
    before = vectors.copy()
    units, unit = tiled(vectors, rows), unit_vectors(vectors)
    assert not units.in_memory
    assert [tile.stop - tile.start for tile in units.tiles()][:2] == [rows, rows]
    np.testing.assert_array_equal(load_all(units), unit, strict=True)
    assert unit.dtype == np.float32
    some = np.array([3, 5, 50, 82, 3])
    np.testing.assert_array_equal(units.take(some), unit[some])
    np.testing.assert_array_equal(UnitRows(vectors).take(some), unit[some])
    np.testing.assert_array_equal(vectors, before)


@each_tile
def test_the_diagonal_is_one_except_for_zero_rows(rows):
    expected = CLUSTERED.any(axis=1).astype(np.float32)
    for units in (UnitRows(CLUSTERED), tiled(CLUSTERED, rows)):
        np.testing.assert_array_equal(units.diagonal(-1), expected, strict=True)
        np.testing.assert_array_equal(units.diagonal(0), np.where(expected > 0, 1, np.nan))
        assert np.isnan(units.diagonal(1)).all()


def test_tiles_start_and_stop_anywhere():
    for start, stop, expected in (
        (0, None, [(0, 17), (17, 34), (34, 51), (51, 68), (68, 83)]),
        (10, 30, [(10, 27), (27, 30)]),
        (9, 9, []),
    ):
        tiles = tiled(CLUSTERED, 17).tiles(start, stop)
        assert [(tile.start, tile.stop) for tile in tiles] == expected


def test_rows_that_fit_are_loaded_once():
    size = CLUSTERED.size * COMPONENT_BYTES
    for max_bytes, fits in ((None, True), (2 * size, True), (2 * size - 1, False), (0, False)):
        units = UnitRows(CLUSTERED, max_bytes)
        assert units.in_memory is fits
        assert np.shares_memory(*(units.load(slice(0, stop)) for stop in (5, 9))) is fits
    assert UnitRows(CLUSTERED, 0).tile_rows == 1


def test_normalized_rows_are_used_as_they_are():
    unit = unit_vectors(CLUSTERED)
    assert UnitRows(unit, normalized=True).load(slice(0, len(unit))).base is unit


@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (3, 0)])
def test_sets_without_rows_or_components(shape):
    for max_bytes in (None, 1):
        units = UnitRows(np.zeros(shape, np.float32), max_bytes)
        assert units.take(np.zeros(0, np.int64)).shape == (0, shape[1])
        np.testing.assert_array_equal(units.diagonal(-1), np.zeros(shape[0], np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@each_tile
def test_errors_name_the_row_of_the_set(value, rows):
    vectors = CLUSTERED.copy()
    vectors[[23, 60], 2] = value
    units = tiled(vectors, rows)
    for use in (
        lambda: load_all(units),
        lambda: units.diagonal(0),
        lambda: units.take(np.array([4, 60])),  # not as row 1, nor as row 60
        lambda: UnitRows(vectors),
    ):
        with pytest.raises(ValueError, match=r"row 23$"):
            use()
    with pytest.raises(ValueError, match=r"row 60$"):
        units.load(slice(60, 61))
    np.testing.assert_array_equal(units.take(np.array([4, 59])), unit_vectors(CLUSTERED)[[4, 59]])


def test_threads_normalize_large_sets_to_the_same_bits():
    vectors = random_vectors(9000, 8)
    unit = unit_vectors(vectors)
    np.testing.assert_array_equal(unit[8000:8100], unit_vectors(vectors[8000:8100]))
    np.testing.assert_allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1, atol=NEAR)
