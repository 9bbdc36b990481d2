"""float32 encoder -> int8 encoder with static ranges.

Weights are int8 with a scale for each output channel; the input of each linear is uint8 with one
fixed scale and zero point, so that a vector does not depend on its batch. Three things keep that one
scale from being too coarse. None changes what the float32 encoder computes:

*shift*: a layer norm's bias moves each channel's range to lie around zero; the linears behind it and
the residual take the shift back through their biases.

*smoothing* (SmoothQuant, Xiao et al., arXiv:2211.10438): channels are divided by factors that the
weights take on. The exponent says how much of the range moves.

*splitting by saturation* (after outlier channel splitting, Zhao et al., arXiv:1901.09504): where a few
channels of the activation reach far beyond the rest, the range stops at R, and each such channel gets
copies with bias -R, -2R, ...: the quantizer saturates every copy at R, and the copies add up.

What is chosen for a layer is the trial of least measured output error. A linear whose error stays
above a budget keeps its float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.bert import (
    AnyLinear,
    Bert,
    InputQuantization,
    Layer,
    Linear,
    Norm,
    StaticLinear,
)
from onnxsim_embed.export.quantization.calibration import Activations, input_names
from onnxsim_embed.export.quantization.gptq import round_table, round_weight
from onnxsim_embed.export.quantization.ranges import (
    Activation,
    Smoothing,
    Split,
    activation_function,
    fit_outlier_split,
    fit_smoothing,
)
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import single_blas_thread

if TYPE_CHECKING:
    from onnxsim_embed.export.quantization.onnx import InputSplit

Float32 = npt.NDArray[np.float32]

METHOD = "static: int8 weights per output channel, one fixed uint8 range for each input"

# Relative squared output error (noise over signal) above which a linear stays float32. A healthy one
# lies near 0.0003, the worst of MiniLM near 0.001.
ERROR_BUDGET = 0.02

# Copies of columns come in steps of 16: rows stay whole numbers of vector registers.
COLUMN_STEP = 16


@dataclass(frozen=True)
class Quantized:
    """An int8 encoder, and for each layer what was chosen."""

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
    activation = activation_function(bert.activation)

    def quantize(number: int) -> tuple[Layer, Float32, dict[str, Any]]:
        parts = [seen[name] for name in input_names(number)]
        return _quantize_layer(bert.layers[number], parts, activation, budget)

    # Layers side by side, each with one BLAS thread: BLAS threads that share processors with anything
    # else wait for each other (a factorization here took 5 s on two threads, 0.15 s on one).
    with single_blas_thread(), ThreadPoolExecutor(available_cpus()) as workers:
        made = list(workers.map(quantize, range(len(bert.layers))))
    norms = [bert.norm, *(layer.norm for layer, _, _ in made)]
    for number, (_, shift, _) in enumerate(made):
        norms[number] = _shifted(norms[number], shift)  # the norm before a layer makes its shift
    layers = [
        replace(layer, norm=norm) for (layer, _, _), norm in zip(made, norms[1:], strict=True)
    ]
    assert isinstance(bert.words, np.ndarray)
    words = round_table(bert.words)
    quantized = replace(bert, words=words, norm=norms[0], layers=tuple(layers))
    return Quantized(quantized, tuple(note for _, _, note in made))


def _quantize_layer(
    layer: Layer, seen: Sequence[Activations], activation: Activation, budget: float
) -> tuple[Layer, Float32, dict[str, Any]]:
    """Quantize one layer.

    :returns: the layer, the shift that the norm before it must make, and what was chosen.
    """
    attention, context, up_input, up_output = seen
    query, key, value, output, up, down = (
        _float(linear)
        for linear in (layer.query, layer.key, layer.value, layer.output, layer.up, layer.down)
    )
    heads = fit_smoothing(attention, [query.weight, key.weight, value.weight])
    joined = fit_smoothing(context, [output.weight], exponents=(0.0,), shifts=(0.0,))
    rise = fit_smoothing(up_input, [up.weight])
    split = fit_outlier_split(up_output, activation, down.weight)
    shift, up_shift = np.zeros_like(heads.shift), np.zeros_like(rise.shift)

    made: dict[str, AnyLinear] = {"query": query, "key": key, "value": value}
    if heads.error <= budget:
        shift = heads.shift
        made = dict(zip(made, _smoothed([query, key, value], heads, attention.rows), strict=True))
    # What the shifts add to the residual, the linear that is added to it takes back.
    output = replace(output, bias=bias_of(output) - shift)
    made["output"] = output
    if joined.error <= budget:
        (made["output"],) = _smoothed([output], joined, context.rows)
    if split.error <= budget:
        up, down = _with_copies(up, down, split)
    made["up"] = up
    if rise.error <= budget:
        up_shift = rise.shift
        (made["up"],) = _smoothed([up], rise, up_input.rows)
    down = replace(down, bias=bias_of(down) - up_shift)
    made["down"] = down
    if split.error <= budget:
        how = InputQuantization(split.range.scale, split.range.zero_point)
        inputs = np.zeros((len(up_output.rows), len(down.weight)), np.float32)
        seen_by_down = split.apply(up_output.rows, activation)
        inputs[:, : seen_by_down.shape[1]] = seen_by_down
        made["down"] = StaticLinear(
            *round_weight(down.weight, inputs), bias=bias_of(down), input=how
        )
    norm = replace(layer.attention_norm, bias=layer.attention_norm.bias + up_shift)
    fits: dict[str, Smoothing | Split] = {
        "query, key, value": heads,
        "output": joined,
        "up": rise,
        "down": split,
    }
    return Layer(**made, attention_norm=norm, norm=layer.norm), shift, _note(fits, budget)


def _smoothed(linears: Sequence[Linear], fit: Smoothing, rows: Float32) -> list[StaticLinear]:
    """Quantize linears of one input; their biases take the input's shift back."""
    how = fit.quantization()
    joined = np.concatenate([linear.weight for linear in linears], axis=1)
    weight = np.asarray(joined / fit.multiplier[:, None], np.float32)
    values, scales = round_weight(weight, fit.apply(rows))
    bias = np.concatenate([bias_of(linear) for linear in linears]) - fit.shift @ joined
    ends = np.cumsum([linear.weight.shape[1] for linear in linears])[:-1]
    pieces = zip(
        np.split(values, ends, 1), np.split(scales, ends), np.split(bias, ends), strict=True
    )
    return [StaticLinear(v, s, b.astype(np.float32), how) for v, s, b in pieces]


