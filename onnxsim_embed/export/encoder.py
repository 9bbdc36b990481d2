"""Weights of an encoder of the BERT family, checked, transposed and folded for an ONNX graph.

Folding does not change the result beyond rounding: 1/sqrt(head dim) moves into the query, the key's
bias is dropped (it adds the same to every score of a row, which softmax ignores), the value's bias
moves through the attention (its weights sum to one) into the output's bias, and the embedding of
token type 0 moves into the positions (sentence models use no other type). `architectures.py` says
where the weights of each architecture are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.architectures import ACTIVATIONS, ARCHITECTURES, Architecture
from onnxsim_embed.system.arrays import Float32, Int64

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Float32]

# Of MPNet's relative positions: transformers does not read them from config.json.
BUCKETS, MAX_DISTANCE = 32, 128

DEFAULT_EPSILON = 1e-12  # of every architecture's norms


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
class FloatChannels:
    """Input channels whose part of an int8 linear is computed in float32 (LLM.int8(), arXiv:2208.07339)."""

    columns: Int64  # (k,)
    weight: Float32  # (k, out_features)


@dataclass(frozen=True)
class StaticLinear:
    """An int8 linear layer with a fixed input range; its weight is symmetric per output channel."""

    weight: npt.NDArray[np.int8]
    scales: Float32
    bias: Float32 | None
    input: InputQuantization
    side: FloatChannels | None = None  # their rows of `weight` are zero


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
    """An encoder; token type 0 is added to the positions (positions, embedding dim).

    :param skipped: token that positions skip, counting from behind its id; None for 0, 1, 2, ...
    :param relative_bias: what all layers add to their attention scores, (heads, 2 n - 1) for n tokens at
        most: column n - 1 + key position - query position.
    :param projection: from the embeddings to the hidden states.
    """

    heads: int
    head_width: int
    epsilon: float
    activation: str
    words: Float32 | Int8Table
    positions: Float32
    skipped: int | None
    norm: Norm
    projection: Linear | None
    relative_bias: Float32 | None
    layers: tuple[Layer, ...]

    @property
    def hidden(self) -> int:
        """Dim of the hidden states."""
        return self.heads * self.head_width


@dataclass
class _Reader:
    """Reads sizes from config.json and tensors of the shapes that they imply."""

    config: Mapping[str, Any]
    tensors: Tensors
    architecture: Architecture
    used: set[str] = field(default_factory=set)

    def size(self, key: str) -> int:
        key = self.architecture.key(key)
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
        return value

    def take(self, name: str, *shape: int) -> Float32:
        if name not in self.tensors:
            kind = self.config["model_type"]
            raise CheckpointError(
                f"the weights lack tensor {name!r}; is this a complete {kind} model?"
            )
        value = self.tensors[name]
        if value.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {value.shape}, config.json implies {shape}"
            )
        self.used.add(name)
        return value

    def norm(self, name: str, dim: int) -> Norm:
        return Norm(self.take(f"{name}.weight", dim), self.take(f"{name}.bias", dim))

    def linear(self, name: str, outputs: int, inputs: int) -> tuple[Float32, Float32]:
        weight = np.ascontiguousarray(self.take(f"{name}.weight", outputs, inputs).T)
        return weight, self.take(f"{name}.bias", outputs)


def load_encoder(config: Mapping[str, Any], tensors: Tensors) -> Encoder:
    """Build an encoder from config.json and tensors in PyTorch's layout, of a supported `model_type`.

    :raises CheckpointError: naming the key or tensor that is missing, misshapen or unsupported.
    """
    architecture = _check_config(config)
    reader = _Reader(config, tensors, architecture)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(
            f"config.json: {architecture.key('hidden_size')} {hidden} is not a multiple of "
            f"{architecture.key('num_attention_heads')} {heads}"
        )
    width = hidden if architecture.projection is None else reader.size("embedding_size")
    count = reader.size("max_position_embeddings")
    positions = reader.take("embeddings.position_embeddings.weight", count, width)
    if architecture.token_types:
        shape = reader.size("type_vocab_size"), width
        types = reader.take("embeddings.token_type_embeddings.weight", *shape)
        positions = positions + types[0]
    projection = relative = None
    if architecture.projection is not None and width != hidden:
        projection = Linear(*reader.linear(architecture.projection, hidden, width))
    if architecture.relative_bias is not None:
        buckets = reader.take(f"{architecture.relative_bias}.weight", BUCKETS, heads)
        relative = relative_bias(buckets, count)
    encoder = Encoder(
        heads=heads,
        head_width=hidden // heads,
        epsilon=float(config.get("layer_norm_eps", DEFAULT_EPSILON)),
        activation=str(config.get(architecture.key("hidden_act"), "gelu")),
        words=reader.take("embeddings.word_embeddings.weight", reader.size("vocab_size"), width),
        positions=positions,
        skipped=architecture.skipped(config),
        norm=reader.norm("embeddings.LayerNorm", width),
        projection=projection,
        relative_bias=relative,
        layers=tuple(
            _load_layer(reader, number, hidden, heads)
            for number in range(reader.size("num_hidden_layers"))
        ),
    )
    own = ("embeddings", architecture.layer_prefix.partition(".")[0] + ".")
    if unused := sorted(name for name in tensors.keys() - reader.used if name.startswith(own)):
        logger.warning(
            "%d tensors of the encoder are not used, %r first: does config.json belong to them?",
            len(unused),
            unused[0],
        )
    return encoder


def _load_layer(reader: _Reader, number: int, hidden: int, heads: int) -> Layer:
    names, inner = reader.architecture.layer_names(number), reader.size("intermediate_size")
    (query, query_bias), (key, _), (value, value_bias), (output, output_bias) = (
        reader.linear(names[name], hidden, hidden) for name in ("query", "key", "value", "output")
    )
    scale = np.float32(1 / np.sqrt(hidden // heads))
    shift = value_bias.astype(np.float64) @ output.astype(np.float64)
    return Layer(
        query=Linear(query * scale, query_bias * scale),
        key=Linear(key, None),
        value=Linear(value, None),
        output=Linear(output, (output_bias + shift).astype(np.float32)),
        attention_norm=reader.norm(names["attention_norm"], hidden),
        up=Linear(*reader.linear(names["up"], inner, hidden)),
        down=Linear(*reader.linear(names["down"], hidden, inner)),
        norm=reader.norm(names["norm"], hidden),
    )


def relative_bias(buckets: Float32, tokens: int) -> Float32:
    """Return the bias (heads, 2 tokens - 1) of each relative position, from that of its bucket.

    T5's buckets (arXiv:1910.10683): half of them for keys after the query; of each half, half for single
    distances, the rest for ranges that grow with the logarithm.
    """
    relative = np.arange(1 - tokens, tokens)
    half, single = BUCKETS // 2, BUCKETS // 4
    distance = np.abs(relative)
    logs = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(single))
    steps = logs / np.float32(np.log(MAX_DISTANCE / single)) * np.float32(half - single)
    bucket = np.where(
        distance < single, distance, np.minimum(single + steps.astype(np.int64), half - 1)
    )
    return np.ascontiguousarray(buckets[bucket + half * (relative > 0)].T)


def _check_config(config: Mapping[str, Any]) -> Architecture:
    architecture = ARCHITECTURES.get(str(config.get("model_type")), ARCHITECTURES["bert"])
    allowed: dict[str, tuple[object, tuple[object, ...]]] = {
        "model_type": (None, tuple(ARCHITECTURES)),
        architecture.key("hidden_act"): ("gelu", tuple(ACTIVATIONS)),
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
    epsilon = config.get("layer_norm_eps", DEFAULT_EPSILON)
    if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise CheckpointError(
            f"config.json: layer_norm_eps must be a small positive number, got {epsilon!r}"
        )
    return architecture
