"""Fixed uint8 quantization ranges for the inputs of linear layers, searched on measured output error.

Two transformations keep one range for all channels from being too coarse; the float32 layer computes
the same with either. *Smoothing* (SmoothQuant, arXiv:2211.10438): channels are divided by factors that
the weights absorb. *Outlier-channel splitting* (arXiv:1901.09504), here by saturation: the range ends
at R, and a channel that exceeds R gets split channels, lowered by R, 2 R, ...: each saturates at R, and
together they add up to the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.encoder import Linear
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.gptq import quantize_gptq, quantize_nearest
from onnxsim_embed.runtime.pooling import gelu

Float32 = npt.NDArray[np.float32]
Activation = Callable[[Float32], Float32]

# Relative squared output error (noise over signal) above which a linear stays float32. A healthy one
# lies near 0.0003, the worst of MiniLM near 0.001.
ERROR_BUDGET = 0.02

EXPONENTS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
SHIFTS = (0.0, 0.5, 1.0)
SEARCH_ROWS = 1024  # tokens that the search looks at; more do not change what it chooses
RANGE_STEPS = (
    16  # ranges tried for an input with outlier channels, from an eighth of its maximum on
)

# Share of tokens at either end of a channel that a range excludes; a sample of fewer than twice its
# inverse is too small to tell, and its extremes count. On unseen texts a thousandth was never worse
# than the extremes and better for very short ones; five thousandths were worse, and so were extremes
# narrowed by 5 or widened by 10 %.
OUTERMOST = 0.001

# Split channels hold this multiple of the largest value seen: a channel that exceeds them saturates,
# which costs far more than a coarser step.
HEADROOM = 1.15

# At most one split channel per this many channels, so that they cost about 2 % of a layer; before an
# activation in steps of 16, as rows stay whole vector registers.
CHANNELS_PER_SPLIT = 48
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


@dataclass(frozen=True)
class Smoothing:
    """A way to quantize an input: round_trip((x + shift) * multiplier), and its `output_error`."""

    range: Range
    exponent: float  # how much of the range moved onto the weights; 0 for none
    shift: Float32
    multiplier: Float32
    error: float = 0.0

    def apply(self, rows: Float32) -> Float32:
        """Return inputs (tokens, channels) as the quantized linears receive them."""
        return self.range.round_trip((rows + self.shift) * self.multiplier)

    def transform(self, linear: Linear) -> Linear:
        """Return the float32 linear that computes the same from transformed inputs."""
        weight = np.asarray(linear.weight / self.multiplier[:, None], np.float32)
        return Linear(weight, bias_of(linear) - self.shift @ linear.weight)


@dataclass(frozen=True)
class ChannelSplit:
    """A range for an input, split channels that carry what exceeds it, and the `output_error`."""

    range: Range
    columns: npt.NDArray[np.int64]  # (splits,), the channel that each repeats
    offsets: Float32  # (splits,), by how much each is lowered
    floor: float  # the value of a split channel while its channel stays within the range
    padding: tuple[int, int]  # zero channels behind the split ones, as numpy.pad takes them
    activation: Activation | None  # between lowering and quantizing
    error: float = 0.0

    def apply(self, rows: Float32, activated: Float32 | None = None) -> Float32:
        """Return inputs as the quantized linears receive them; `activated` is rows' activation if known."""
        split = rows[:, self.columns] - self.offsets
        if self.activation:
            rows = self.activation(rows) if activated is None else activated
            split = self.activation(split)
        quantized = self.range.round_trip(np.concatenate([rows, split], axis=1))
        return np.pad(quantized, ((0, 0), self.padding))

    def transform(self, linear: Linear) -> Linear:
        """Return the float32 linear that computes the same from inputs with split channels."""
        rows = linear.weight[self.columns]
        weight = np.concatenate([linear.weight, np.pad(rows, (self.padding, (0, 0)))])
        return Linear(weight, bias_of(linear) - np.float32(self.floor) * rows.sum(axis=0))

    def transform_previous(self, linear: Linear) -> Linear:
        """Return the linear before the activation with lowered split channels among its outputs."""
        weight = np.pad(linear.weight[:, self.columns], ((0, 0), self.padding))
        bias = np.pad(bias_of(linear)[self.columns] - self.offsets, self.padding)
        return Linear(
            np.concatenate([linear.weight, weight], axis=1), np.concatenate([bias_of(linear), bias])
        )


Fit = Smoothing | ChannelSplit


