"""Rounding to int8: bounds, and what GPTQ gains over the nearest level."""

import numpy as np
import pytest
from support import normal

from onnxsim_embed.export.quantization.gptq import (
    absorb_error,
    inverse_cholesky,
    quantize_gptq,
    quantize_nearest,
    quantize_table,
)


def correlated(seed: int, rows: int, dim: int) -> np.ndarray:
    """Return inputs that vary in a few directions, some channels far more than others."""
    few = normal(seed, rows, dim // 8) @ normal(seed + 1, dim // 8, dim)
    return (few + 0.1 * normal(seed + 2, rows, dim)) * np.geomspace(0.1, 10, dim, dtype="f4")


def loss(inputs, weight, quantized) -> float:
    values, scales = quantized
    return float(np.linalg.norm(inputs @ (weight - values * scales)))


ROUNDINGS = {
    "nearest": quantize_nearest,
    "gptq": lambda weight: quantize_gptq(weight, normal(9, 200, len(weight))),
}


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (64, 5), (65, 33)])
def test_a_quantized_weight_keeps_its_shape_and_is_symmetric(rounding, shape):
    values, scales = rounding(normal(0, *shape))
    assert (values.dtype, values.shape) == (np.int8, shape)
    assert (scales.dtype, scales.shape) == (np.float32, shape[1:])
    assert np.abs(values.astype(int)).max() == 127


def test_the_nearest_level_is_at_most_half_a_step_away():
    weight = normal(1, 40, 9) * np.geomspace(1e-6, 1e6, 9, dtype=np.float32)
    values, scales = quantize_nearest(weight)
    assert (np.abs(weight - values * scales) <= scales * np.float32(0.50001)).all()
    assert (np.abs(values).max(axis=0) == 127).all()


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_a_column_of_zeros_stays_zero_with_a_finite_scale(rounding):
    weight = normal(2, 20, 4)
    weight[:, 2] = 0
    values, scales = rounding(weight)
    assert not values[:, 2].any()
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("dim", [8, 64, 130])
@pytest.mark.parametrize("rows", [20, 400])
def test_gptq_is_never_much_worse_and_far_better_for_correlated_inputs(dim, rows):
    weight, inputs = normal(5, dim, 24), normal(6, rows, dim)
    nearest = loss(inputs, weight, quantize_nearest(weight))
    assert loss(inputs, weight, quantize_gptq(weight, inputs)) <= 1.02 * nearest
    inputs = correlated(8, 2 * rows, dim)
    quantized, unseen = quantize_gptq(weight, inputs[::2]), inputs[1::2]
    if rows > dim >= 64:
        for tokens in (inputs[::2], unseen):
            nearest = loss(tokens, weight, quantize_nearest(weight))
            assert loss(tokens, weight, quantized) < 0.5 * nearest


def test_inputs_that_are_always_zero_change_nothing_for_the_others():
    weight, inputs = normal(13, 48, 16), correlated(14, 300, 48)
    dead = [0, 5, 47]
    inputs[:, dead] = 0
    values, scales = quantize_gptq(weight, inputs)
    nearest = loss(inputs, weight, quantize_nearest(weight))
    assert loss(inputs, weight, (values, scales)) < 0.5 * nearest
    assert (np.abs(values[dead] * scales - weight[dead]) <= 0.50001 * scales).all()
    values, scales = quantize_gptq(weight, np.zeros_like(inputs))
    assert np.array_equal(values, quantize_nearest(weight)[0])


@pytest.mark.parametrize("size", [1, 2, 63, 100])
def test_the_factor_is_upper_triangular_and_squares_to_the_inverse(size):
    root = np.random.default_rng(size).standard_normal((size, size + 5))
    matrix = root @ root.T + 0.1 * np.eye(size)
    upper = inverse_cholesky(matrix)
    assert np.array_equal(upper, np.triu(upper))
    assert np.allclose(upper.T @ upper, np.linalg.inv(matrix), rtol=1e-8, atol=1e-10)


def test_a_row_of_the_table_is_off_by_half_of_its_own_step_at_most():
    table = normal(16, 50, 20) * np.geomspace(1e-3, 1e3, 50, dtype=np.float32)[:, None]
    table[7] = 0
    int8 = quantize_table(table)
    assert (int8.values.dtype, int8.values.shape) == (np.int8, (50, 20))
    assert (int8.scales.dtype, int8.scales.shape) == (np.float32, (50,))
    assert int8.values.flags.c_contiguous
    error = np.abs(int8.values * int8.scales[:, None] - table)
    assert (error <= 0.50001 * np.abs(table).max(axis=1, keepdims=True) / 127).all()
    assert not int8.values[7].any()


# Errors of the inputs


def test_weights_take_back_what_saturated_inputs_lose_also_on_unseen_ones():
    weight, (exact, unseen) = normal(20, 48, 9), np.split(correlated(21, 1200, 48), 2)
    low, high = np.quantile(exact, [0.05, 0.95])
    absorbed = absorb_error(weight, exact, exact.clip(low, high))
    assert (absorbed.dtype, absorbed.shape) == (np.float32, weight.shape)
    plain, better = (unseen @ weight - unseen.clip(low, high) @ w for w in (weight, absorbed))
    assert better.var() < 0.9 * plain.var()


def test_exact_inputs_leave_the_weight_as_it_is():
    weight, inputs = normal(23, 16, 3), correlated(24, 100, 16)
    assert np.array_equal(absorb_error(weight, inputs, inputs), weight)
    assert np.array_equal(absorb_error(weight, 0 * inputs, 0 * inputs), weight)
