"""From the float32 to the int8 encoder: what is changed, kept and recorded."""

from dataclasses import replace

import numpy as np
import pytest
from support import calibrate, cosines, quantize, random_token_ids, run_onnx, tiny_bert

from onnxsim_embed.export.encoder import ACTIVATIONS, Int8Table, Linear, StaticLinear
from onnxsim_embed.export.onnx.encoder_graph import build_encoder
from onnxsim_embed.export.quantization import encoder as quantization
from onnxsim_embed.export.quantization import gptq, ranges, search
from onnxsim_embed.export.quantization.encoder import GROUPS
from onnxsim_embed.export.quantization.ranges import CHANNEL_STEP, fit_smoothing
from onnxsim_embed.system import threads

LINEARS = [name for names in GROUPS.values() for name in names]
IDS = np.random.default_rng(9).integers(5, 90, (12, 20))


def bert_with_outliers(factor: float, activation: str = "gelu", **config):
    """Return a tiny encoder; two channels of `up` and of each norm are `factor` times larger."""

    def enlarge(name: str, value: np.ndarray) -> None:
        if "intermediate.dense" in name:
            value[[5, 40]] *= np.float32(factor)
        if name.startswith("encoder") and name.endswith("LayerNorm.weight"):
            value[[3, 20]] *= np.float32(factor)
        if name.startswith("encoder") and name.endswith("LayerNorm.bias"):
            value[[3, 20]] += np.float32(factor)

    return tiny_bert(activation, enlarge, **config)


def observe(bert):
    return calibrate(bert, random_token_ids(0, 80))


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@pytest.fixture(scope="module")
def seen(bert):
    return observe(bert)


@pytest.fixture(scope="module")
def quantized(bert, seen):
    return quantize(bert, seen)


def hidden(bert) -> np.ndarray:
    return run_onnx(build_encoder(bert, "run"), IDS)[0]


def fidelity(bert, int8) -> float:
    """Return the least cosine of the mean-pooled vectors."""
    return cosines(hidden(bert).mean(1), hidden(int8).mean(1)).min()


def dequantized(bert):
    """Return the float32 encoder that an int8 one stands for: no steps, no saturation of its inputs.

    Split channels add up only through saturation: this takes encoders without them.
    """

    def linear(layer: StaticLinear | Linear) -> Linear:
        if isinstance(layer, Linear):
            return layer
        weight = layer.weight * layer.scales
        if layer.input.multiplier is not None:
            weight = weight * layer.input.multiplier[:, None]
        return Linear(weight.astype(np.float32), layer.bias)

    words = bert.words
    if isinstance(words, Int8Table):
        words = words.values * words.scales[:, None]
    layers = tuple(
        replace(layer, **{name: linear(getattr(layer, name)) for name in LINEARS})
        for layer in bert.layers
    )
    return replace(bert, words=words, layers=layers)


