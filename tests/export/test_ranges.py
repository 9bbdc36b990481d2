"""Ranges: what a fixed uint8 range holds, and what smoothing and splitting gain and keep."""

import numpy as np
import pytest
from support import normal

from onnxsim_embed.export.encoder import ACTIVATIONS, Linear
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.ranges import (
    CHANNEL_STEP,
    CHANNELS_PER_SPLIT,
    EXPONENTS,
    SHIFTS,
    Range,
    Smoothing,
    fit_outlier_splits,
    fit_smoothing,
    output_error,
    plan_split_channels,
    smoothing_multiplier,
)


def seen(rows: np.ndarray) -> Activations:
    return Activations(rows.min(axis=0), rows.max(axis=0), rows)


def outliers(seed: int, factor: float = 40, shift: float = 0) -> np.ndarray:
    """Return inputs of which three channels are far larger than the rest."""
    rows = normal(seed, 500, 96)
    rows[:, [3, 50, 90]] = rows[:, [3, 50, 90]] * factor + shift
    return rows


NONE = np.zeros(0, np.int64)


def identity(channels: int) -> Smoothing:
    ones = np.ones(channels, np.float32)
    return Smoothing(Range.of(0, 1), 0.0, 0 * ones, ones, NONE)


# A range


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1, 1), (0, 6), (-3, 0), (2, 5), (-9, -4), (-0.17, 30), (-1e-3, 2e-3), (-1e5, 3e4), (0, 0)],
)
def test_a_range_covers_both_ends_and_zero_and_saturates_outside(low, high):
    span = Range.of(low, high)
    assert (type(span.scale), type(span.zero_point)) == (np.float32, np.uint8)
    assert span.round_trip(np.zeros(1, np.float32)) == 0
    values = np.linspace(low, high, 999, dtype=np.float32)
    levels = span.round_trip(values)
    assert levels.dtype == np.float32
    assert np.abs(levels - values).max() <= 0.501 * span.scale
    assert np.array_equal(span.round_trip(levels), levels)
    assert span.round_trip(np.array([-1e9, 1e9], np.float32)) == pytest.approx(span.ends)


# Smoothing


def test_exponents_from_none_to_all_of_the_range():
    inputs, weights = np.geomspace(0.01, 100, 20, dtype=np.float32), np.abs(normal(1, 20))
    assert (smoothing_multiplier(inputs, weights, 0) == 1).all()
    factors = smoothing_multiplier(inputs, weights, 1.0)
    assert inputs * factors == pytest.approx(inputs[0] * factors[0], rel=1e-4)
    inputs[[3, 7]] = weights[[5, 7]] = 0  # dead channels
    factors = smoothing_multiplier(inputs, weights, 0.7)
    assert (np.isfinite(factors) & (factors > 0)).all()
    assert np.log(factors.astype(np.float64)).mean() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("exponent", [e for e in EXPONENTS if e])
