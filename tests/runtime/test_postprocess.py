"""Output dtypes equal those of sentence-transformers' quantize_embeddings on the same floats."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsim_embed.runtime.options import RANGED, EncodeOptions
from onnxsim_embed.runtime.postprocess import quantize_vectors

DTYPES = {"float32": np.float32, "int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}  # fmt: skip


def some_vectors(rows=150, dim=32, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def assert_as_theirs(vectors, precision, ranges=None):
    from sentence_transformers.util import quantize_embeddings

    before = vectors.copy()
    expected = quantize_embeddings(vectors, precision, ranges=ranges)
    np.testing.assert_array_equal(
        quantize_vectors(vectors, precision, ranges), expected, strict=True
    )
    np.testing.assert_array_equal(vectors, before)
    return expected


@pytest.mark.parametrize("dim", [32, 13])
@pytest.mark.parametrize("precision", DTYPES)
def test_dtypes_equal_theirs(precision, dim):
    vectors = some_vectors(dim=dim)
    vectors[:, 3] = 0.25  # a constant dimension
    vectors[:4, 4] = 0, -0.0, 1e-30, -1e-30
    assert_as_theirs(vectors, precision)
    none = quantize_vectors(vectors[:0], precision)
    expected = (0, -(-dim // 8) if "binary" in precision else dim)
    assert (none.shape, none.dtype) == (expected, DTYPES[precision])


def test_float16_rounds():
    vectors = some_vectors()
    np.testing.assert_array_equal(quantize_vectors(vectors, "float16"), vectors.astype(np.float16))


@pytest.mark.parametrize("precision", RANGED)
def test_ranges_apply_and_clip_whatever_the_other_rows(precision):
    vectors, calibration = some_vectors(), some_vectors(seed=1) / 2
    ranges = np.stack([calibration.min(axis=0), calibration.max(axis=0)])
    expected = assert_as_theirs(vectors, precision, ranges)
    limits = np.iinfo(expected.dtype)
    assert {expected.min(), expected.max()} == {limits.min, limits.max}
    np.testing.assert_array_equal(quantize_vectors(vectors[:1], precision, ranges), expected[:1])


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (np.zeros((2, 31)), r"\(2, 32\), got \(2, 31\)"),
        (np.zeros(32), "shape"),
        (np.stack([np.ones(32), np.zeros(32)]), "dimension 0"),
        (np.full((2, 32), np.nan), "NaN"),
        (np.stack([np.zeros(32), np.full(32, np.inf)]), "infinity"),
    ],
)
def test_invalid_ranges_are_errors(ranges, message):
    with pytest.raises(ValueError, match=message):
        quantize_vectors(some_vectors(), "int8", ranges)


def test_options_check_ranges_before_any_model():
    with pytest.raises(ValueError, match="minima, then maxima"):
        EncodeOptions(precision="uint8", ranges=[[1], [0]])
    with pytest.raises(ValueError, match="ranges apply to precision"):
        EncodeOptions(ranges=[[0], [1]])


def test_one_vector_has_no_ranges_and_unknown_dtypes_are_listed():
    with pytest.raises(ValueError, match="ranges"):
        quantize_vectors(some_vectors(rows=1), "int8")
    with pytest.raises(ValueError, match="'int4' is not one of float32, float16, int8, uint8, bin"):
        quantize_vectors(some_vectors(), "int4")