def _with_copies(up: Linear, down: Linear, split: Split) -> tuple[Linear, Linear]:
    """Give `up` a lowered copy of each outlier column, and `down` a copy of its row."""
    columns = split.columns
    padding = -len(columns) % COLUMN_STEP
    width, height = up.weight.shape[0], down.weight.shape[1]
    return (
        Linear(
            np.concatenate(
                [up.weight, up.weight[:, columns], np.zeros((width, padding), np.float32)], 1
            ),
            np.concatenate(
                [bias_of(up), bias_of(up)[columns] - split.offsets, np.zeros(padding, np.float32)]
            ),
        ),
        Linear(
            np.concatenate(
                [down.weight, down.weight[columns], np.zeros((padding, height), np.float32)]
            ),
            down.bias,
        ),
    )


def _note(fits: Mapping[str, Smoothing | Split], budget: float) -> dict[str, Any]:
    return {name: describe_fit(fit, fit.error <= budget) for name, fit in fits.items()}


def describe_fit(fit: Smoothing | Split | InputSplit, used: bool) -> dict[str, Any]:
    """Return what the manifest says of a choice: its error, and what it consists of.

    :param used: whether the linears became int8.
    """
    chosen: dict[str, Any] = {"error": float(f"{fit.error:.3g}")}
    if not isinstance(fit, Smoothing):
        chosen |= {"range": round(fit.range.top, 3), "copies": len(fit.columns)}
    elif fit.exponent:
        chosen["exponent"] = fit.exponent
    if not used:
        chosen["kept"] = "float32"
    return chosen


def bias_of(linear: Linear) -> Float32:
    """Return a linear's bias, zeros where it has none, float32 array (out_features,)."""
    if linear.bias is None:
        return np.zeros(linear.weight.shape[1], np.float32)
    return linear.bias


def _float(linear: AnyLinear) -> Linear:
    if not isinstance(linear, Linear):
        raise TypeError("the encoder is quantized already")
    return linear


def _shifted(norm: Norm, shift: Float32) -> Norm:
    return replace(norm, bias=norm.bias + shift)
