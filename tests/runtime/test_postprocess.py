"""Number formats equal sentence-transformers' quantize_embeddings, on the same floats."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsim_embed.runtime.options import RANGED
from onnxsim_embed.runtime.postprocess import quantize_vectors

BITS = ("binary", "ubinary")
FORMATS = ("float32", *RANGED, *BITS)


@pytest.fixture(scope="module")
def theirs():
    from sentence_transformers.util import quantize_embeddings

    return quantize_embeddings


def some_vectors(rows=150, dim=32, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


@pytest.mark.parametrize("dim", [32, 13])
@pytest.mark.parametrize("precision", FORMATS)
def test_a_format_equals_theirs(theirs, precision, dim):
    vectors = some_vectors(dim=dim)
    ours, expected = quantize_vectors(vectors, precision), theirs(vectors, precision)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("precision", RANGED)
def test_given_ranges_are_used_and_values_beyond_them_clipped(theirs, precision):
    vectors, calibration = some_vectors(), some_vectors(seed=1) / 2
    ranges = np.stack([calibration.min(axis=0), calibration.max(axis=0)])
    expected = theirs(vectors, precision, ranges=ranges)
    np.testing.assert_array_equal(quantize_vectors(vectors, precision, ranges), expected)
    limits = np.iinfo(expected.dtype)
    assert {expected.min(), expected.max()} == {limits.min, limits.max}


@pytest.mark.parametrize("precision", RANGED)
def test_with_ranges_a_row_alone_equals_the_row_in_company(precision):
    vectors = some_vectors()
    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    whole = quantize_vectors(vectors, precision, ranges)
    np.testing.assert_array_equal(quantize_vectors(vectors[:1], precision, ranges), whole[:1])


@pytest.mark.parametrize("precision", RANGED)
def test_a_component_that_never_changes_is_spread_like_theirs(theirs, precision):
    vectors = some_vectors()
    vectors[:, 3] = 0.25
    np.testing.assert_array_equal(quantize_vectors(vectors, precision), theirs(vectors, precision))


@pytest.mark.parametrize("precision", RANGED)
def test_one_vector_alone_has_no_ranges(precision):
    with pytest.raises(ValueError, match="ranges"):
        quantize_vectors(some_vectors(rows=1), precision)


@pytest.mark.parametrize("precision", BITS)
def test_zero_is_not_above_zero(theirs, precision):
    vectors = np.array([[0, -0.0, 1e-30, -1, 1, 0, 0, 1]], np.float32)
    np.testing.assert_array_equal(quantize_vectors(vectors, precision), theirs(vectors, precision))


def test_float16_rounds():
    vectors = some_vectors()
    np.testing.assert_array_equal(quantize_vectors(vectors, "float16"), vectors.astype(np.float16))


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [("float32", np.float32, 32), ("float16", np.float16, 32), ("int8", np.int8, 32),
     ("uint8", np.uint8, 32), ("binary", np.int8, 4), ("ubinary", np.uint8, 4)],
)  # fmt: skip
def test_no_rows_keep_width_and_dtype(precision, dtype, width):
    finished = quantize_vectors(np.zeros((0, 32), np.float32), precision)
    assert (finished.shape, finished.dtype) == ((0, width), dtype)


def test_the_input_is_left_as_it_was():
    vectors = some_vectors()
    for precision in FORMATS:
        quantize_vectors(vectors, precision)
    np.testing.assert_array_equal(vectors, some_vectors())


def test_an_unknown_format_lists_those_there_are():
    with pytest.raises(ValueError, match="'int4' is not one of float32, float16, int8, uint8, bin"):
        quantize_vectors(some_vectors(), "int4")


def test_ranges_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"ranges must have shape \(2, 32\), got \(2, 31\)"):
        quantize_vectors(some_vectors(), "int8", np.zeros((2, 31), np.float32))
