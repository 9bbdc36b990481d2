"""float32 encoder -> int8 encoder with static ranges.

Weights are int8 with one scale per output channel; the input of each linear is uint8 with one fixed
scale and zero point, so that a vector does not depend on its batch. Besides float channels, smoothing
and outlier-channel splitting (ranges.py), a *shift* by the bias of what makes an input centres each
channel's range on zero; the linears that follow and the residual undo it through their biases. The
attention's output is not smoothed, though the value's weights could absorb it for nothing: on unseen
texts its channels exceed what they reached in calibration, which cost more than was gained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.architectures import ACTIVATIONS
from onnxsim_embed.export.encoder import (
    AnyLinear,
    Encoder,
    FloatChannels,
    InputQuantization,
    Int8Table,
    Linear,
    StaticLinear,
)
from onnxsim_embed.export.quantization import ranges
from onnxsim_embed.export.quantization.calibration import Activations, input_names
from onnxsim_embed.export.quantization.gptq import absorb_error, quantize_gptq, quantize_nearest
from onnxsim_embed.export.quantization.ranges import Fit, bias_of
from onnxsim_embed.export.quantization.search import Choice, Group, channel_counts
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.threads import map_chunks

# The linears of a layer by their input.
GROUPS = {
    "query, key, value": ("query", "key", "value"),
    "output": ("output",),
    "up": ("up",),
    "down": ("down",),
}
METHOD = (
    "static: int8 weights per output channel, one fixed uint8 range for each input, "
    "the largest channels of some in float32"
)


class Quantizer:
    """Quantizes groups of linears; each way of each group once."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self.groups, self.final = groups, False
        self.known: dict[tuple[str, Fit], list[StaticLinear]] = {}

    def __call__(self, choice: Choice, final: bool) -> dict[str, Sequence[AnyLinear]]:
        """Return the linears of each group.

        :param final: round weights with GPTQ, not to the nearest level, which takes a tenth of the time.
        """
        if final != self.final:  # the search is over
            self.known.clear()
            self.final = final

        def quantize(name: str) -> Sequence[AnyLinear]:
            group, fit = self.groups[name], choice[name]
            if fit is None:
                return group.linears
            if (name, fit) not in self.known:
                rows = group.seen.rows if final else None
                self.known[name, fit] = quantize_linears(group.linears, fit, rows)
            return self.known[name, fit]

        return dict(zip(choice, map_chunks(quantize, list(choice)), strict=True))


def fit_encoder(encoder: Encoder, seen: Mapping[str, Activations]) -> dict[str, Group]:
    """Return each input of linears, by layer and linears, with ways to quantize it."""
    activation = ACTIVATIONS[encoder.activation]

    def fit(key: tuple[int, str]) -> Group:
        number, names = key
        linears = tuple(getattr(encoder.layers[number], name) for name in GROUPS[names])
        weights = [linear.weight for linear in linears]
        inputs = seen[input_names(number)[list(GROUPS).index(names)]]
        fits: list[Fit] = []
        for channels in channel_counts(weights):
            if names == "down":
                fits += ranges.fit_outlier_splits(inputs, weights, activation, channels)
            else:
                plain = {"exponents": (0.0,), "shifts": (0.0,)} if names == "output" else {}
                fits.append(ranges.fit_smoothing(inputs, weights, channels=channels, **plain))
        return Group(linears, inputs, tuple(fits))

    keys = [(number, names) for number in range(len(encoder.layers)) for names in GROUPS]
    groups = map_chunks(fit, keys)
    return {
        f"layer{number}.{names}": group for (number, names), group in zip(keys, groups, strict=True)
    }


