"""Ranges: what a fixed uint8 range holds, and what smoothing and splitting gain and keep."""

import numpy as np
import pytest

from onnxsim_embed.export.bert import ACTIVATIONS
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.ranges import (
    CHANNELS_PER_SPLIT,
    EXPONENTS,
    SEARCH_ROWS,
    SHIFTS,
    activation_function,
    fit_outlier_split,
    fit_smoothing,
    output_error,
    plan_split_channels,
    smoothing_multiplier,
    subsample,
)
from onnxsim_embed.export.quantization.transforms import Range, Smoothing


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def seen(rows: np.ndarray) -> Activations:
    return Activations(rows.min(axis=0), rows.max(axis=0), rows)


def outliers(seed: int, factor: float = 40, shift: float = 0, width: int = 96) -> np.ndarray:
    """Return inputs of which three channels are far larger than the rest."""
    rows = normal(seed, 500, width)
    rows[:, [3, 50, 90]] = rows[:, [3, 50, 90]] * factor + shift
    return rows


def identity(channels: int) -> Smoothing:
    ones = np.ones(channels, np.float32)
    return Smoothing(0.0, 0.0, 0 * ones, ones, Range.of(0, 1))


# A range

ENDS = [(-1, 1), (0, 6), (-3, 0), (2, 5), (-9, -4), (-0.17, 30), (-1e-3, 2e-3), (-1e5, 3e4), (0, 0)]


@pytest.mark.parametrize(("low", "high"), ENDS)
def test_a_range_covers_both_ends_and_zero_exactly(low, high):
    span = Range.of(low, high)
    assert (type(span.scale), type(span.zero_point)) == (np.float32, np.uint8)
    ends = np.array([low, high, 0], np.float32)
    made = span.round_trip(ends)
    assert np.abs(made - ends).max() <= 0.501 * span.scale
    assert made[2] == 0


@pytest.mark.parametrize(("low", "high"), ENDS[:-1])
def test_inside_a_value_is_off_by_half_a_step_at_most(low, high):
    span = Range.of(low, high)
    values = np.linspace(low, high, 999, dtype=np.float32)
    made = span.round_trip(values)
    assert made.dtype == np.float32
    assert np.abs(made - values).max() <= 0.501 * span.scale
    assert np.array_equal(span.round_trip(made), made)


@pytest.mark.parametrize(("low", "high"), ENDS[:-1])
def test_outside_a_value_ends_at_the_nearest_end(low, high):
    span = Range.of(low, high)
    bottom = -np.float32(span.zero_point) * span.scale
    made = span.round_trip(np.array([-1e9, 1e9], np.float32))
    assert made == pytest.approx([bottom, span.high])


def test_an_input_that_is_always_zero_has_a_range():
    span = Range.of(0, 0)
    assert span.scale > 0
    assert not span.round_trip(np.zeros(4, np.float32)).any()


# Smoothing


@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.9, 1.0])
def test_smoothing_factors_have_a_geometric_mean_of_one(exponent):
    made = smoothing_multiplier(np.abs(normal(0, 64)) * 9, np.abs(normal(1, 64)), exponent)
    assert made.dtype == np.float32
    assert np.log(made.astype(np.float64)).mean() == pytest.approx(0, abs=1e-5)


def test_an_exponent_of_zero_smooths_nothing():
    assert (smoothing_multiplier(np.abs(normal(0, 9)), np.abs(normal(1, 9)), 0) == 1).all()


def test_an_exponent_of_one_evens_the_inputs_out():
    inputs = np.geomspace(0.01, 100, 20, dtype=np.float32)
    made = smoothing_multiplier(inputs, np.ones(20, np.float32), 1.0)
    assert inputs * made == pytest.approx(inputs[0] * made[0], rel=1e-4)


