"""fp32 encoder -> int8 encoder: per-channel symmetric weights, dynamic activation ranges."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from onnxsim_embed.export.bert import Bert, Layer, Linear
from onnxsim_embed.export.graph import DynamicLinear, quantize_weight

METHOD = "dynamic: int8 weights per output channel, one uint8 activation range per batch"


def quantize_dynamic(bert: Bert) -> Bert:
    """Return the encoder with every linear layer in int8; embeddings and norms stay float32."""
    return replace(bert, layers=tuple(_quantize_layer(layer) for layer in bert.layers))


def _quantize_layer(layer: Layer) -> Layer:
    changed: dict[str, Any] = {}
    for entry in fields(layer):
        linear = getattr(layer, entry.name)
        if isinstance(linear, Linear):
            weight, scales = quantize_weight(linear.weight)
            changed[entry.name] = DynamicLinear(weight, scales, linear.bias)
    return replace(layer, **changed)