def bias_of(linear: Linear) -> Float32:
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
) -> Smoothing:
    """Choose exponent, shift and range of the input that linears with these weights share.

    First the exponent at half a shift, then the shift at that exponent: nearly independent, and half
    the work of trying every combination.
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
        fit = Smoothing(span, exponent, shift, multiplier)
        return replace(fit, error=output_error(fit, fit.apply(rows), outputs, weights, final))

    middle = shifts[len(shifts) // 2]
    first = sorted((candidate(exponent, middle) for exponent in exponents), key=lambda f: f.error)
    # GPTQ, which the export uses, forgives the weights more than nearest rounding: it decides between
    # the best two, as it costs ten times as much.
    finalists = [candidate(fit.exponent, middle, final=True) for fit in first[:2]]
    best = min(finalists, key=lambda fit: fit.error)
    others = (candidate(best.exponent, shift, final=True) for shift in shifts if shift != middle)
    return min((best, *others), key=lambda fit: fit.error)


def channel_range(seen: Activations) -> tuple[Float32, Float32]:
    """Return the lowest and highest value of each channel that a range must hold."""
    if len(seen.rows) < 2 / OUTERMOST:
        return seen.low, seen.high
    low, high = np.quantile(seen.rows, [OUTERMOST, 1 - OUTERMOST], axis=0)
    return low.astype(np.float32), high.astype(np.float32)


def smoothing_multiplier(inputs: Float32, weights: Float32, exponent: float) -> Float32:
    """Return SmoothQuant's factors, the inverse of max|x|^a / max|w|^(1-a), of geometric mean 1.

    From the maximum magnitude of each input channel and weight row; an exponent a of 0 gives ones.
    """
    if exponent == 0:
        return np.ones_like(inputs)
    x, w = (np.maximum(value, 1e-5).astype(np.float64) for value in (inputs, weights))
    logs = exponent * np.log(x) - (1 - exponent) * np.log(w)
    return np.exp(logs.mean() - logs).astype(np.float32)


def fit_outlier_split(
    seen: Activations, weights: Sequence[Float32], activation: Activation | None = None
) -> ChannelSplit:
    """Choose the range and the split channels of the input that linears with these weights share.

    :param seen: the input; or what the activation takes that computes it.
    """
    activate: Activation = activation or (lambda values: values)
    rows = subsample(seen.rows, SEARCH_ROWS)
    inputs = activate(rows)
    outputs = [inputs @ weight for weight in weights]
    highest = activate(seen.high) * np.float32(HEADROOM)
    low = min(float(inputs.min()), float(activate(seen.low).min()))
    # Levels remain above zero even where no value is.
    top = max(float(highest.max()), -low / 16, 1e-6)

    def candidate(bound: float) -> ChannelSplit | None:
        span = Range.of(low, bound)
        floor, end = (0.0 if activation else span.ends[0]), span.ends[1]
        # Up to half a step above the range is no more than rounding.
        columns, offsets = plan_split_channels(highest - floor - span.scale / 2, end - floor)
        if len(columns) > max(1, len(highest) // CHANNELS_PER_SPLIT):
            return None
        padding = 0, (-len(columns) % CHANNEL_STEP if activation else 0)
        fit = ChannelSplit(span, columns, offsets, floor, padding, activation)
        return replace(fit, error=output_error(fit, fit.apply(rows, inputs), outputs, weights))

    # The last candidate covers everything without split channels.
    candidates = map(candidate, np.geomspace(top / 8, top, RANGE_STEPS).tolist())
    best = min((fit for fit in candidates if fit is not None), key=lambda fit: fit.error)
    if activation:
        return best
    # GPTQ, as in the export: comparable with the error of a smoothing.
    return replace(best, error=output_error(best, best.apply(rows), outputs, weights, final=True))


def plan_split_channels(highest: Float32, top: float) -> tuple[npt.NDArray[np.int64], Float32]:
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
    outputs: Sequence[Float32],
    weights: Sequence[Float32],
    final: bool = False,
) -> float:
    """Return the quantized linears' mean squared error, relative to the variance of their outputs.

    :param inputs: as the quantized linears receive them.
    :param outputs: of the float32 linears, without bias.
    :param final: round weights with GPTQ, as the export does, not to the nearest level.
    """
    errors = []
    for output, weight in zip(outputs, weights, strict=True):
        linear = fit.transform(Linear(weight, None))
        weight = linear.weight
        values, scales = quantize_gptq(weight, inputs) if final else quantize_nearest(weight)
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
    if name in ("gelu", "relu"):
        return gelu if name == "gelu" else lambda x: np.maximum(x, np.float32(0))

    def gelu_tanh(x: Float32) -> Float32:
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(x * (1 + np.tanh(inner)) / 2, np.float32)

    return gelu_tanh
