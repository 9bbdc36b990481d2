"""Which fixed uint8 range the input of a linear gets: a search on measured output error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.bert import InputQuantization
from onnxsim_embed.export.quantization.calibration import Activations
from onnxsim_embed.export.quantization.gptq import round_nearest, round_weight
from onnxsim_embed.runtime.pooling import gelu

Float32 = npt.NDArray[np.float32]
Activation = Callable[[Float32], Float32]

EXPONENTS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
SHIFTS = (0.0, 0.5, 1.0)

# The search looks at so many tokens; more do not change what it chooses.
SEARCH_ROWS = 1024

# Ranges tried for an activation with outlier channels, from an eighth of its reach to all of it.
RANGE_STEPS = 16

# Share of tokens at either end of a channel that a range need not hold; a sample of fewer than twice
# its inverse is too small to tell, and its extremes count.
OUTERMOST = 0.001

# Copies reach this much beyond the largest value seen: a channel that outgrows its copies is cut off,
# which costs far more than a coarser step.
COPY_HEADROOM = 1.15

# Copies of outlier channels: at most one column in so many, so that they cost about 2 % of a layer.
COLUMNS_PER_COPY = 48


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
    def top(self) -> float:
        """The largest value that it holds."""
        return float(255 - int(self.zero_point)) * float(self.scale)

    def round_trip(self, values: Float32) -> Float32:
        """Return what values become through uint8 and back."""
        zero = np.float32(self.zero_point)
        steps = np.clip(np.rint(values / self.scale) + zero, 0, 255)
        return (steps - zero) * self.scale


@dataclass(frozen=True)
class Smoothing:
    """A way to quantize one input: round_trip((x + shift) * multiplier).

    :param error: mean over the linears of squared output error over output variance.
    :param exponent: how much of the range moved onto the weights; 0 none.
    """

    error: float
    exponent: float
    shift: Float32
    multiplier: Float32
    range: Range

    def apply(self, rows: Float32) -> Float32:
        """Return what the linears will see of inputs, float32 array (tokens, in_features)."""
        return self.range.round_trip((rows + self.shift) * self.multiplier)

    def quantization(self) -> InputQuantization:
        """Return it as the graph takes it."""
        multiplier = None if self.exponent == 0 else self.multiplier
        return InputQuantization(self.range.scale, self.range.zero_point, multiplier)


def fit_smoothing(
    seen: Activations,
    weights: Sequence[Float32],
    *,
    exponents: Iterable[float] = EXPONENTS,
    shifts: Iterable[float] = SHIFTS,
) -> Smoothing:
    """Choose exponent, shift and range of one input.

    First the exponent at half a shift, then the shift at that exponent: nearly independent, and half
    the work of trying every combination.

    :param seen: the input over the calibration texts.
    :param weights: float32 arrays (in_features, out_features) of the linears that take it.
    """
    rows = spread_rows(seen.rows, SEARCH_ROWS)
    exact = [rows @ weight for weight in weights]
    reach = np.abs(np.concatenate(weights, axis=1)).max(axis=1)

    lowest, highest = channel_reach(seen)

    def trial(exponent: float, part: float, final: bool = False) -> Smoothing:
        shift = (-(lowest + highest) * np.float32(part / 2)).astype(np.float32)
        low, high = lowest + shift, highest + shift
        multiplier = smoothing_multiplier(np.maximum(-low, high), reach, exponent)
        span = Range.of(float((low * multiplier).min()), float((high * multiplier).max()))
        made = Smoothing(0.0, exponent, shift, multiplier, span)
        scaled = [weight / multiplier[:, None] for weight in weights]
        # What the shift adds, the bias takes back.
        targets = [y + shift @ weight for y, weight in zip(exact, weights, strict=True)]
        return replace(made, error=output_error(made.apply(rows), targets, scaled, final))

    shifts = tuple(shifts)
    middle = shifts[len(shifts) // 2]
    first = sorted((trial(exponent, middle) for exponent in exponents), key=lambda t: t.error)
    # The rounding that the export uses forgives the weights more than the nearest one: it decides
    # between the best two, as it costs ten times as much.
    finalists = [trial(fit.exponent, middle, final=True) for fit in first[:2]]
    best = min(finalists, key=lambda t: t.error)
    others = (trial(best.exponent, part, final=True) for part in shifts if part != middle)
    return min((best, *others), key=lambda t: t.error)


def channel_reach(seen: Activations) -> tuple[Float32, Float32]:
    """Return the low and high end of each channel that a range must hold.

    The outermost thousandth of the sampled tokens is left out. On texts that calibration did not see
    this was never worse than the extremes and better for very short ones; leaving out five
    thousandths was worse, and so were extremes made narrower by 5 or wider by 10 %.

    :returns: float32 arrays (channels,).
    """
    if len(seen.rows) < 2 / OUTERMOST:
        return seen.low, seen.high
    low, high = np.quantile(seen.rows, [OUTERMOST, 1 - OUTERMOST], axis=0)
    return low.astype(np.float32), high.astype(np.float32)


def smoothing_multiplier(inputs: Float32, weights: Float32, exponent: float) -> Float32:
    """Return the factors that even out the channels of an input (SmoothQuant, arXiv:2211.10438).

    Their inverse is max|x|^a / max|w|^(1-a), scaled to a geometric mean of 1; an exponent a of 0 means
    no smoothing and gives ones.

    :param inputs: float32 array (channels,), largest magnitude of each input channel.
    :param weights: float32 array (channels,), largest magnitude of each weight row.
    """
    if exponent == 0:
        return np.ones_like(inputs)
    x, w = (np.maximum(value, 1e-5).astype(np.float64) for value in (inputs, weights))
    logs = exponent * np.log(x) - (1 - exponent) * np.log(w)
    return np.exp(logs.mean() - logs).astype(np.float32)


@dataclass(frozen=True)
class Split:
    """A range for the activation's output, and copies of the columns that reach beyond it.

    :param columns: int64 array (copies,), the column that each copy repeats.
    :param offsets: float32 array (copies,), by how much its input is lowered.
    """

    error: float
    range: Range
    columns: npt.NDArray[np.int64]
    offsets: Float32

    def apply(self, rows: Float32, activation: Activation) -> Float32:
        """Return what `down` will see: float32 array (tokens, inner + copies)."""
        copies = activation(rows[:, self.columns] - self.offsets)
        return self.range.round_trip(np.concatenate([activation(rows), copies], axis=1))


def fit_outlier_split(seen: Activations, activation: Activation, weight: Float32) -> Split:
    """Choose the range of the activation's output, and the copies of outlier channels.

    :param seen: what the activation takes, over the calibration texts.
    :param activation: the function between `up` and `down`.
    :param weight: float32 array (inner, hidden), of `down`.
    """
    rows = spread_rows(seen.rows, SEARCH_ROWS)
    inner = activation(rows)
    exact = inner @ weight
    highest = activation(seen.high) * np.float32(COPY_HEADROOM)
    low = min(float(inner.min()), float(activation(seen.low).min()))
    # Steps remain above zero even where no channel ever gets there.
    top = max(float(highest.max()), -low / 16, 1e-6)

    def trial(bound: float) -> Split | None:
        span = Range.of(low, bound)
        # Up to half a step beyond the top is no more than rounding.
        columns, offsets = plan_split_columns(highest - span.scale / 2, span.top)
        if len(columns) > len(weight) // COLUMNS_PER_COPY:
            return None
        copies = activation(rows[:, columns] - offsets)
        inputs = span.round_trip(np.concatenate([inner, copies], axis=1))
        stacked = np.concatenate([weight, weight[columns]])
        return Split(output_error(inputs, [exact], [stacked]), span, columns, offsets)

    trials = [trial(float(bound)) for bound in np.geomspace(top / 8, top, RANGE_STEPS)]
    # The last trial covers everything without copies.
    return min((made for made in trials if made is not None), key=lambda made: made.error)


def plan_split_columns(highest: Float32, top: float) -> tuple[npt.NDArray[np.int64], Float32]:
    """Give each channel that exceeds `top` as many copies as hold its largest value.

    :param highest: float32 array (channels,), largest value of each.
    :returns: the column of each copy, and by how much its input is lowered.
    """
    # A hair of tolerance: a range that was made to end at the largest value must not need a copy.
    copies = np.maximum(np.ceil(highest / (top * 1.0001)).astype(np.int64) - 1, 0)
    columns = np.repeat(np.arange(len(highest)), copies)
    number = np.arange(len(columns)) - np.repeat(np.cumsum(copies) - copies, copies)
    return columns, (np.float32(top) * (number + 1)).astype(np.float32)


def output_error(
    inputs: Float32, exact: Sequence[Float32], weights: Sequence[Float32], final: bool = False
) -> float:
    """Return the mean relative squared error of inputs @ int8(weights) against `exact`.

    :param final: round as the export does, not to the nearest step.
    """
    errors = []
    for target, weight in zip(exact, weights, strict=True):
        values, scales = round_weight(weight, inputs) if final else round_nearest(weight)
        difference = inputs @ (values * scales) - target
        variance = max(float(target.var(axis=0).mean()), 1e-12)
        errors.append(float(np.square(difference).mean()) / variance)
    return float(np.mean(errors))


def spread_rows(rows: Float32, most: int) -> Float32:
    """Return at most so many rows, evenly spread over all."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def activation_function(name: str) -> Activation:
    """Return the activation of a BERT configuration as a numpy function."""

    def gelu_tanh(x: Float32) -> Float32:
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(x * (1 + np.tanh(inner)) / 2, np.float32)

    def relu(x: Float32) -> Float32:
        return np.maximum(x, np.float32(0))

    return {"gelu": gelu, "relu": relu}.get(name, gelu_tanh)
