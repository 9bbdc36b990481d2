"""float32 encoder -> int8 encoder with static ranges.

Weights are int8 with one scale per output channel; the input of each linear is uint8 with one fixed
scale and zero point, so that a vector does not depend on its batch. Besides smoothing and
outlier-channel splitting (ranges.py), a *shift* by a layer norm's bias centres each channel's range
on zero; the linears that follow and the residual undo it through their biases.

Each input gets the candidate of least measured output error. A linear whose error exceeds a budget
keeps its float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.encoder import Encoder, InputQuantization, Layer, Linear, StaticLinear
from onnxsim_embed.export.quantization import ranges
from onnxsim_embed.export.quantization.calibration import Activations, input_names
from onnxsim_embed.export.quantization.gptq import quantize_gptq, quantize_table
from onnxsim_embed.export.quantization.ranges import ERROR_BUDGET, Activation, Fit, bias_of
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import single_blas_thread

Float32 = npt.NDArray[np.float32]

LINEARS = ("query", "key", "value", "output", "up", "down")
METHOD = "static: int8 weights per output channel, one fixed uint8 range for each input"


@dataclass(frozen=True)
class Quantized:
    """An int8 encoder, and what was chosen for each layer."""

    encoder: Encoder
    layers: tuple[dict[str, Any], ...]


def quantize_static(
    encoder: Encoder, seen: Mapping[str, Activations], budget: float = ERROR_BUDGET
) -> Quantized:
    """Quantize every linear layer and the word embeddings.

    :param encoder: the float32 encoder.
    :param seen: its activations over the calibration texts, from `collect_activations`.
    :param budget: relative squared output error above which a linear stays float32.
    """
    if not isinstance(encoder.words, np.ndarray):
        raise TypeError("the encoder is quantized already")
    activation = ranges.activation_function(encoder.activation)

    def quantize(number: int) -> tuple[Layer, Float32, dict[str, Any]]:
        inputs = [seen[name] for name in input_names(number)]
        return _quantize_layer(encoder.layers[number], inputs, activation, budget)

    # Layers in parallel, each with one BLAS thread: BLAS threads that share processors with anything
    # else wait for each other (a factorization here took 5 s on two threads, 0.15 s on one).
    with single_blas_thread(), ThreadPoolExecutor(available_cpus()) as workers:
        layers, shifts, choices = zip(
            *workers.map(quantize, range(len(encoder.layers))), strict=True
        )
    # What makes a layer's input makes its shift; nothing follows the last.
    first = "norm" if encoder.projection is None else "projection"
    sources = [getattr(encoder, first), *(layer.norm for layer in layers)]
    shifts += (np.float32(0),)
    source, *norms = (
        replace(source, bias=source.bias + shift)
        for source, shift in zip(sources, shifts, strict=True)
    )
    layers = tuple(replace(layer, norm=norm) for layer, norm in zip(layers, norms, strict=True))
    changes = {first: source, "words": quantize_table(encoder.words), "layers": layers}
    return Quantized(replace(encoder, **changes), choices)


def _quantize_layer(
    layer: Layer, seen: Sequence[Activations], activation: Activation, budget: float
) -> tuple[Layer, Float32, dict[str, Any]]:
    """Return the int8 layer, the shift that the norm before it must make, and what was chosen."""
    attention, context, up_input, up_output = seen
    linears: dict[str, Any] = {name: getattr(layer, name) for name in LINEARS}
    weights = {name: linear.weight for name, linear in linears.items()}
    qkv = ranges.fit_smoothing(attention, [weights[name] for name in ("query", "key", "value")])
    output = ranges.fit_smoothing(context, [weights["output"]], exponents=(0.0,), shifts=(0.0,))
    up = ranges.fit_smoothing(up_input, [weights["up"]])
    down = ranges.fit_outlier_split(up_output, [weights["down"]], activation)
    fits: dict[str, Fit] = {"query, key, value": qkv, "output": output, "up": up, "down": down}
    shift, up_shift = (
        fit.shift if fit.error <= budget else np.zeros_like(fit.shift) for fit in (qkv, up)
    )
    # What a shift adds to the residual, the linear that is added to it takes back.
    for name, residual in (("output", shift), ("down", up_shift)):
        linears[name] = replace(linears[name], bias=bias_of(linears[name]) - residual)
    if down.error <= budget:
        linears["up"] = down.transform_previous(linears["up"])
    for (names, fit), inputs in zip(fits.items(), seen, strict=True):
        if fit.error <= budget:
            group = names.split(", ")
            quantized = quantize_linears([linears[name] for name in group], fit, inputs.rows)
            linears |= zip(group, quantized, strict=True)
    norm = replace(layer.attention_norm, bias=layer.attention_norm.bias + up_shift)
    choices = {names: describe_fit(fit, budget) for names, fit in fits.items()}
    return replace(layer, attention_norm=norm, **linears), shift, choices


def quantize_linears(linears: Sequence[Linear], fit: Fit, rows: Float32) -> list[StaticLinear]:
    """Quantize linears of one input, of which `rows` are a sample (tokens, channels)."""
    # Side by side, as GPTQ factors the second moments of their input once.
    weight = np.concatenate([linear.weight for linear in linears], axis=1)
    joined = fit.transform(Linear(weight, np.concatenate([bias_of(linear) for linear in linears])))
    values, scales = quantize_gptq(joined.weight, fit.apply(rows))
    multiplier = fit.multiplier if isinstance(fit, ranges.Smoothing) and fit.exponent else None
    quantization = InputQuantization(fit.range.scale, fit.range.zero_point, multiplier)
    ends = np.cumsum([linear.weight.shape[1] for linear in linears])[:-1]
    arrays = (values, scales, bias_of(joined).astype(np.float32))
    split = zip(*(np.split(array, ends, axis=-1) for array in arrays), strict=True)
    return [StaticLinear(values, scales, bias, quantization) for values, scales, bias in split]


def describe_fit(fit: Fit, budget: float) -> dict[str, Any]:
    """Return what the manifest records of a choice, and whether the linears stayed float32."""
    record: dict[str, Any] = {"error": float(f"{fit.error:.3g}")}
    if isinstance(fit, ranges.ChannelSplit):
        record |= {"range": round(fit.range.ends[1], 3), "copies": len(fit.columns)}
    elif fit.exponent:
        record["exponent"] = fit.exponent
    return record if fit.error <= budget else record | {"kept": "float32"}