def test_dead_channels_have_finite_factors():
    inputs, weights = np.abs(normal(0, 20)), np.abs(normal(1, 20))
    inputs[3] = weights[5] = inputs[7] = weights[7] = 0
    made = smoothing_multiplier(inputs, weights, 0.7)
    assert np.isfinite(made).all()
    assert (made > 0).all()


def test_smoothing_leaves_the_float_product_as_it_was():
    rows, weight = outliers(2), normal(3, 96, 20)
    fit = fit_smoothing(seen(rows), [weight])
    moved = (rows + fit.shift) * fit.multiplier @ (weight / fit.multiplier[:, None])
    plain = rows.astype(np.float64) @ weight
    assert np.abs(moved - fit.shift @ weight - plain).max() < 1e-5 * np.abs(plain).max()


@pytest.mark.parametrize("shift", [0, 100])
def test_an_outlier_channel_is_smoothed_away(shift):
    rows, weights = outliers(4, shift=shift), [normal(5, 96, 20), normal(6, 96, 30)]
    best = fit_smoothing(seen(rows), weights)
    plain = fit_smoothing(seen(rows), weights, exponents=(0.0,), shifts=(0.0,))
    assert best.exponent > 0
    assert best.error < 0.3 * plain.error


def test_a_lopsided_input_is_shifted():
    rows, weight = normal(7, 500, 40) + np.float32(6), normal(8, 40, 20)
    best = fit_smoothing(seen(rows), [weight])
    plain = fit_smoothing(seen(rows), [weight], shifts=(0.0,))
    assert np.abs(best.shift).mean() > 2
    assert best.error < 0.5 * plain.error


def test_without_a_choice_nothing_is_shifted_or_multiplied():
    fit = fit_smoothing(seen(outliers(9)), [normal(10, 96, 8)], exponents=(0.0,), shifts=(0.0,))
    assert not fit.shift.any()
    assert (fit.multiplier == 1).all()
    assert fit.quantization().multiplier is None


@pytest.mark.parametrize("exponent", [e for e in EXPONENTS if e])
def test_what_the_graph_takes_is_what_was_measured(exponent):
    fit = fit_smoothing(seen(outliers(11)), [normal(12, 96, 8)], exponents=(exponent,))
    how = fit.quantization()
    assert fit.exponent == exponent
    assert (how.scale, how.zero_point) == (fit.range.scale, fit.range.zero_point)
    assert np.array_equal(how.multiplier, fit.multiplier)


def test_no_value_seen_is_cut_off():
    rows = outliers(13, shift=20)
    for shift in SHIFTS:
        fit = fit_smoothing(seen(rows), [normal(14, 96, 8)], shifts=(shift,))
        exact = (rows + fit.shift) * fit.multiplier
        assert np.abs(fit.apply(rows) - exact).max() <= 0.51 * fit.range.scale


def test_an_input_that_is_always_zero_is_fitted():
    fit = fit_smoothing(seen(np.zeros((50, 8), np.float32)), [normal(15, 8, 4)])
    assert np.isfinite(fit.error)
    assert np.isfinite(fit.multiplier).all()


# Splitting


def torch_activation(name: str):
    from transformers.activations import ACT2FN

    return ACT2FN[name]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_equals_that_of_transformers(name):
    import torch

    values = np.concatenate([np.linspace(-12, 12, 4001), [0, -1e-6, 1e4, -1e4]]).astype(np.float32)
    made = activation_function(name)(values)
    expected = torch_activation(name)(torch.from_numpy(values)).numpy()
    assert made.dtype == np.float32
    assert np.abs(made - expected).max() < 2e-6


@pytest.mark.parametrize("top", [0.5, 1.0, 3.3, 100.0])
def test_copies_hold_the_largest_value_of_every_channel(top):
    highest = np.array([-1, 0, 0.3, 1, 1.7, 3.3, 9, 40.2], np.float32)
    columns, offsets = plan_split_channels(highest, top)
    assert len(columns) == len(offsets)
    for column, value in enumerate(highest):
        own = offsets[columns == column]
        assert own == pytest.approx(top * np.arange(1, len(own) + 1))
        assert top * (len(own) + 1) >= value / 1.0002
        assert top * len(own) < max(value, 1e-9)  # and no copy is idle


