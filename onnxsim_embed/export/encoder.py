"""Weights of a BERT encoder, checked, transposed and folded for an ONNX graph.

Folding does not change the result beyond rounding: 1/sqrt(head dim) moves into the query, the key's
bias is dropped (it adds the same to every score of a row, which softmax ignores), the value's bias
moves through the attention (its weights sum to one) into the output's bias, and the embedding of
token type 0 moves into the positions (sentence models use no other type).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import CheckpointError

Float32 = npt.NDArray[np.float32]
Tensors = Mapping[str, Float32]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class Linear:
    """A float32 linear layer: weight (in_features, out_features), bias (out_features,) or None."""

    weight: Float32
    bias: Float32 | None


@dataclass(frozen=True)
class InputQuantization:
    """Input of int8 layers: round(x * multiplier / scale) + zero_point; None is a multiplier of 1."""

    scale: np.float32
    zero_point: np.uint8
    multiplier: Float32 | None = None


@dataclass(frozen=True)
class StaticLinear:
    """An int8 linear layer with a fixed input range; its weight is symmetric per output channel."""

    weight: npt.NDArray[np.int8]
    scales: Float32
    bias: Float32 | None
    input: InputQuantization


AnyLinear = Linear | StaticLinear


@dataclass(frozen=True)
class Int8Table:
    """An int8 embedding table (rows, hidden) with one scale per row."""

    values: npt.NDArray[np.int8]
    scales: Float32


@dataclass(frozen=True)
class Norm:
    """Layer normalization: float32 arrays (hidden,)."""

    weight: Float32
    bias: Float32


@dataclass(frozen=True)
class Layer:
    """One encoder layer."""

    query: AnyLinear
    key: AnyLinear
    value: AnyLinear
    output: AnyLinear
    attention_norm: Norm
    up: AnyLinear
    down: AnyLinear
    norm: Norm


@dataclass(frozen=True)
class Encoder:
    """A BERT encoder; token type 0 is added to the positions (positions, hidden)."""

    heads: int
    head_width: int
    epsilon: float
    activation: str
    words: Float32 | Int8Table
    positions: Float32
    norm: Norm
    layers: tuple[Layer, ...]

    @property
    def hidden(self) -> int:
        """Dim of the hidden states."""
        return self.heads * self.head_width


def load_encoder(config: Mapping[str, Any], tensors: Tensors) -> Encoder:
    """Build the encoder of `model_type: bert` from config.json and tensors in PyTorch's layout.

    :raises CheckpointError: naming the key or tensor that is missing, misshapen or unsupported.
    """
    _check_config(config)
    hidden, inner, heads = (
        _positive(config, k) for k in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    if hidden % heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    width = hidden // heads

    def take(name: str, *shape: int) -> Float32:
        if name not in tensors:
            raise CheckpointError(
                f"the weights lack tensor {name!r}; is this a complete {config['model_type']} model?"
            )
        value = tensors[name]
        if value.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {value.shape}, config.json implies {shape}"
            )
        return value

    def norm(name: str) -> Norm:
        return Norm(take(f"{name}.weight", hidden), take(f"{name}.bias", hidden))

    def linear(name: str, outputs: int, inputs: int) -> tuple[Float32, Float32]:
        weight = np.ascontiguousarray(take(f"{name}.weight", outputs, inputs).T)
        return weight, take(f"{name}.bias", outputs)

    layers = []
    for number in range(_positive(config, "num_hidden_layers")):
        prefix = f"encoder.layer.{number}"
        attention = f"{prefix}.attention"
        query, query_bias = linear(f"{attention}.self.query", hidden, hidden)
        key, _ = linear(f"{attention}.self.key", hidden, hidden)
        value, value_bias = linear(f"{attention}.self.value", hidden, hidden)
        output, output_bias = linear(f"{attention}.output.dense", hidden, hidden)
        shift = value_bias.astype(np.float64) @ output.astype(np.float64)
        scale = np.float32(1 / np.sqrt(width))
        layers.append(
            Layer(
                query=Linear(query * scale, query_bias * scale),
                key=Linear(key, None),
                value=Linear(value, None),
                output=Linear(output, (output_bias + shift).astype(np.float32)),
                attention_norm=norm(f"{attention}.output.LayerNorm"),
                up=Linear(*linear(f"{prefix}.intermediate.dense", inner, hidden)),
                down=Linear(*linear(f"{prefix}.output.dense", hidden, inner)),
                norm=norm(f"{prefix}.output.LayerNorm"),
            )
        )
    positions = _positive(config, "max_position_embeddings")
    types = take(
        "embeddings.token_type_embeddings.weight", _positive(config, "type_vocab_size"), hidden
    )
    return Encoder(
        heads=heads,
        head_width=width,
        epsilon=float(config.get("layer_norm_eps", 1e-12)),
        activation=str(config.get("hidden_act", "gelu")),
        words=take("embeddings.word_embeddings.weight", _positive(config, "vocab_size"), hidden),
        positions=take("embeddings.position_embeddings.weight", positions, hidden) + types[0],
        norm=norm("embeddings.LayerNorm"),
        layers=tuple(layers),
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _check_config(config: Mapping[str, Any]) -> None:
    allowed: dict[str, tuple[object, tuple[object, ...]]] = {
        "model_type": (None, ("bert",)),
        "hidden_act": ("gelu", ACTIVATIONS),
        "position_embedding_type": ("absolute", ("absolute",)),
        "is_decoder": (False, (False, None)),
        "add_cross_attention": (False, (False, None)),
    }
    for key, (default, values) in allowed.items():
        if (value := config.get(key, default)) not in values:
            names = ", ".join(map(repr, values))
            raise CheckpointError(
                f"config.json: {key} {value!r} cannot be built directly; supported: {names}"
            )
    epsilon = config.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise CheckpointError(
            f"config.json: layer_norm_eps must be a small positive number, got {epsilon!r}"
        )
