"""Fixed uint8 quantization ranges for the inputs of linear layers, searched on measured output error.

Three ways keep one range for all channels from being too coarse; the float32 layer computes the same
with each. *Float channels* (LLM.int8(), arXiv:2208.07339): the largest channels leave the int8 product
for a small float32 one beside it. *Smoothing* (SmoothQuant, arXiv:2211.10438): channels are divided by factors that
the weights absorb. *Outlier-channel splitting* (arXiv:1901.09504), here by saturation: the range ends
at R, and a channel that exceeds R gets split channels, lowered by R, 2 R, ...: each saturates at R, and
together they add up to the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxsim_embed.export.encoder import AnyLinear, Linear
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.gptq import quantize_nearest
from onnxsim_embed.system.arrays import Float32, Int64

Activation = Callable[[Float32], Float32]

EXPONENTS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
SHIFTS = (0.0, 0.5, 1.0)
# Tokens and output channels that the search looks at; more do not change what it chooses.
SEARCH_ROWS, SEARCH_OUTPUTS = 512, 96
# Ranges tried for an input with outlier channels: from this share of its maximum on, as channels of 100
# beside others of 6 occur, each this much wider than the one before.
SMALLEST_RANGE, RANGE_STEP = 1 / 64, 1.1

# GPTQ leaves about this share of the error of nearest rounding, which the search computes as it costs
# a tenth.
GPTQ_ERROR = np.float32(0.5)

# An output channel that hardly varies counts as if it had this share of the mean variance.
LEAST_VARIANCE = 1e-4

# Split channels hold this multiple of the largest value seen: a channel that exceeds them saturates,
# which costs far more than a coarser step.
HEADROOM = 1.15

# At most one split channel per this many channels: the first costs about 1 % of a layer, the others are
# for where that gains more than anything else. Before an activation in steps of 16, as rows stay whole
# vector registers.
CHANNELS_PER_SPLIT = (96, 48, 24, 12)
CHANNEL_STEP = 16


@dataclass(frozen=True)
class Range:
    """A uint8 range: real value = (q - zero_point) * scale."""

    scale: np.float32
    zero_point: np.uint8

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """Return the range that covers [low, high] and zero."""
        low, high = min(0.0, low), max(0.0, high)
        scale = max((high - low) / 255, 1e-8)
        return cls(np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, 255)))

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest representable value."""
        zero, scale = int(self.zero_point), float(self.scale)
        return -zero * scale, (255 - zero) * scale

    def round_trip(self, values: Float32) -> Float32:
        """Quantize and dequantize."""
        zero = np.float32(self.zero_point)
        levels = np.clip(np.rint(values / self.scale) + zero, 0, 255)
        return (levels - zero) * self.scale


@dataclass(frozen=True, eq=False)
class Smoothing:
    """A way to quantize an input: round_trip((x + shift) * multiplier), and its `output_error`."""

    range: Range
    exponent: float  # how much of the range moved onto the weights; 0 for none
    shift: Float32
    multiplier: Float32
    float_channels: Int64
    error: float = 0.0

    def apply(self, rows: Float32) -> Float32:
        """Return inputs (tokens, channels) as the quantized linears receive them."""
        inputs = self.range.round_trip(self.exact(rows))
        inputs[:, self.float_channels] = 0  # their weights are zero
        return inputs

    def exact(self, rows: Float32) -> Float32:
        """Return inputs as `apply` does, but for rounding and saturation."""
        return (rows + self.shift) * self.multiplier

    def transform(self, linear: Linear) -> Linear:
        """Return the float32 linear that computes the same from transformed inputs and float channels."""
        weight = np.asarray(linear.weight / self.multiplier[:, None], np.float32)
        weight[self.float_channels] = 0
        return Linear(weight, bias_of(linear) - self.shift @ linear.weight)


