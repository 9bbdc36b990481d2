"""An encoder in numpy, computed from its unmodified weights as its paper defines it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxsim_embed.export.architectures import ACTIVATIONS, ARCHITECTURES
from onnxsim_embed.export.encoder import DEFAULT_EPSILON, relative_bias
from onnxsim_embed.system.arrays import Float32, Int64


def numpy_reference(
    config: Mapping[str, Any], tensors: Mapping[str, Float32]
) -> Callable[[Int64], Float32]:
    """Return an encoder as a function from input_ids (1, t) to hidden states (1, t, hidden).

    A reference where PyTorch is missing: from `architectures.py` it has the names of the weights, but
    it shares neither their folding nor the ONNX graph, so that an error in those shows.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    heads = config[architecture.key("num_attention_heads")]
    layers = config[architecture.key("num_hidden_layers")]
    activation = ACTIVATIONS[config.get(architecture.key("hidden_act"), "gelu")]
    epsilon = np.float32(config.get("layer_norm_eps", DEFAULT_EPSILON))
    skipped = architecture.skipped(config)

    def linear(x: Float32, name: str) -> Float32:
        return np.asarray(x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])

    def norm(x: Float32, name: str) -> Float32:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
        return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def embed(ids: Int64) -> Float32:
        positions = np.arange(len(ids))
        if skipped is not None:
            positions = np.where(ids == skipped, 0, np.cumsum(ids != skipped)) + skipped
        x = tensors["embeddings.word_embeddings.weight"][ids]
        x = x + tensors["embeddings.position_embeddings.weight"][positions]
        if architecture.token_types:
            x = x + tensors["embeddings.token_type_embeddings.weight"][0]
        x = norm(x, "embeddings.LayerNorm")
        if f"{architecture.projection}.weight" in tensors:
            x = linear(x, str(architecture.projection))
        return x

    def run(input_ids: Int64) -> Float32:
        ids = input_ids[0]
        x, index = embed(ids), np.arange(len(ids))
        bias = np.zeros((1, 1, 1), np.float32)
        if architecture.relative_bias is not None:
            table = relative_bias(tensors[f"{architecture.relative_bias}.weight"], len(ids))
            bias = table[:, index - index[:, None] + len(ids) - 1]
        for number in range(layers):
            name = architecture.layer_names(number)
            q, k, v = (
                linear(x, name[projection]).reshape(len(ids), heads, -1).transpose(1, 0, 2)
                for projection in ("query", "key", "value")
            )
            scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(q.shape[-1])) + bias
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            context = (weights @ v).transpose(1, 0, 2).reshape(len(ids), -1)
            x = norm(x + linear(context, name["output"]), name["attention_norm"])
            x = norm(x + linear(activation(linear(x, name["up"])), name["down"]), name["norm"])
        return np.asarray(x[None], np.float32)

    return run
