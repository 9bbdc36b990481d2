"""From the float32 to the int8 encoder: what is changed, kept and recorded."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from support import VOCABULARY, bert_config, bert_tensors

from onnxsim_embed.export.bert import ACTIVATIONS, Int8Table, Linear, StaticLinear, load_bert
from onnxsim_embed.export.onnx.bert_graph import build_encoder
from onnxsim_embed.export.quantization import bert as quantize
from onnxsim_embed.export.quantization import transforms
from onnxsim_embed.export.quantization.bert import quantize_static
from onnxsim_embed.export.quantization.calibration import collect_activations, input_names
from onnxsim_embed.export.quantization.ranges import (
    ERROR_BUDGET,
    activation_function,
    fit_outlier_split,
    fit_smoothing,
)
from onnxsim_embed.export.quantization.transforms import CHANNEL_STEP

LINEARS = ("query", "key", "value", "output", "up", "down")
GROUPS = ("query, key, value", "output", "up", "down")


def make(activation: str = "gelu", outliers: float = 0, **changes):
    """Return a tiny encoder; `outliers` makes two channels of `up` and of each norm so much larger."""
    config = bert_config(hidden_act=activation, **changes)
    tensors = bert_tensors(config)
    for name, value in tensors.items():
        if outliers and "intermediate.dense" in name:
            value[[5, 40]] *= np.float32(outliers)
        if outliers and name.startswith("encoder") and name.endswith("LayerNorm.weight"):
            value[[3, 20]] *= np.float32(outliers)
        if outliers and name.startswith("encoder") and name.endswith("LayerNorm.bias"):
            value[[3, 20]] += np.float32(outliers)
    return load_bert(config, tensors)


def token_ids(seed: int, texts: int = 80) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, len(VOCABULARY), length) for length in rng.integers(2, 45, texts)]


@pytest.fixture(scope="module")
def bert():
    return make()


@pytest.fixture(scope="module")
def seen(bert):
    return collect_activations(bert, token_ids(0))


@pytest.fixture(scope="module")
def made(bert, seen):
    return quantize_static(bert, seen)


def hidden(bert, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        build_encoder(bert, "run").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input_ids": ids})[0]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


IDS = np.random.default_rng(9).integers(5, len(VOCABULARY), (20, 12))


def floated(bert):
    """Return the float32 encoder that an int8 one stands for: no step, no saturation of its inputs.

    Copies of outlier columns add up only through saturation: this takes encoders without them.
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


def force(monkeypatch, **settings):
    """Let the search choose from these exponents and shifts only, where it has a choice."""

    def smoothing(part, weights, **given):
        return fit_smoothing(part, weights, **(given or settings))

    monkeypatch.setattr(quantize, "fit_smoothing", smoothing)


def keep(monkeypatch, *groups: str):
    """Let the search find no good range for the inputs of these linears."""

    def smoothing(part, weights, **given):
        group = "query, key, value" if len(weights) == 3 else "output" if given else "up"
        fit = fit_smoothing(part, weights, **given)
        return replace(fit, error=0.5) if group in groups else fit

    def split(*given):
        fit = fit_outlier_split(*given)
        return replace(fit, error=0.5) if "down" in groups else fit

    monkeypatch.setattr(quantize, "fit_smoothing", smoothing)
    monkeypatch.setattr(quantize, "fit_outlier_split", split)


# What it computes


def test_every_linear_and_the_words_become_int8(made):
    for layer in made.bert.layers:
        for name in LINEARS:
            linear = getattr(layer, name)
            assert isinstance(linear, StaticLinear)
            assert (linear.weight.dtype, linear.scales.dtype) == (np.int8, np.float32)
            assert linear.bias.dtype == np.float32
            assert linear.weight.min() >= -127
    assert isinstance(made.bert.words, Int8Table)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_stays_close_to_the_float_encoder(activation):
    bert = make(activation)
    int8 = quantize_static(bert, collect_activations(bert, token_ids(0))).bert
    assert cosines(hidden(bert, IDS).mean(0), hidden(int8, IDS).mean(0)).min() > 0.995


def test_taken_back_to_float_the_transformations_are_exact_but_for_the_weights(bert, made):
    assert all(note["down"]["copies"] == 0 for note in made.layers)
    plain, back = hidden(bert, IDS), hidden(floated(made.bert), IDS)
    assert cosines(plain, back).min() > 0.999


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_shift_and_smoothing_leave_the_float_function_as_it_was(monkeypatch, exponent, shift):
    """With weights that are hardly rounded, almost nothing is left to differ."""
    bert = make(outliers=3)
    seen = collect_activations(bert, token_ids(0))
    force(monkeypatch, exponents=[exponent], shifts=[shift])
    fine = 2.0**-20
    monkeypatch.setattr(
        transforms,
        "quantize_gptq",
        lambda weight, _: (np.rint(weight / fine), np.full(weight.shape[1], fine, np.float32)),
    )
    monkeypatch.setattr(quantize, "quantize_table", lambda table: table)
    monkeypatch.setattr(
        quantize, "fit_outlier_split", lambda *given: replace(fit_outlier_split(*given), error=0.5)
    )  # down stays float32, and without copies
    back = floated(quantize_static(bert, seen).bert)
    before = [bert.norm, *(layer.attention_norm for layer in bert.layers), bert.layers[0].norm]
    after = [back.norm, *(layer.attention_norm for layer in back.layers), back.layers[0].norm]
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.bias, new.bias) == (shift == 0)
        assert np.array_equal(old.weight, new.weight)
    assert hidden(back, IDS) == pytest.approx(hidden(bert, IDS), abs=3e-4)


