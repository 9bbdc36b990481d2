"""Search for the quantization range of a linear's input, on measured output error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.bert import Linear
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.gptq import quantize_gptq, quantize_nearest
from onnxsim_embed.export.quantization.transforms import (
    Activation,
    ChannelSplit,
    Fit,
    Range,
    Smoothing,
    bias_of,
)
from onnxsim_embed.runtime.pooling import gelu

Float32 = npt.NDArray[np.float32]

# Relative squared output error (noise over signal) above which a linear stays float32. A healthy one
# lies near 0.0003, the worst of MiniLM near 0.001.
ERROR_BUDGET = 0.02

EXPONENTS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
SHIFTS = (0.0, 0.5, 1.0)

# Tokens that the search looks at; more do not change what it chooses.
SEARCH_ROWS = 1024

# Ranges tried for an input with outlier channels, from an eighth of its maximum to all of it.
RANGE_STEPS = 16

# Share of tokens at either end of a channel that a range may exclude; a sample of fewer than twice
# its inverse is too small to tell, and its extremes count.
OUTERMOST = 0.001

# Split channels hold this multiple of the largest value seen: a channel that exceeds them saturates,
# which costs far more than a coarser step.
HEADROOM = 1.15

# At most one split channel per this many channels, so that they cost about 2 % of a layer.
CHANNELS_PER_SPLIT = 48


def fit_smoothing(
    seen: Activations,
    weights: Sequence[Float32],
    *,
    exponents: Iterable[float] = EXPONENTS,
    shifts: Sequence[float] = SHIFTS,
) -> Smoothing:
    """Choose exponent, shift and range of one input by measured output error.

    First the exponent at half a shift, then the shift at that exponent: nearly independent, and half
    the work of trying every combination.

    :param seen: the input over the calibration texts.
    :param weights: float32 arrays (in_features, out_features) of the linears that take it.
    """
    rows = subsample(seen.rows, SEARCH_ROWS)
    outputs = [rows @ weight for weight in weights]
    weight_maxima = np.abs(np.concatenate(weights, axis=1)).max(axis=1)
    lowest, highest = channel_range(seen)

    def candidate(exponent: float, fraction: float, final: bool = False) -> Smoothing:
        shift = (-(lowest + highest) * np.float32(fraction / 2)).astype(np.float32)
        low, high = lowest + shift, highest + shift
        multiplier = smoothing_multiplier(np.maximum(-low, high), weight_maxima, exponent)
        span = Range.of(float((low * multiplier).min()), float((high * multiplier).max()))
        fit = Smoothing(0.0, exponent, shift, multiplier, span)
        error = output_error(fit, fit.apply(rows), outputs, weights, final=final)
        return replace(fit, error=error)

    middle = shifts[len(shifts) // 2]
    first = sorted((candidate(exponent, middle) for exponent in exponents), key=lambda f: f.error)
    # GPTQ, which the export uses, forgives the weights more than nearest rounding: it decides between
    # the best two, as it costs ten times as much.
    finalists = [candidate(fit.exponent, middle, final=True) for fit in first[:2]]
    best = min(finalists, key=lambda fit: fit.error)
    others = (candidate(best.exponent, shift, final=True) for shift in shifts if shift != middle)
    return min((best, *others), key=lambda fit: fit.error)


def channel_range(seen: Activations) -> tuple[Float32, Float32]:
    """Return the lowest and highest value of each channel that a range must hold.

    The outermost thousandth of the sampled tokens is excluded. On texts that calibration did not see
    this was never worse than the extremes and better for very short ones; excluding five thousandths
    was worse, and so were extremes narrowed by 5 or widened by 10 %.
    """
    if len(seen.rows) < 2 / OUTERMOST:
        return seen.low, seen.high
    low, high = np.quantile(seen.rows, [OUTERMOST, 1 - OUTERMOST], axis=0)
    return low.astype(np.float32), high.astype(np.float32)


def smoothing_multiplier(inputs: Float32, weights: Float32, exponent: float) -> Float32:
    """Return the factors that even out the channels of an input (SmoothQuant, arXiv:2211.10438).

    Their inverse is max|x|^a / max|w|^(1-a), scaled to a geometric mean of 1; an exponent a of 0 means
    no smoothing and gives ones.

    :param inputs: float32 array (channels,), maximum magnitude of each input channel.
    :param weights: float32 array (channels,), maximum magnitude of each weight row.
    """
    if exponent == 0:
        return np.ones_like(inputs)
    x, w = (np.maximum(value, 1e-5).astype(np.float64) for value in (inputs, weights))
    logs = exponent * np.log(x) - (1 - exponent) * np.log(w)
    return np.exp(logs.mean() - logs).astype(np.float32)


def fit_outlier_split(
    seen: Activations, weights: Sequence[Float32], activation: Activation | None = None
) -> ChannelSplit:
    """Choose the range of an input and its split channels by measured output error.

    :param seen: what the activation takes, or the input itself without one, over the calibration texts.
    :param weights: float32 arrays (in_features, out_features) of the linears that take the input.
    :param activation: the function before the linears, where the linear before it is ours to change.
    """
    function: Activation = activation or (lambda values: values)
    rows = subsample(seen.rows, SEARCH_ROWS)
    inputs = function(rows)
    outputs = [inputs @ weight for weight in weights]
    highest = function(seen.high) * np.float32(HEADROOM)
    low = min(float(inputs.min()), float(function(seen.low).min()))
    # Levels remain above zero even where no value is.
    top = max(float(highest.max()), -low / 16, 1e-6)

    def candidate(bound: float) -> ChannelSplit | None:
        span = Range.of(low, bound)
        floor = 0.0 if activation else span.low
        # Up to half a step above the range is no more than rounding.
        columns, offsets = plan_split_channels(highest - floor - span.scale / 2, span.high - floor)
        if len(columns) > max(1, len(highest) // CHANNELS_PER_SPLIT):
            return None
        fit = ChannelSplit(0.0, span, columns, offsets, activation)
        split = function(rows[:, columns] - offsets)
        quantized = span.round_trip(np.concatenate([inputs, split], axis=1))
        quantized = np.pad(quantized, ((0, 0), fit.padding))
        return replace(fit, error=output_error(fit, quantized, outputs, weights))

    # The last candidate covers everything without split channels.
    candidates = map(candidate, np.geomspace(top / 8, top, RANGE_STEPS).tolist())
    best = min((fit for fit in candidates if fit is not None), key=lambda fit: fit.error)
    if activation:
        return best
    # Comparable with the error of a smoothing: GPTQ, as in the export.
    error = output_error(best, best.apply(rows), outputs, weights, final=True)
    return replace(best, error=error)


def plan_split_channels(highest: Float32, top: float) -> tuple[npt.NDArray[np.int64], Float32]:
    """Give each channel that exceeds `top` as many split channels as hold its largest value.

    :param highest: float32 array (channels,), largest value of each.
    :returns: the channel that each split channel repeats, and by how much it is lowered.
    """
    # A hair of tolerance: a range that was made to end at the largest value must not need a split.
    splits = np.maximum(np.ceil(highest / (top * 1.0001)).astype(np.int64) - 1, 0)
    columns = np.repeat(np.arange(len(highest)), splits)
    number = np.arange(len(columns)) - np.repeat(np.cumsum(splits) - splits, splits)
    return columns, (np.float32(top) * (number + 1)).astype(np.float32)


def output_error(
    fit: Fit,
    inputs: Float32,
    outputs: Sequence[Float32],
    weights: Sequence[Float32],
    *,
    final: bool = False,
) -> float:
    """Return the mean relative squared error of the quantized linears.

    :param inputs: as the quantized linears receive them.
    :param outputs: of the float32 linears, without bias.
    :param final: round weights with GPTQ, as the export does, not to the nearest level.
    """
    errors = []
    for output, weight in zip(outputs, weights, strict=True):
        linear = fit.transform(Linear(weight, None))
        values, scales = (
            quantize_gptq(linear.weight, inputs) if final else quantize_nearest(linear.weight)
        )
        target = output - bias_of(linear)
        variance = max(float(target.var(axis=0).mean()), 1e-12)
        errors.append(float(np.square(inputs @ (values * scales) - target).mean()) / variance)
    return float(np.mean(errors))


def subsample(rows: Float32, limit: int) -> Float32:
    """Return at most `limit` rows, evenly spaced."""
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


def activation_function(name: str) -> Activation:
    """Return the activation of a BERT configuration as a numpy function."""

    def gelu_tanh(x: Float32) -> Float32:
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(x * (1 + np.tanh(inner)) / 2, np.float32)

    def relu(x: Float32) -> Float32:
        return np.maximum(x, np.float32(0))

    return {"gelu": gelu, "relu": relu}.get(name, gelu_tanh)