def test_smoothing_leaves_the_float_product_as_it_was(exponent):
    rows, linear = outliers(2), Linear(normal(3, 96, 20), normal(4, 20))
    fit = fit_smoothing(seen(rows), [linear.weight], exponents=(exponent,))
    transformed = fit.transform(linear)
    output = (rows + fit.shift) * fit.multiplier @ transformed.weight + transformed.bias
    expected = rows.astype(np.float64) @ linear.weight + linear.bias
    assert fit.exponent == exponent
    assert np.abs(output - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shift", [0, 100])
def test_an_outlier_channel_is_smoothed_away(shift):
    rows, weights = outliers(4, shift=shift), [normal(5, 96, 20), normal(6, 96, 30)]
    best = fit_smoothing(seen(rows), weights)
    plain = fit_smoothing(seen(rows), weights, exponents=(0.0,), shifts=(0.0,))
    assert best.exponent > 0
    assert best.error < 0.3 * plain.error
    assert not plain.shift.any()
    assert (plain.multiplier == 1).all()


def test_a_lopsided_input_is_shifted():
    rows, weight = normal(7, 500, 40) + np.float32(6), normal(8, 40, 20)
    best = fit_smoothing(seen(rows), [weight])
    plain = fit_smoothing(seen(rows), [weight], shifts=(0.0,))
    assert np.abs(best.shift).mean() > 2
    assert best.error < 0.5 * plain.error


@pytest.mark.parametrize("shift", SHIFTS)
def test_no_value_seen_is_cut_off(shift):
    rows = outliers(13, shift=20)
    fit = fit_smoothing(seen(rows), [normal(14, 96, 8)], shifts=(shift,))
    exact = (rows + fit.shift) * fit.multiplier
    assert np.abs(fit.apply(rows) - exact).max() <= 0.51 * fit.range.scale


def test_an_input_that_is_always_zero_is_fitted():
    fit = fit_smoothing(seen(np.zeros((50, 8), np.float32)), [normal(15, 8, 4)])
    assert np.isfinite([fit.error, *fit.multiplier]).all()


# Splitting


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_equals_that_of_transformers(name):
    import torch
    from transformers.activations import ACT2FN

    values = np.concatenate([np.linspace(-12, 12, 4001), [0, -1e-6, 1e4, -1e4]]).astype(np.float32)
    outputs = ACTIVATIONS[name](values)
    assert outputs.dtype == np.float32
    assert np.abs(outputs - ACT2FN[name](torch.from_numpy(values)).numpy()).max() < 2e-6


@pytest.mark.parametrize("top", [0.5, 1.0, 3.3, 100.0])
def test_split_channels_hold_the_largest_value_of_every_channel(top):
    highest = np.array([-1, 0, 0.3, 1, 1.7, 3.3, 9, 40.2], np.float32)
    columns, offsets = plan_split_channels(highest, top)
    assert len(columns) == len(offsets)
    for column, value in enumerate(highest):
        own = offsets[columns == column]
        assert own == pytest.approx(top * np.arange(1, len(own) + 1))
        assert top * (len(own) + 1) >= value / 1.0002
        assert top * len(own) < max(value, 1e-9)  # and none is idle


@pytest.mark.parametrize("name", ["relu", "gelu", None])
def test_a_few_huge_channels_are_split(name):
    activation = ACTIVATIONS[name] if name else None
    rows = normal(16, 600, 192)
    rows[:, [4, 77]] = rows[:, [4, 77]] * 15 + 25
    weight = normal(17, 192, 24)
    _, fit, *_ = fit_outlier_splits(seen(rows), [weight], activation)
    inner = activation(rows) if name else rows
    plain = Range.of(float(inner.min()), float(inner.max())).round_trip(inner)
    assert set(fit.columns) == {4, 77}
    assert fit.range.ends[1] < 0.7 * inner.max()
    assert fit.error < 0.3 * output_error(identity(192), plain, inner, [inner @ weight], [weight])
    inputs, transformed = fit.apply(rows), fit.transform(Linear(weight, None))
    error = output_error(fit, inputs, inner, [inner @ weight], [weight])
    assert fit.error == pytest.approx(error, rel=0.01)
    outputs = inputs @ transformed.weight + transformed.bias
    assert np.square(outputs - inner @ weight).mean() < 0.01 * (inner @ weight).var()
    assert inputs.shape[1] % (CHANNEL_STEP if name else 1) == 0


def test_splitting_is_worth_a_limited_number_of_channels():
    rows = np.abs(normal(18, 500, 480)) * np.geomspace(0.1, 100, 480, dtype=np.float32)
    fit, *_ = fit_outlier_splits(seen(rows), [normal(19, 480, 8)], ACTIVATIONS["relu"])
    assert len(fit.columns) <= 480 // CHANNELS_PER_SPLIT[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((60, 40), np.float32),
        -np.abs(normal(20, 60, 40)) - np.float32(3),  # never active
        np.clip(normal(21, 600, 200), -0.5, 0.2),  # every channel has the same maximum
        normal(22, 60, 40) * np.float32(1e-4),
        normal(23, 60, 40) * np.float32(1e4),
    ],
    ids=["zero", "never active", "equal maxima", "small", "large"],
)
def test_every_activation_gets_a_range(name, rows):
    activation = ACTIVATIONS[name]
    fit, *_ = fit_outlier_splits(seen(rows), [normal(24, rows.shape[1], 8)], activation)
    assert np.isfinite(fit.error)
    quantized, inner = fit.apply(rows)[:, : rows.shape[1]], activation(rows)
    inside = inner <= fit.range.ends[1]
    assert np.abs(quantized - inner)[inside].max() <= 0.51 * fit.range.scale


# The search


def test_every_output_channel_counts_alike():
    rows, weight = normal(25, 300, 32), normal(26, 32, 12)
    weight[:, 3] *= np.float32(30)
    fit, outputs = identity(32), [rows @ weight]
    assert 0 < output_error(fit, rows, rows, outputs, [weight]) < 1e-4
    lost = output_error(fit, np.zeros_like(rows), rows, outputs, [weight])
    assert lost == pytest.approx(1, rel=0.1)
    inputs = rows.copy()
    inputs[:, 0] = 0
    few = output_error(fit, inputs, rows, outputs, [weight])
    weight[:, 3] /= np.float32(30)
    assert few == pytest.approx(
        output_error(fit, inputs, rows, [rows @ weight], [weight]), rel=0.01
    )


@pytest.mark.parametrize("split", [False, True])
def test_float_channels_are_exact_and_the_rest_gets_a_finer_range(split):
    rows, weight = outliers(27), normal(28, 96, 20)

    def fit(channels):
        if split:
            return fit_outlier_splits(seen(rows), [weight], channels=channels)[0]
        return fit_smoothing(seen(rows), [weight], channels=channels)

    plain, best = fit(0), fit(3)
    assert best.float_channels.tolist() == [3, 50, 90]
    assert not best.apply(rows)[:, best.float_channels].any()
    assert not best.transform(Linear(weight, None)).weight[best.float_channels].any()
    assert best.error < 0.5 * plain.error


def test_a_channel_far_beyond_the_rest_gets_a_fine_range():
    """The range that pays is a fiftieth of the largest value."""
    rows = normal(29, 600, 960)
    rows[:, 5] = np.abs(rows[:, 5]) * 50
    _, fit, *_ = fit_outlier_splits(seen(rows), [normal(30, 960, 8)], ACTIVATIONS["relu"])
    assert fit.range.ends[1] < 0.1 * rows.max()
