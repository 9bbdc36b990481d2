"""Architectures that are built directly from their weights: one entry each, of transformers' names.

All are post-norm encoders as BERT (arXiv:1810.04805); an entry states what differs. From it come
the names that `weights.py` strips, the loader in `encoder.py`, the graph in `onnx/encoder_graph.py`
and the reference in `numpy_encoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.runtime.pooling import gelu
from onnxsim_embed.system.arrays import Float32


def gelu_tanh(x: Float32) -> Float32:
    """Return the tanh approximation of the GELU."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(x * (1 + np.tanh(inner)) / 2, np.float32)


ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
}

BERT_LAYER = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "output": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What distinguishes an encoder from BERT, which has the defaults.

    :param prefix: begins the names of the tensors in a model with a head.
    :param layer_prefix: begins the names of a layer's tensors, before its number.
    :param layer: names of a layer's linears and norms.
    :param keys: keys of config.json by BERT's, where they have other names.
    :param token_types: whether there is an embedding of token types.
    :param skipped_id: token that positions skip, counting from behind its id, where config.json has
        no `pad_token_id`; None if positions are 0, 1, 2, ...
    :param fixed_skipped_id: whether `pad_token_id` does not change it.
    :param relative_bias: name of the embedding of relative positions that all layers add to their
        attention scores (MPNet, arXiv:2004.09297), or None.
    :param projection: name of the linear from `embedding_size` to the hidden size, which exists where
        the two differ; None if the architecture has none.
    """

    prefix: str = "bert."
    layer_prefix: str = "encoder.layer."
    layer: Mapping[str, str] = field(default_factory=lambda: BERT_LAYER)
    keys: Mapping[str, str] = field(default_factory=dict)
    token_types: bool = True
    skipped_id: int | None = None
    fixed_skipped_id: bool = False
    relative_bias: str | None = None
    projection: str | None = None

    def key(self, name: str) -> str:
        """Return the key of config.json that BERT calls `name`."""
        return self.keys.get(name, name)

    def layer_names(self, number: int) -> dict[str, str]:
        """Return the names of a layer's linears and norms, without ".weight" and ".bias"."""
        return {key: f"{self.layer_prefix}{number}.{name}" for key, name in self.layer.items()}

    def skipped(self, config: Mapping[str, Any]) -> int | None:
        """Return the token that positions skip, or None."""
        if self.skipped_id is None or self.fixed_skipped_id:
            return self.skipped_id
        return pad_token_id(config, self.skipped_id)


def pad_token_id(config: Mapping[str, Any], default: int) -> int:
    """Return the `pad_token_id` of config.json, or a default if it has none."""
    value = config.get("pad_token_id")
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"config.json: pad_token_id must be a token id, got {value!r}")
    return value


BERT = Architecture()
ROBERTA = replace(BERT, prefix="roberta.", skipped_id=1)
ARCHITECTURES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": replace(BERT, prefix="electra.", projection="embeddings_project"),
    "distilbert": Architecture(
        prefix="distilbert.",
        layer_prefix="transformer.layer.",
        layer={
            "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
            "output": "attention.out_lin", "attention_norm": "sa_layer_norm", "up": "ffn.lin1",
            "down": "ffn.lin2", "norm": "output_layer_norm",
        },
        keys={
            "hidden_size": "dim", "intermediate_size": "hidden_dim", "hidden_act": "activation",
            "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
        },
        token_types=False,
    ),
    "mpnet": Architecture(
        prefix="mpnet.",
        layer=BERT_LAYER | {
            "query": "attention.attn.q", "key": "attention.attn.k", "value": "attention.attn.v",
            "output": "attention.attn.o", "attention_norm": "attention.LayerNorm",
        },
        token_types=False,
        skipped_id=1,
        fixed_skipped_id=True,
        relative_bias="encoder.relative_attention_bias",
    ),
}  # fmt: skip