def assemble(
    encoder: Encoder, words: Int8Table, choice: Choice, linears: Mapping[str, Sequence[AnyLinear]]
) -> Encoder:
    """Return the int8 encoder of quantized linears and words."""
    layers, shifts = [], []
    for number, layer in enumerate(encoder.layers):
        parts: dict[str, Any] = {
            name: linear
            for names, group in GROUPS.items()
            for name, linear in zip(group, linears[f"layer{number}.{names}"], strict=True)
        }
        qkv, _, up, down = (choice[f"layer{number}.{names}"] for names in GROUPS)
        # What a shift adds to the residual, the linear that is added to it takes back.
        shift, up_shift = (
            fit.shift if isinstance(fit, ranges.Smoothing) else np.float32(0) for fit in (qkv, up)
        )
        if isinstance(down, ranges.ChannelSplit):
            parts["up"] = _add_split_channels(parts["up"], down)
        for name, residual in (("output", shift), ("down", up_shift)):
            parts[name] = replace(parts[name], bias=bias_of(parts[name]) - residual)
        norm = replace(layer.attention_norm, bias=layer.attention_norm.bias + up_shift)
        layers.append(replace(layer, attention_norm=norm, **parts))
        shifts.append(shift)
    # What makes a layer's input makes its shift; nothing follows the last.
    first = "norm" if encoder.projection is None else "projection"
    sources = [getattr(encoder, first), *(layer.norm for layer in layers)]
    source, *norms = (
        replace(source, bias=source.bias + shift)
        for source, shift in zip(sources, [*shifts, np.float32(0)], strict=True)
    )
    layers = [replace(layer, norm=norm) for layer, norm in zip(layers, norms, strict=True)]
    return replace(encoder, words=words, layers=tuple(layers), **{first: source})


def _add_split_channels(up: AnyLinear, split: ranges.ChannelSplit) -> AnyLinear:
    """Return the linear before the activation with lowered split channels among its outputs."""

    def widen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        edges = [(0, 0)] * (array.ndim - 1) + [split.padding]
        return np.concatenate([array, np.pad(array[..., split.columns], edges)], axis=-1)

    bias = widen(bias_of(up))
    end = len(bias) - split.padding[1]
    bias[end - len(split.columns) : end] -= split.offsets
    if isinstance(up, Linear):
        return Linear(widen(up.weight), bias)
    side = up.side and replace(up.side, weight=widen(up.side.weight))
    return replace(up, weight=widen(up.weight), scales=widen(up.scales), bias=bias, side=side)


def quantize_linears(
    linears: Sequence[Linear], fit: Fit, rows: Float32 | None
) -> list[StaticLinear]:
    """Quantize linears of one input.

    :param rows: a sample of the input (tokens, channels) for GPTQ; None to round to the nearest levels.
    """
    # Side by side, as GPTQ factors the second moments of their input once.
    weight = np.concatenate([linear.weight for linear in linears], axis=1)
    joined = fit.transform(Linear(weight, np.concatenate([bias_of(linear) for linear in linears])))
    bias = bias_of(joined)
    if rows is None:
        values, scales = quantize_nearest(joined.weight)
    else:
        inputs, exact = fit.apply(rows), fit.exact(rows)
        values, scales = quantize_gptq(absorb_error(joined.weight, exact, inputs), inputs)
        bias = bias + exact.mean(axis=0) @ joined.weight
        bias -= inputs.mean(axis=0) @ (values * scales)
    multiplier = fit.multiplier if isinstance(fit, ranges.Smoothing) and fit.exponent else None
    quantization = InputQuantization(fit.range.scale, fit.range.zero_point, multiplier)
    ends = np.cumsum([linear.weight.shape[1] for linear in linears])[:-1]
    columns = fit.float_channels
    arrays = (values, scales, bias.astype(np.float32), weight[columns])
    split = zip(*(np.split(array, ends, axis=-1) for array in arrays), strict=True)
    return [
        StaticLinear(
            values,
            scales,
            bias,
            quantization,
            FloatChannels(columns, side) if len(columns) else None,
        )
        for values, scales, bias, side in split
    ]


def describe_layers(groups: Mapping[str, Group], choice: Choice) -> tuple[dict[str, Any], ...]:
    """Return what the manifest records of a choice, for each layer by its linears."""
    layers: dict[str, dict[str, Any]] = {}
    for name, fit in choice.items():
        layer, _, linears = name.partition(".")
        layers.setdefault(layer, {})[linears] = describe_fit(groups[name], fit)
    return tuple(layers.values())


def describe_fit(group: Group, fit: Fit | None) -> dict[str, Any]:
    """Return what the manifest records of a choice."""
    if fit is None:
        return {"error": float(f"{group.fits[0].error:.3g}"), "kept": "float32"}
    record: dict[str, Any] = {"error": float(f"{fit.error:.3g}")}
    if isinstance(fit, ranges.ChannelSplit):
        record |= {"range": round(fit.range.ends[1], 3), "copies": len(fit.columns)}
    elif fit.exponent:
        record["exponent"] = fit.exponent
    if len(fit.float_channels):
        record["float_channels"] = len(fit.float_channels)
    return record