# What it computes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_stays_close_to_the_float_encoder(activation):
    bert = tiny_bert(activation)
    assert fidelity(bert, quantize(bert, observe(bert))[0]) > 0.995


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_shift_and_smoothing_leave_the_float_function_as_it_was(monkeypatch, exponent, shift):
    """With inputs that are not rounded and weights that hardly are, almost nothing is left to differ."""
    bert = bert_with_outliers(3)
    seen = observe(bert)
    choices = {"exponents": [exponent], "shifts": [shift]}
    monkeypatch.setattr(
        ranges, "fit_smoothing", lambda *args, **own: fit_smoothing(*args, **(choices | own))
    )
    monkeypatch.setattr(ranges.Smoothing, "apply", ranges.Smoothing.exact)
    fine = 2.0**-20
    monkeypatch.setattr(
        quantization,
        "quantize_gptq",
        lambda weight, _: (np.rint(weight / fine), np.full(weight.shape[1], fine, np.float32)),
    )
    monkeypatch.setattr(gptq, "quantize_table", lambda table: table)
    # Down stays float32, and without split channels.
    int8, _ = quantize(bert, seen, lambda name, fits: None if name == "down" else fits[0])
    back = dequantized(int8)
    before = [bert.norm, *(layer.attention_norm for layer in bert.layers), bert.layers[0].norm]
    after = [back.norm, *(layer.attention_norm for layer in back.layers), back.layers[0].norm]
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.bias, new.bias) == (shift == 0)
        assert np.array_equal(old.weight, new.weight)
    assert np.array_equal(back.layers[-1].norm.bias, bert.layers[-1].norm.bias)
    assert hidden(back) == pytest.approx(hidden(bert), abs=3e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_split_channels_add_up_and_their_padding_computes_nothing(activation):
    bert = bert_with_outliers(12, activation, intermediate_size=96)
    int8, choices = quantize(bert, observe(bert))
    splits = [choice["down"]["copies"] for choice in choices]
    assert max(splits) > 0
    for layer, split in zip(int8.layers, splits, strict=True):
        added = layer.up.weight.shape[1] - 96
        assert (added % CHANNEL_STEP, added >= split) == (0, True)
        assert len(layer.down.weight) == 96 + added
        assert not layer.down.weight[96 + split :].any()
        assert not layer.up.weight[:, 96 + split :].any()
    assert fidelity(bert, int8) > 0.99


# What stays float32


@pytest.mark.parametrize("kept", [*((names,) for names in GROUPS), ("up", "down"), tuple(GROUPS)])
def test_linears_stay_float32_where_chosen_and_shifts_are_undone(kept):
    bert = bert_with_outliers(3)
    int8, choices = quantize(
        bert, observe(bert), lambda name, fits: None if name in kept else fits[0]
    )
    for layer, choice in zip(int8.layers, choices, strict=True):
        for names, linears in GROUPS.items():
            kind = Linear if names in kept else StaticLinear
            assert all(isinstance(getattr(layer, name), kind) for name in linears)
            assert choice[names].get("kept") == ("float32" if names in kept else None)
    assert fidelity(bert, int8) > (0.9999 if len(kept) == 4 else 0.99)


@pytest.mark.parametrize("names", GROUPS)
def test_float_channels_are_the_largest_and_their_int8_weights_zero(monkeypatch, names):
    monkeypatch.setattr(search, "CHANNEL_COUNTS", (0, 2))
    bert = bert_with_outliers(12)
    seen = observe(bert)
    int8, choices = quantize(bert, seen, lambda name, fits: fits[-1] if name == names else fits[0])
    for layer, choice in zip(int8.layers, choices, strict=True):
        assert [name for name in GROUPS if "float_channels" in choice[name]] == [names]
        for name in GROUPS[names]:
            linear = getattr(layer, name)
            assert linear.side.columns.shape == (2,)
            assert linear.side.weight.shape == (2, linear.weight.shape[1])
            assert not linear.weight[linear.side.columns].any()
    if names in ("up", "down"):
        outliers = {"up": [3, 20], "down": [5, 40]}[names]
        assert getattr(int8.layers[0], names).side.columns.tolist() == outliers
    assert fidelity(bert, int8) > 0.99


# Determinism


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bytes_and_leaves_the_arguments_unchanged(
    monkeypatch, seen, quantized, workers
):
    monkeypatch.setattr(threads, "available_cpus", lambda: workers)
    bert, rows = tiny_bert(), {name: part.rows.copy() for name, part in seen.items()}
    again = quantize(bert, seen)
    assert again[1] == quantized[1]
    first, second = (build_encoder(result[0]) for result in (quantized, again))
    assert first.SerializeToString() == second.SerializeToString()
    assert build_encoder(bert).SerializeToString() == build_encoder(tiny_bert()).SerializeToString()
    assert all(np.array_equal(seen[name].rows, rows[name]) for name in seen)