@dataclass(frozen=True, eq=False)
class ChannelSplit:
    """A range for an input, split channels that carry what exceeds it, and the `output_error`."""

    range: Range
    columns: Int64  # (splits,), the channel that each repeats
    offsets: Float32  # (splits,), by how much each is lowered
    floor: float  # the value of a split channel while its channel stays within the range
    padding: tuple[int, int]  # zero channels behind the split ones, as numpy.pad takes them
    activation: Activation | None  # between lowering and quantizing
    float_channels: Int64
    error: float = 0.0

    def apply(self, rows: Float32, activated: Float32 | None = None) -> Float32:
        """Return inputs as the quantized linears receive them; `activated` is rows' activation if known."""
        split = rows[:, self.columns] - self.offsets
        if self.activation:
            rows = self.activation(rows) if activated is None else activated
            split = self.activation(split)
        quantized = self.range.round_trip(np.concatenate([rows, split], axis=1))
        quantized[:, self.float_channels] = 0  # their weights are zero
        return np.pad(quantized, ((0, 0), self.padding))

    def exact(self, rows: Float32) -> Float32:
        """Return inputs as `apply` does, but for rounding and saturation."""
        rows = self.activation(rows) if self.activation else rows
        idle = np.full((len(rows), len(self.columns)), self.floor, np.float32)
        return np.pad(np.concatenate([rows, idle], axis=1), ((0, 0), self.padding))

    def transform(self, linear: Linear) -> Linear:
        """Return the float32 linear that computes the same from inputs with split and float channels."""
        rows = linear.weight[self.columns]
        weight = np.concatenate([linear.weight, np.pad(rows, (self.padding, (0, 0)))])
        weight[self.float_channels] = 0
        return Linear(weight, bias_of(linear) - np.float32(self.floor) * rows.sum(axis=0))


Fit = Smoothing | ChannelSplit


def bias_of(linear: AnyLinear) -> Float32:
    """Return a linear's bias, zeros where it has none."""
    if linear.bias is None:
        return np.zeros(linear.weight.shape[1], np.float32)
    return linear.bias


