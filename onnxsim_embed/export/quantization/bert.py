"""float32 encoder -> int8 encoder with static ranges.

Weights are int8 with one scale per output channel; the input of each linear is uint8 with one fixed
scale and zero point, so that a vector does not depend on its batch. Besides smoothing and
outlier-channel splitting (transforms.py), a *shift* by a layer norm's bias centres each channel's range
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

from onnxsim_embed.export.bert import AnyLinear, Bert, Layer, Linear, Norm
from onnxsim_embed.export.quantization.calibration import Activations, input_names
from onnxsim_embed.export.quantization.gptq import quantize_table
from onnxsim_embed.export.quantization.ranges import (
    ERROR_BUDGET,
    activation_function,
    fit_outlier_split,
    fit_smoothing,
)
from onnxsim_embed.export.quantization.transforms import (
    Activation,
    Fit,
    bias_of,
    describe_fit,
    quantize_linears,
)
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import single_blas_thread

Float32 = npt.NDArray[np.float32]

METHOD = "static: int8 weights per output channel, one fixed uint8 range for each input"


@dataclass(frozen=True)
class Quantized:
    """An int8 encoder, and what was chosen for each layer."""

    bert: Bert
    layers: tuple[dict[str, Any], ...]


def quantize_static(
    bert: Bert, seen: Mapping[str, Activations], budget: float = ERROR_BUDGET
) -> Quantized:
    """Quantize every linear layer and the word embeddings.

    :param bert: the float32 encoder.
    :param seen: its activations over the calibration texts, from `collect_activations`.
    :param budget: relative squared output error above which a linear stays float32.
    """
    if not isinstance(bert.words, np.ndarray):
        raise TypeError("the encoder is quantized already")
    activation = activation_function(bert.activation)

    def quantize(number: int) -> tuple[Layer, Float32, dict[str, Any]]:
        inputs = [seen[name] for name in input_names(number)]
        return _quantize_layer(bert.layers[number], inputs, activation, budget)

    # Layers in parallel, each with one BLAS thread: BLAS threads that share processors with anything
    # else wait for each other (a factorization here took 5 s on two threads, 0.15 s on one).
    with single_blas_thread(), ThreadPoolExecutor(available_cpus()) as workers:
        layers, shifts, choices = zip(*workers.map(quantize, range(len(bert.layers))), strict=True)
    # The norm before a layer makes its shift; nothing follows the last.
    norms = [bert.norm, *(layer.norm for layer in layers)]
    norms[:-1] = map(_shifted, norms[:-1], shifts)
    layers = tuple(replace(layer, norm=norm) for layer, norm in zip(layers, norms[1:], strict=True))
    words = quantize_table(bert.words)
    return Quantized(replace(bert, words=words, norm=norms[0], layers=layers), choices)


def _quantize_layer(
    layer: Layer, seen: Sequence[Activations], activation: Activation, budget: float
) -> tuple[Layer, Float32, dict[str, Any]]:
    """Return the int8 layer, the shift that the norm before it must make, and what was chosen."""
    attention, context, up_input, up_output = seen
    query, key, value, output, up, down = (
        _float(linear)
        for linear in (layer.query, layer.key, layer.value, layer.output, layer.up, layer.down)
    )
    qkv_fit = fit_smoothing(attention, [query.weight, key.weight, value.weight])
    output_fit = fit_smoothing(context, [output.weight], exponents=(0.0,), shifts=(0.0,))
    up_fit = fit_smoothing(up_input, [up.weight])
    down_fit = fit_outlier_split(up_output, [down.weight], activation)

    def quantize(linears: Sequence[Linear], fit: Fit, seen: Activations) -> Sequence[AnyLinear]:
        return quantize_linears(linears, fit, seen.rows) if fit.error <= budget else linears

    shift, up_shift = (
        fit.shift if fit.error <= budget else np.zeros_like(fit.shift) for fit in (qkv_fit, up_fit)
    )
    # What a shift adds to the residual, the linear that is added to it takes back.
    output = replace(output, bias=bias_of(output) - shift)
    down = replace(down, bias=bias_of(down) - up_shift)
    if down_fit.error <= budget:
        up = down_fit.transform_previous(up)
    quantized = Layer(
        *quantize([query, key, value], qkv_fit, attention),
        *quantize([output], output_fit, context),
        _shifted(layer.attention_norm, up_shift),
        *quantize([up], up_fit, up_input),
        *quantize([down], down_fit, up_output),
        layer.norm,
    )
    fits = {"query, key, value": qkv_fit, "output": output_fit, "up": up_fit, "down": down_fit}
    return quantized, shift, {name: describe_fit(fit, budget) for name, fit in fits.items()}


def _float(linear: AnyLinear) -> Linear:
    if not isinstance(linear, Linear):
        raise TypeError("the encoder is quantized already")
    return linear


def _shifted(norm: Norm, shift: Float32) -> Norm:
    return replace(norm, bias=norm.bias + shift)
