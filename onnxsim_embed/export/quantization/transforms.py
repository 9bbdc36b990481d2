"""Fixed uint8 quantization of the inputs of linear layers, and the linears that go with it.

Two transformations keep one range for all channels from being too coarse. Neither changes what the
float32 layer computes:

*Smoothing* (SmoothQuant, arXiv:2211.10438): channels are divided by factors that the weights absorb.

*Outlier-channel splitting* (arXiv:1901.09504), here by saturation: the range ends at R, and a channel
that exceeds R gets split channels, lowered by R, 2 R, ...: each saturates at R, and together they add
up to the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.bert import InputQuantization, Linear, StaticLinear
from onnxsim_embed.export.quantization.gptq import quantize_gptq

Float32 = npt.NDArray[np.float32]
Activation = Callable[[Float32], Float32]

# Split channels before an activation come in steps of 16: rows stay whole vector registers.
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
    def low(self) -> float:
        """The smallest representable value."""
        return -float(self.zero_point) * float(self.scale)

    @property
    def high(self) -> float:
        """The largest representable value."""
        return float(255 - int(self.zero_point)) * float(self.scale)

    def round_trip(self, values: Float32) -> Float32:
        """Quantize and dequantize."""
        zero = np.float32(self.zero_point)
        levels = np.clip(np.rint(values / self.scale) + zero, 0, 255)
        return (levels - zero) * self.scale


@dataclass(frozen=True)
class Smoothing:
    """A way to quantize one input: round_trip((x + shift) * multiplier).

    :param error: mean over the linears of squared output error over output variance.
    :param exponent: how much of the range moved onto the weights; 0 for none.
    """

    error: float
    exponent: float
    shift: Float32
    multiplier: Float32
    range: Range

    def apply(self, rows: Float32) -> Float32:
        """Return inputs (tokens, channels) as the quantized linears receive them."""
        return self.range.round_trip((rows + self.shift) * self.multiplier)

    def transform(self, linear: Linear) -> Linear:
        """Return the float32 linear that computes the same from transformed inputs."""
        weight = np.asarray(linear.weight / self.multiplier[:, None], np.float32)
        return Linear(weight, bias_of(linear) - self.shift @ linear.weight)

    def quantization(self) -> InputQuantization:
        """Return the quantizer as the graph takes it."""
        multiplier = None if self.exponent == 0 else self.multiplier
        return InputQuantization(self.range.scale, self.range.zero_point, multiplier)

    def describe(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {"exponent": self.exponent} if self.exponent else {}


@dataclass(frozen=True)
class ChannelSplit:
    """A range for one input, and split channels that carry what exceeds it.

    :param columns: int64 array (splits,), the channel that each repeats.
    :param offsets: float32 array (splits,), by how much each is lowered.
    :param activation: the function between lowering and quantizing, if any.
    """

    error: float
    range: Range
    columns: npt.NDArray[np.int64]
    offsets: Float32
    activation: Activation | None = None

    @property
    def padding(self) -> tuple[int, int]:
        """Zero channels behind the split ones, as numpy.pad takes them."""
        return 0, (-len(self.columns) % CHANNEL_STEP if self.activation else 0)

    @property
    def floor(self) -> float:
        """What a split channel contributes while its channel is within the range."""
        return 0.0 if self.activation else self.range.low

    def apply(self, rows: Float32) -> Float32:
        """Return inputs (tokens, channels) as the quantized linears receive them."""
        values = np.concatenate([rows, rows[:, self.columns] - self.offsets], axis=1)
        values = self.range.round_trip(self.activation(values) if self.activation else values)
        return np.pad(values, ((0, 0), self.padding))

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
            np.concatenate([linear.weight, weight], axis=1),
            np.concatenate([bias_of(linear), bias]),
        )

    def quantization(self) -> InputQuantization:
        """Return the quantizer as the graph takes it."""
        return InputQuantization(self.range.scale, self.range.zero_point)

    def describe(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {"range": round(self.range.high, 3), "copies": len(self.columns)}


Fit = Smoothing | ChannelSplit


def quantize_linears(linears: Sequence[Linear], fit: Fit, rows: Float32) -> list[StaticLinear]:
    """Quantize linears of one input; GPTQ factors the second moments of the input once.

    :param rows: float32 array (tokens, channels), a sample of the input.
    """
    joined = fit.transform(
        Linear(
            np.concatenate([linear.weight for linear in linears], axis=1),
            np.concatenate([bias_of(linear) for linear in linears]),
        )
    )
    ends = np.cumsum([linear.weight.shape[1] for linear in linears])[:-1]
    values, scales = quantize_gptq(joined.weight, fit.apply(rows))
    bias, quantization = bias_of(joined).astype(np.float32), fit.quantization()
    return [
        StaticLinear(*arrays, quantization)
        for arrays in zip(
            np.split(values, ends, 1), np.split(scales, ends), np.split(bias, ends), strict=True
        )
    ]


def describe_fit(fit: Fit, budget: float) -> dict[str, Any]:
    """Return what the manifest records of a choice: its error, its parameters, whether float32 stayed."""
    kept = {} if fit.error <= budget else {"kept": "float32"}
    return {"error": float(f"{fit.error:.3g}"), **fit.describe(), **kept}


def bias_of(linear: Linear) -> Float32:
    """Return a linear's bias, zeros where it has none, float32 array (out_features,)."""
    if linear.bias is None:
        return np.zeros(linear.weight.shape[1], np.float32)
    return linear.bias
