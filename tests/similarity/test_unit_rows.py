"""Unit vectors are the same whole and in tiles, whatever their number format and wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest
from test_compare import SETS

from onnxsim_embed.similarity.unit_rows import COMPONENT_BYTES, UnitRows, unit_vectors

FORMATS = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64, ">f4"]
CLUSTERED = SETS["clustered"]  # with zero rows

each_format = pytest.mark.parametrize("dtype", FORMATS)
each_panel = pytest.mark.parametrize("rows", [1, 5, 17])


def as_format(vectors, dtype):
    """The vectors in a number format; whole numbers from -100 to 100, or 0 to 200, in integers."""
    kind = np.dtype(dtype).kind
    if kind == "f":
        return vectors.astype(dtype)
    return (np.rint(vectors * 100 / np.abs(vectors).max()) + 100 * (kind == "u")).astype(dtype)


def on_disk(vectors, path):
    np.save(path, vectors)
    return np.load(path, mmap_mode="r")


def in_panels(vectors, rows):
    """The set with room for two tiles of so many rows."""
    return UnitRows(vectors, 2 * rows * COMPONENT_BYTES * max(1, vectors.shape[1]))


def all_of(units):
    return np.concatenate([units.load(tile) for tile in units.tiles()])


@each_format
@each_panel
def test_panels_make_up_the_whole(tmp_path, dtype, rows):
    vectors = on_disk(as_format(CLUSTERED, dtype), tmp_path / "v.npy")
    units = in_panels(vectors, rows)
    assert not units.in_memory
    assert [tile.stop - tile.start for tile in units.tiles()][:2] == [rows, rows]
    whole = unit_vectors(vectors)
    np.testing.assert_array_equal(all_of(units), whole, strict=True)
    assert whole.dtype == np.float32
    some = np.array([3, 5, 50, 82, 3])
    np.testing.assert_array_equal(units.take(some), whole[some])
    np.testing.assert_array_equal(UnitRows(vectors).take(some), whole[some])


@each_panel
def test_the_diagonal_is_one_but_for_zero_rows(rows):
    expected = CLUSTERED.any(axis=1).astype(np.float32)
    for units in (UnitRows(CLUSTERED), in_panels(CLUSTERED, rows)):
        np.testing.assert_array_equal(units.diagonal(-1), expected, strict=True)
        np.testing.assert_array_equal(units.diagonal(0), np.where(expected > 0, 1, np.nan))
        assert np.isnan(units.diagonal(1)).all()


@pytest.mark.parametrize(
    ("start", "stop", "tiles"),
    [
        (0, None, [(0, 17), (17, 34), (34, 51), (51, 68), (68, 83)]),
        (10, 30, [(10, 27), (27, 30)]),
        (80, None, [(80, 83)]),
        (9, 9, []),
    ],
)
def test_panels_may_begin_and_end_anywhere(start, stop, tiles):
    found = in_panels(CLUSTERED, 17).tiles(start, stop)
    assert [(tile.start, tile.stop) for tile in found] == tiles


def test_what_fits_is_loaded_once():
    size = CLUSTERED.size * COMPONENT_BYTES
    for room, whole in ((None, True), (2 * size, True), (2 * size - 1, False), (0, False)):
        units = UnitRows(CLUSTERED, room)
        assert units.in_memory is whole
        assert np.shares_memory(*(units.load(slice(0, stop)) for stop in (5, 9))) is whole
    assert UnitRows(CLUSTERED, 0).tile_rows == 1  # a row is the least


def test_a_panel_leaves_its_input_alone():
    vectors = CLUSTERED.copy()
    all_of(in_panels(vectors, 5))
    np.testing.assert_array_equal(vectors, CLUSTERED)


@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (3, 0)])
def test_sets_without_rows_or_components(shape):
    for room in (None, 1):
        units = UnitRows(np.zeros(shape, np.float32), room)
        assert units.take(np.zeros(0, np.int64)).shape == (0, shape[1])
        np.testing.assert_array_equal(units.diagonal(-1), np.zeros(shape[0], np.float32))
        assert units.in_memory or shape == (3, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@each_panel
def test_a_row_that_is_not_finite_is_named_by_its_place_in_the_set(value, rows):
    vectors = CLUSTERED.copy()
    vectors[[23, 60], 2] = value
    units = in_panels(vectors, rows)
    for use in (
        lambda: all_of(units),
        lambda: units.diagonal(0),
        lambda: units.take(np.array([4, 60])),  # not as row 1, nor as row 60
        lambda: UnitRows(vectors),
    ):
        with pytest.raises(ValueError, match=r"NaN or infinity, first in row 23$"):
            use()
    with pytest.raises(ValueError, match=r"first in row 60$"):
        units.load(slice(60, 61))
    np.testing.assert_array_equal(units.take(np.array([4, 59])), unit_vectors(CLUSTERED)[[4, 59]])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones(3), r"shape \(n, dim\), got \(3,\)"),
        (np.ones((2, 2), complex), "must be numbers, got dtype complex128"),
        ([["a"]], "must be numbers, got dtype <U1"),
    ],
)
def test_what_is_no_set_of_vectors_is_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        UnitRows(vectors, 10)
