"""Pooling, Dense and normalization against plain loops, torch and sentence-transformers."""

from __future__ import annotations

import json
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.pooling import (
    ACTIVATIONS,
    Dense,
    Head,
    PoolingMode,
    load_dense,
    normalize,
    pool,
    pooling_weights,
)

MODES = list(PoolingMode)
BATCH, TOKENS, WIDTH = 12, 9, 8

each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)


def hidden_states(seed=0):
    return np.random.default_rng(seed).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)


def right_padded(seed=0):
    lengths = np.random.default_rng(seed).integers(1, TOKENS + 1, BATCH)
    return (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)


MASKS = {
    "right padding": right_padded(),
    "left padding": right_padded()[:, ::-1].copy(),
    "rows without tokens": right_padded() * (np.arange(BATCH) % 3 > 0)[:, None],
    "no mask": None,
    "all rows without tokens": np.zeros((BATCH, TOKENS), np.int64),
}


def pool_in_loops(hidden, mask, mode):
    rows = []
    for states, real in zip(hidden.astype(np.float64), mask, strict=True):
        tokens = states[real == 1]
        if len(tokens) == 0:
            rows.append(np.zeros(hidden.shape[2]))
        elif mode is PoolingMode.CLS:
            rows.append(tokens[0])
        elif mode is PoolingMode.LAST_TOKEN:
            rows.append(tokens[-1])
        elif mode is PoolingMode.MAX:
            rows.append(tokens.max(axis=0))
        elif mode is PoolingMode.WEIGHTED_MEAN:
            rows.append(np.average(tokens, axis=0, weights=range(1, len(tokens) + 1)))
        else:
            divisor = len(tokens) if mode is PoolingMode.MEAN else np.sqrt(len(tokens))
            rows.append(tokens.sum(axis=0) / divisor)
    return np.array(rows)


@each_mode
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mode_equals_its_definition(mode, mask):
    pooled = pool(hidden_states(), mask, [mode])
    mask = np.ones((BATCH, TOKENS), np.int64) if mask is None else mask
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, pool_in_loops(hidden_states(), mask, mode), atol=1e-6)


@each_mode
@pytest.mark.parametrize("mask", ["right padding", "rows without tokens"])
def test_weights_of_tokens_pool_like_a_mode(mode, mask):
    hidden, mask = hidden_states(), MASKS[mask]
    weights = pooling_weights(mask, [mode, PoolingMode.MEAN])
    if mode is PoolingMode.MAX:
        assert weights is None
        return
    assert (weights.dtype, weights.shape) == (np.float32, (BATCH, 2, TOKENS))
    for row, chosen in enumerate([mode, PoolingMode.MEAN]):
        expected = pool(hidden, mask, [chosen])
        np.testing.assert_allclose((weights @ hidden)[:, row], expected, atol=1e-6)


@each_mode
def test_padding_does_not_matter(mode):
    hidden, mask = hidden_states(), right_padded()
    spoilt = np.where(mask[:, :, None] == 1, hidden, np.float32(np.nan))
    np.testing.assert_array_equal(pool(spoilt, mask, [mode]), pool(hidden, mask, [mode]))


@each_mode
@pytest.mark.parametrize("shape", [(0, TOKENS, WIDTH), (3, 0, WIDTH)])
@pytest.mark.parametrize("masked", [True, False])
def test_empty_input_gives_float32_zeros(mode, shape, masked):
    mask = np.ones(shape[:2], np.int64) if masked else None
    pooled = pool(np.ones(shape, np.float32), mask, [mode])
    assert (pooled.shape, pooled.dtype) == ((shape[0], WIDTH), np.float32)
    assert not pooled.any()


def test_modes_are_found_by_name():
    for mode in MODES:
        assert PoolingMode.parse(mode.value) is mode
    assert PoolingMode.parse("last") is PoolingMode.LAST_TOKEN
    with pytest.raises(ValueError, match="unknown pooling 'median'; allowed are mean, cls, max, "):
        PoolingMode.parse("median")


def test_normalized_rows_have_norm_one_and_zero_rows_stay_zero():
    vectors = hidden_states()[:, 0].copy()
    vectors[3] = 0
    unit = normalize(vectors)
    assert unit.dtype == np.float32
    norms = np.linalg.norm(unit.astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, np.arange(BATCH) != 3, atol=1e-6)
    assert normalize(np.zeros((0, 5), np.float32)).shape == (0, 5)


def linear(seed=3, inputs=WIDTH, outputs=5):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((inputs, outputs)).astype(np.float32)
    return weight, rng.standard_normal(outputs).astype(np.float32)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_equals_torch(activation, with_bias):
    import torch

    module, _, name = activation.rpartition(".")
    weight, bias = linear()
    bias = bias if with_bias else None
    for scale in (1, 100):
        pooled = hidden_states()[:, 0] * np.float32(scale)
        tensors = [None if a is None else torch.from_numpy(a) for a in (pooled, weight.T, bias)]
        theirs = getattr(import_module(module), name)()(torch.nn.functional.linear(*tensors))
        ours = Dense(weight, bias, activation)(pooled)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6 * scale)


def test_dense_maps_each_row_independently():
    dense = Dense(*linear(outputs=67), "torch.nn.modules.activation.GELU")
    pooled = hidden_states()[:, 0]
    alone = np.concatenate([dense(pooled[i : i + 1]) for i in range(BATCH)])
    np.testing.assert_array_equal(dense(pooled), alone)
    assert (dense(pooled[:0]).shape, dense(pooled[:0]).dtype) == ((0, 67), np.float32)


def test_a_head_pools_then_maps_then_normalizes():
    dense = Dense(*linear(inputs=2 * WIDTH), "torch.nn.modules.linear.Identity")
    modes = (PoolingMode.CLS, PoolingMode.MEAN)
    hidden, mask = hidden_states(), MASKS["rows without tokens"]
    pooled = np.concatenate([pool(hidden, mask, [mode]) for mode in modes], axis=1)
    expected = normalize(dense(pooled))
    np.testing.assert_array_equal(Head(modes, (dense,), True)(hidden, mask), expected)


def directory(path, config, tensors):
    """A directory with a Dense module, as an artifact."""
    (path / "config.json").write_text(config, encoding="utf-8")
    save_file(tensors, path / "model.safetensors")
    return SimpleNamespace(file=path.joinpath)


def test_a_dense_module_loads_as_it_was_written(tmp_path):
    weight, bias = linear()
    tensors = {"linear.weight": weight.T.copy(), "linear.bias": bias}
    name = "torch.nn.modules.activation.ReLU"
    dense = load_dense(directory(tmp_path, json.dumps({"activation_function": name}), tensors), ".")
    np.testing.assert_array_equal(dense.weight, weight)
    np.testing.assert_array_equal(dense.bias, bias)
    assert dense.activation == name


@pytest.mark.parametrize(
    ("config", "tensor", "message"),
    [
        ("{", "linear.weight", "JSON"),
        ("[]", "linear.weight", "TypeError"),
        ("{}", "linear.weight", "activation_function"),
        ('{"activation_function": "x"}', "other", "linear.weight"),
        ('{"activation_function": "my.Cube"}', "linear.weight", r"'my\.Cube'"),
    ],
)
def test_a_broken_dense_module_is_named(tmp_path, config, tensor, message):
    artifact = directory(tmp_path, config, {tensor: np.ones((2, 3), np.float32)})
    with pytest.raises(ArtifactError, match=message) as error:
        load_dense(artifact, ".")
    assert str(tmp_path) in str(error.value)