def test_the_last_norm_is_not_shifted(bert, made):
    assert np.array_equal(made.bert.layers[-1].norm.bias, bert.layers[-1].norm.bias)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_copies_of_outlier_columns_add_up(activation):
    bert = make(activation, outliers=12, intermediate_size=96)
    made = quantize_static(bert, collect_activations(bert, token_ids(0)))
    copied = [note["down"]["copies"] for note in made.layers]
    assert max(copied) > 0
    for layer, copies in zip(made.bert.layers, copied, strict=True):
        extra = layer.up.weight.shape[1] - 96
        assert (extra % CHANNEL_STEP, extra >= copies) == (0, True)
        assert len(layer.down.weight) == 96 + extra
    assert cosines(hidden(bert, IDS).mean(0), hidden(made.bert, IDS).mean(0)).min() > 0.99


def test_padding_columns_compute_nothing():
    bert = make("relu", outliers=12, intermediate_size=96)
    made = quantize_static(bert, collect_activations(bert, token_ids(0)))
    layer, note = next(
        (layer, note)
        for layer, note in zip(made.bert.layers, made.layers, strict=True)
        if note["down"]["copies"]
    )
    idle = slice(96 + note["down"]["copies"], None)
    assert not layer.down.weight[idle].any()
    assert not layer.up.weight[:, idle].any()


# What stays float32


def test_a_budget_of_zero_keeps_every_linear(bert, seen, monkeypatch):
    monkeypatch.setattr(quantize, "quantize_table", lambda table: table)
    made = quantize_static(bert, seen, budget=0)
    assert all(chosen["kept"] == "float32" for note in made.layers for chosen in note.values())
    for layer in made.bert.layers:
        assert all(isinstance(getattr(layer, name), Linear) for name in LINEARS)
    assert np.abs(hidden(made.bert, IDS) - hidden(bert, IDS)).max() < 1e-5


@pytest.mark.parametrize("kept", [*((group,) for group in GROUPS), ("up", "down"), GROUPS[:2]])
def test_linears_above_the_budget_stay_float32_and_are_noted(monkeypatch, bert, seen, kept):
    keep(monkeypatch, *kept)
    made = quantize_static(bert, seen)
    for layer, note in zip(made.bert.layers, made.layers, strict=True):
        for group in GROUPS:
            kind = Linear if group in kept else StaticLinear
            assert all(isinstance(getattr(layer, n), kind) for n in group.split(", "))
            assert note[group].get("kept") == ("float32" if group in kept else None)
    for layout in ("portable", "run"):
        build_encoder(made.bert, layout)
    assert cosines(hidden(bert, IDS).mean(0), hidden(made.bert, IDS).mean(0)).min() > 0.995


@pytest.mark.parametrize("kept", GROUPS)
def test_shifts_are_taken_back_whatever_is_kept(monkeypatch, kept):
    bert = make(outliers=3)
    seen = collect_activations(bert, token_ids(0))
    keep(monkeypatch, kept)
    made = quantize_static(bert, seen)
    assert cosines(hidden(bert, IDS).mean(0), hidden(made.bert, IDS).mean(0)).min() > 0.99


def test_an_error_that_is_not_a_number_keeps_float32(monkeypatch, bert, seen):
    monkeypatch.setattr(
        quantize,
        "fit_outlier_split",
        lambda *given: replace(fit_outlier_split(*given), error=float("nan")),
    )
    made = quantize_static(bert, seen)
    assert all(isinstance(layer.down, Linear) for layer in made.bert.layers)
    assert all(note["down"]["kept"] == "float32" for note in made.layers)


# Notes, and the same again


def test_notes_say_what_was_chosen_and_are_json(made):
    assert len(made.layers) == 2
    for note in made.layers:
        assert set(note) == set(GROUPS)
        assert all(0 < chosen["error"] < ERROR_BUDGET for chosen in note.values())
        assert set(note["down"]) == {"error", "range", "copies"}
    assert json.loads(json.dumps(made.layers)) == list(made.layers)


def test_the_arguments_are_left_alone(seen):
    bert = make()
    before = {name: part.rows.copy() for name, part in seen.items()}
    quantize_static(bert, seen)
    assert build_encoder(bert).SerializeToString() == build_encoder(make()).SerializeToString()
    assert all(np.array_equal(seen[name].rows, before[name]) for name in seen)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_same_again_gives_the_same_bytes_on_any_number_of_threads(
    monkeypatch, bert, seen, made, workers
):
    monkeypatch.setattr(quantize, "available_cpus", lambda: workers)
    again = quantize_static(bert, seen)
    assert again.layers == made.layers
    assert build_encoder(again.bert).SerializeToString() == (
        build_encoder(made.bert).SerializeToString()
    )


def test_a_quantized_encoder_is_not_quantized_again(made, seen):
    with pytest.raises(TypeError, match="quantized already"):
        quantize_static(made.bert, seen)


def test_ranges_cover_what_was_seen(made, seen):
    for number, layer in enumerate(made.bert.layers):
        attention, context, _, up = (seen[name] for name in input_names(number))
        assert layer.query.input is layer.key.input is layer.value.input
        how = layer.output.input
        low = -int(how.zero_point) * how.scale
        assert low <= context.low.min() + how.scale / 2
        assert low + 255 * how.scale >= context.high.max() - how.scale / 2
        assert attention.rows.shape[1] == len(layer.query.weight)
        inner = activation_function("gelu")(up.high)
        assert (
            255 - int(layer.down.input.zero_point)
        ) * layer.down.input.scale <= 1.2 * inner.max()
