"""Rounding to int8: bounds, and what rounding that sees the input gains."""

import numpy as np
import pytest

from onnxsim_embed.export.quantization.gptq import (
    channel_scales,
    inverse_cholesky,
    quantize_gptq,
    quantize_nearest,
    quantize_table,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(seed: int, rows: int, width: int) -> np.ndarray:
    """Return inputs that vary in a few directions, some channels far more than others."""
    few = normal(seed, rows, width // 8) @ normal(seed + 1, width // 8, width)
    return (few + 0.1 * normal(seed + 2, rows, width)) * np.geomspace(0.1, 10, width, dtype="f4")


def loss(inputs, weight, rounded) -> float:
    values, scales = rounded
    return float(np.linalg.norm(inputs @ (weight - values * scales)))


ROUNDINGS = {
    "nearest": quantize_nearest,
    "seen": lambda w: quantize_gptq(w, normal(9, 200, len(w))),
}


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (64, 5), (65, 33)])
def test_a_rounded_weight_keeps_its_shape_and_is_symmetric(rounding, shape):
    values, scales = rounding(normal(0, *shape))
    assert (values.dtype, values.shape) == (np.int8, shape)
    assert (scales.dtype, scales.shape) == (np.float32, shape[1:])
    assert np.abs(values.astype(int)).max() == 127


def test_the_nearest_step_is_at_most_half_a_step_away():
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


def test_rounding_leaves_its_arguments_alone():
    weight, inputs = normal(3, 70, 8), normal(4, 50, 70)
    before = weight.copy(), inputs.copy()
    quantize_gptq(weight, inputs)
    assert np.array_equal(weight, before[0])
    assert np.array_equal(inputs, before[1])


def test_equal_arguments_round_equally():
    weight, inputs = normal(3, 70, 8), normal(4, 50, 70)
    first, again = (quantize_gptq(weight, inputs) for _ in range(2))
    assert np.array_equal(first[0], again[0])


@pytest.mark.parametrize("width", [8, 64, 130])
@pytest.mark.parametrize("rows", [20, 400])
def test_rounding_that_sees_the_input_is_not_worse_than_the_nearest(width, rows):
    weight, inputs = normal(5, width, 24), normal(6, rows, width)
    seen = loss(inputs, weight, quantize_gptq(weight, inputs))
    assert seen <= 1.02 * loss(inputs, weight, quantize_nearest(weight))


@pytest.mark.parametrize("width", [64, 130])
def test_it_is_far_better_where_inputs_are_correlated(width):
    weight, inputs = normal(7, width, 24), correlated(8, 400, width)
    seen = loss(inputs, weight, quantize_gptq(weight, inputs))
    assert seen < 0.5 * loss(inputs, weight, quantize_nearest(weight))


def test_it_is_better_on_inputs_it_has_not_seen_too():
    weight, inputs = normal(9, 64, 24), correlated(10, 800, 64)
    rounded = quantize_gptq(weight, inputs[::2])
    assert loss(inputs[1::2], weight, rounded) < 0.5 * loss(
        inputs[1::2], weight, quantize_nearest(weight)
    )


def test_the_scales_do_not_depend_on_the_rounding():
    weight, inputs = normal(11, 32, 6), correlated(12, 100, 32)
    assert np.array_equal(quantize_gptq(weight, inputs)[1], channel_scales(weight))


def test_inputs_that_are_always_zero_change_nothing_for_the_others():
    weight, inputs = normal(13, 48, 16), correlated(14, 300, 48)
    inputs[:, [0, 5, 47]] = 0
    rounded = quantize_gptq(weight, inputs)
    assert loss(inputs, weight, rounded) < 0.5 * loss(inputs, weight, quantize_nearest(weight))
    values, scales = rounded
    dead = values[[0, 5, 47]] * scales
    assert (np.abs(dead - weight[[0, 5, 47]]) <= 0.50001 * scales).all()


def test_without_any_input_weights_go_to_the_nearest_step():
    weight = normal(15, 12, 5)
    values, scales = quantize_gptq(weight, np.zeros((30, 12), np.float32))
    assert np.array_equal(values, quantize_nearest(weight)[0])
    assert np.array_equal(scales, quantize_nearest(weight)[1])


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
    made = quantize_table(table)
    assert (made.values.dtype, made.values.shape) == (np.int8, (50, 20))
    assert (made.scales.dtype, made.scales.shape) == (np.float32, (50,))
    assert made.values.flags.c_contiguous
    error = np.abs(made.values * made.scales[:, None] - table)
    assert (error <= 0.50001 * np.abs(table).max(axis=1, keepdims=True) / 127).all()
    assert not made.values[7].any()