def fit_smoothing(
    seen: Activations,
    weights: Sequence[Float32],
    *,
    exponents: Iterable[float] = EXPONENTS,
    shifts: Sequence[float] = SHIFTS,
    channels: int = 0,
) -> Smoothing:
    """Choose exponent, shift and range of the input that linears with these weights share.

    First the exponent at half a shift, then the shift at that exponent: nearly independent, and half
    the work of trying every combination.

    :param channels: number of float channels, the largest.
    """
    rows = subsample(seen.rows, SEARCH_ROWS)
    weight_maxima = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    weights = [subsample(weight.T, SEARCH_OUTPUTS).T for weight in weights]
    outputs = [rows @ weight for weight in weights]
    lowest, highest = seen.ends
    float_channels = largest(np.maximum(-lowest, highest), channels)

    def candidate(exponent: float, fraction: float) -> Smoothing:
        shift = (-(lowest + highest) * np.float32(fraction / 2)).astype(np.float32)
        low, high = lowest + shift, highest + shift
        low[float_channels] = high[float_channels] = 0
        multiplier = smoothing_multiplier(np.maximum(-low, high), weight_maxima, exponent)
        span = Range.of(float((low * multiplier).min()), float((high * multiplier).max()))
        fit = Smoothing(span, exponent, shift, multiplier, float_channels)
        return replace(
            fit, error=output_error(fit, fit.apply(rows), rows + shift, outputs, weights)
        )

    middle = shifts[len(shifts) // 2]
    best = min((candidate(exponent, middle) for exponent in exponents), key=lambda fit: fit.error)
    others = (candidate(best.exponent, shift) for shift in shifts if shift != middle)
    return min((best, *others), key=lambda fit: fit.error)


def largest(magnitudes: Float32, channels: int) -> Int64:
    """Return the largest channels, in their order."""
    return np.sort(np.argsort(-magnitudes, kind="stable")[:channels]).astype(np.int64)


def smoothing_multiplier(inputs: Float32, weights: Float32, exponent: float) -> Float32:
    """Return SmoothQuant's factors, the inverse of max|x|^a / max|w|^(1-a), of geometric mean 1.

    From the maximum magnitude of each input channel and weight row; an exponent a of 0 gives ones, and
    so does an input that is always 0.
    """
    if exponent == 0 or not (used := inputs > 0).any():
        return np.ones_like(inputs)
    x, w = (np.maximum(value[used], 1e-5).astype(np.float64) for value in (inputs, weights))
    logs = exponent * np.log(x) - (1 - exponent) * np.log(w)
    multiplier = np.ones_like(inputs)
    multiplier[used] = np.exp(logs.mean() - logs)
    return multiplier


def fit_outlier_splits(
    seen: Activations,
    weights: Sequence[Float32],
    activation: Activation | None = None,
    channels: int = 0,
) -> list[ChannelSplit]:
    """Choose the range and the split channels of the input that linears with these weights share.

    :param seen: the input; or what the activation takes that computes it.
    :param channels: number of float channels, the largest.
    :returns: the best with few split channels, and those that gain with more, at each CHANNELS_PER_SPLIT.
    """
    activate: Activation = activation or (lambda values: values)
    rows = subsample(seen.rows, SEARCH_ROWS)
    inputs = activate(rows)
    weights = [subsample(weight.T, SEARCH_OUTPUTS).T for weight in weights]
    outputs = [inputs @ weight for weight in weights]
    highest = activate(seen.high) * np.float32(HEADROOM)
    float_channels = largest(highest, channels)
    highest[float_channels] = 0
    lowest = np.minimum(inputs.min(axis=0), activate(seen.low))
    low = float(np.delete(lowest, float_channels).min())
    # Levels remain above zero even where no value is.
    least = max(-low / 16, 1e-6)
    top = max(float(highest.max()), least)

    limits = [max(1, len(highest) // per_split) for per_split in CHANNELS_PER_SPLIT]

    def candidate(bound: float) -> ChannelSplit | None:
        span = Range.of(low, bound)
        floor, end = (0.0 if activation else span.ends[0]), span.ends[1]
        # Up to half a step above the range is no more than rounding.
        columns, offsets = plan_split_channels(highest - floor - span.scale / 2, end - floor)
        if len(columns) > limits[-1]:
            return None
        padding = 0, (-len(columns) % CHANNEL_STEP if activation else 0)
        fit = ChannelSplit(span, columns, offsets, floor, padding, activation, float_channels)
        error = output_error(fit, fit.apply(rows, inputs), inputs, outputs, weights)
        return replace(fit, error=error)

    # The last candidate covers everything without split channels.
    steps = math.ceil(math.log(1 / SMALLEST_RANGE, RANGE_STEP)) + 1
    bounds = np.geomspace(max(top * SMALLEST_RANGE, least), top, steps).tolist()
    fits = [fit for fit in map(candidate, bounds) if fit is not None]
    best = [
        min((fit for fit in fits if len(fit.columns) <= limit), key=lambda fit: fit.error)
        for limit in limits
    ]
    return [fit for row, fit in enumerate(best) if fit not in best[:row]]


def plan_split_channels(highest: Float32, top: float) -> tuple[Int64, Float32]:
    """Split each channel whose highest value exceeds `top` as often as it takes to hold that value.

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
    exact: Float32,
    outputs: Sequence[Float32],
    weights: Sequence[Float32],
) -> float:
    """Return the quantized linears' squared error relative to the variance, mean over output channels.

    Every output channel counts alike: one of a BERT-base layer may hold 99 % of the variance.

    :param inputs: as the quantized linears receive them.
    :param exact: as the float channels receive them.
    :param outputs: of the float32 linears, without bias.
    """
    errors = []
    for output, weight in zip(outputs, weights, strict=True):
        linear = fit.transform(Linear(weight, None))
        values, scales = quantize_nearest(linear.weight)
        rounded = linear.weight + GPTQ_ERROR * (values * scales - linear.weight)
        error = inputs @ rounded + bias_of(linear) - output
        error += exact[:, fit.float_channels] @ weight[fit.float_channels]
        variance = output.var(axis=0)
        variance = np.maximum(variance, max(LEAST_VARIANCE * float(variance.mean()), 1e-12))
        errors.append(float((np.square(error).mean(axis=0) / variance).mean()))
    return float(np.mean(errors))


def subsample(rows: Float32, limit: int) -> Float32:
    """Return at most `limit` rows, evenly spaced."""
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