@pytest.mark.parametrize(("name", "tolerance"), [("relu", 1e-5), ("gelu", 0.5), ("gelu_new", 0.5)])
def test_saturated_copies_add_up_to_the_channel(name, tolerance):
    activation = activation_function(name)
    top = 7.0
    values = np.linspace(-5, 34, 2000, dtype=np.float32)
    columns, offsets = plan_split_channels(np.array([34], np.float32), top)
    parts = [activation(values), *(activation(values - offset) for offset in offsets)]
    total = np.sum([np.minimum(part, top) for part in parts], axis=0)
    assert len(columns) == 4
    assert np.abs(total - activation(values)).max() < tolerance


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_a_few_huge_channels_are_split(name):
    activation = activation_function(name)
    rows = normal(16, 600, 192)
    rows[:, [4, 77]] = rows[:, [4, 77]] * 15 + 25
    weight = normal(17, 192, 24)
    fit = fit_outlier_split(seen(rows), [weight], activation)
    inner = activation(rows)
    plain = Range.of(float(inner.min()), float(inner.max())).round_trip(inner)
    assert set(fit.columns) == {4, 77}
    assert fit.range.high < 0.7 * inner.max()
    assert fit.error < 0.3 * output_error(identity(192), plain, [inner @ weight], [weight])
    assert fit.error == pytest.approx(
        output_error(fit, fit.apply(rows), [inner @ weight], [weight]),
        rel=1e-4,
    )


def test_splitting_is_worth_a_limited_number_of_columns():
    rows = np.abs(normal(18, 500, 480)) * np.geomspace(0.1, 100, 480, dtype=np.float32)
    fit = fit_outlier_split(seen(rows), [normal(19, 480, 8)], activation_function("relu"))
    assert len(fit.columns) <= 480 // CHANNELS_PER_SPLIT


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((60, 40), np.float32),
        -np.abs(normal(20, 60, 40)) - np.float32(3),  # never active
        np.clip(normal(21, 600, 40), -0.5, 0.2),  # every channel reaches the same top
        np.clip(normal(21, 600, 200), -0.5, 0.2),
        normal(22, 60, 40) * np.float32(1e-4),
        normal(23, 60, 40) * np.float32(1e4),
    ],
    ids=["zero", "never active", "equal tops", "many equal tops", "small", "large"],
)
def test_every_activation_gets_a_range(name, rows):
    activation = activation_function(name)
    fit = fit_outlier_split(seen(rows), [normal(24, rows.shape[1], 8)], activation)
    assert np.isfinite(fit.error)
    made, inner = fit.apply(rows)[:, : rows.shape[1]], activation(rows)
    inside = inner <= fit.range.high
    assert np.abs(made - inner)[inside].max() <= 0.51 * fit.range.scale


# The search


def test_rows_are_spread_over_all():
    rows = np.arange(10_000, dtype=np.float32)[:, None]
    some = subsample(rows, SEARCH_ROWS)
    assert len(some) == len(np.unique(some)) == SEARCH_ROWS
    assert (some[0], some[-1]) == (0, 9999)
    assert np.diff(some[:, 0]).max() <= 10
    assert subsample(rows[:7], SEARCH_ROWS).shape == (7, 1)


def test_a_fine_range_has_no_error_but_the_weights_own():
    rows, weight = normal(25, 300, 32), normal(26, 32, 12)
    nearest, final = (
        output_error(identity(32), rows, [rows @ weight], [weight], final=f) for f in (False, True)
    )
    assert 0 < nearest < 1e-4
    assert final < 1.02 * nearest
    assert output_error(
        identity(32), np.zeros_like(rows), [rows @ weight], [weight]
    ) == pytest.approx(1, rel=0.1)
