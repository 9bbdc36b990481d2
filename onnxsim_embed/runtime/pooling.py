"""Hidden states -> one embedding per text: pooling, dense layers, L2 normalization, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from onnxsim_embed.artifact.manifest import MANIFEST, Artifact
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.system.arrays import Float32, Int64


class PoolingMode(str, Enum):
    """How token vectors become one vector; values are sentence-transformers' names."""

    MEAN = "mean"
    CLS = "cls"
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    LAST_TOKEN = "lasttoken"

    @classmethod
    def parse(cls, name: str) -> PoolingMode:
        """Return the mode of that name or alias; ValueError lists the known ones."""
        aliases = {
            "mean_sqrt_len": "mean_sqrt_len_tokens",
            "last": "lasttoken",
            "last_token": "lasttoken",
            "weighted_mean": "weightedmean",
        }
        try:
            return cls(aliases.get(name, name))
        except ValueError:
            known = ", ".join(mode.value for mode in cls)
            raise ValueError(f"unknown pooling {name!r}; allowed are {known}") from None


def pool(
    hidden: Float32, attention_mask: Int64 | None, modes: Sequence[PoolingMode], skip: int = 0
) -> Float32:
    """Pool token vectors; several modes are concatenated, as in sentence-transformers.

    :param hidden: float32 array (batch, tokens, hidden).
    :param attention_mask: int64 array (batch, tokens), 1 for real tokens, with padding on either
        side; None if all are real. A row without real tokens yields zeros.
    :param modes: at least one mode.
    :param skip: number of real tokens at the beginning that are not pooled: those of a prompt. The
        weights of "weightedmean" count them all the same, as in sentence-transformers.
    :returns: float32 array (batch, hidden * modes).
    """
    if attention_mask is not None:
        rows = zip(hidden, attention_mask.astype(np.bool_), strict=True)
        pooled = [pool(states[None, real], None, modes, skip) for states, real in rows]
        empty = np.zeros((0, hidden.shape[2] * len(modes)), np.float32)
        return np.concatenate([empty, *pooled])
    if hidden.shape[1] <= skip:
        return np.zeros((len(hidden), hidden.shape[2] * len(modes)), np.float32)
    return np.concatenate([_pool_one(hidden[:, skip:], mode, skip) for mode in modes], axis=1)


def _pool_one(hidden: Float32, mode: PoolingMode, skipped: int) -> Float32:
    tokens = hidden.shape[1]
    if mode is PoolingMode.CLS:
        return hidden[:, 0]
    if mode is PoolingMode.LAST_TOKEN:
        return hidden[:, -1]
    if mode is PoolingMode.MAX:
        return np.asarray(hidden.max(axis=1))
    if mode is PoolingMode.WEIGHTED_MEAN:
        weights = np.arange(1, tokens + 1, dtype=np.float32) + np.float32(skipped)
        return np.asarray((hidden * weights[:, None]).sum(axis=1) / weights.sum(dtype=np.float32))
    divisor = tokens if mode is PoolingMode.MEAN else np.sqrt(tokens)
    return np.asarray(hidden.sum(axis=1) / np.float32(divisor))


def pooling_weights(attention_mask: Int64, modes: Sequence[PoolingMode]) -> Float32 | None:
    """Return what multiplies each token vector in `pool`, or None if a mode is not a sum ("max").

    :returns: float32 array (batch, modes, tokens).
    """
    if PoolingMode.MAX in modes:
        return None
    real = attention_mask.astype(np.float32)
    position = np.cumsum(real, axis=1, dtype=np.float32) * real
    count = np.maximum(position.max(axis=1, keepdims=True, initial=0), 1)

    def weights(mode: PoolingMode) -> Float32:
        if mode in (PoolingMode.CLS, PoolingMode.LAST_TOKEN):
            return (position == (1 if mode is PoolingMode.CLS else count)).astype(np.float32)
        if mode is PoolingMode.WEIGHTED_MEAN:
            return position / np.maximum(position.sum(axis=1, keepdims=True), 1)
        return real / (count if mode is PoolingMode.MEAN else np.sqrt(count))

    return np.stack([weights(mode) for mode in modes], axis=1)


def normalize(vectors: Float32) -> Float32:
    """Scale each row of a float32 array (n, dim) to unit L2 norm; zero rows stay zero."""
    # einsum adds each row by itself, so that a row's norm cannot depend on the other rows.
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    return np.asarray(vectors / np.where(norms > 0, norms, np.float32(1)), np.float32)


@dataclass(frozen=True)
class Dense:
    """A linear layer and an activation after pooling: sentence-transformers' Dense module.

    :param weight: float32 array (in_features, out_features).
    :param bias: float32 array (out_features,) or None.
    :param activation: key of ACTIVATIONS.
    """

    weight: Float32
    bias: Float32 | None
    activation: str

    def __call__(self, pooled: Float32) -> Float32:
        """Map a float32 array (n, in_features) to (n, out_features)."""
        # Row by row: a matrix product chooses its kernel by batch size, and an embedding must not
        # depend on the other texts.
        rows = [row @ self.weight for row in pooled]
        projected = np.stack(rows) if rows else np.zeros((0, self.weight.shape[1]), np.float32)
        if self.bias is not None:
            projected = projected + self.bias
        return np.asarray(ACTIVATIONS[self.activation](projected), np.float32)


@dataclass(frozen=True)
class Head:
    """The modules after the encoder: pooling (modes are concatenated), dense layers, normalization."""

    modes: tuple[PoolingMode, ...]
    dense: tuple[Dense, ...] = ()
    normalizes: bool = True

    def __call__(
        self, hidden: Float32, attention_mask: Int64 | None = None, skip: int = 0
    ) -> Float32:
        """Map hidden, float32 (batch, tokens, hidden), to embeddings, float32 (batch, dim); see `pool`."""
        return self.finish(pool(hidden, attention_mask, self.modes, skip))

    def finish(self, pooled: Float32) -> Float32:
        """Map pooled token vectors, float32 (batch, hidden * modes), to embeddings (batch, dim)."""
        for layer in self.dense:
            pooled = layer(pooled)
        return normalize(pooled) if self.normalizes else pooled


def load_head(artifact: Artifact) -> Head:
    """Load the modules after the encoder of an artifact."""
    manifest = artifact.manifest
    try:
        modes = tuple(PoolingMode.parse(name) for name in manifest.pooling)
    except ValueError as error:
        raise ArtifactError(f"{artifact.directory / MANIFEST}: {error}") from None
    return Head(
        modes, tuple(load_dense(artifact, path) for path in manifest.dense), manifest.normalize
    )


def load_dense(artifact: Artifact, path: str) -> Dense:
    """Load the Dense module in a directory of an artifact."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config_file = artifact.file(f"{path}/config.json")
    try:
        activation = json.loads(config_file.read_text(encoding="utf-8"))["activation_function"]
        tensors = load_file(artifact.file(f"{path}/model.safetensors"))
        weight = np.ascontiguousarray(tensors["linear.weight"].T)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot load the Dense module {config_file.parent}: {error!r}"
        ) from None
    if activation not in ACTIVATIONS:
        raise ArtifactError(
            f"{config_file}: activation {activation!r} is not one of {sorted(ACTIVATIONS)}"
        )
    return Dense(weight, tensors.get("linear.bias"), activation)


def gelu(x: Float32) -> Float32:
    """Return the exact GELU (not its tanh approximation) in float32."""
    from scipy.special import erf

    return np.asarray(
        x * np.float32(0.5) * (np.float32(1) + erf(x / np.float32(np.sqrt(2)))), np.float32
    )


def sigmoid(x: Float32) -> Float32:
    """Return the logistic function in float32."""
    from scipy.special import expit

    return np.asarray(expit(x), np.float32)


ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {
    "torch.nn.modules.activation.Tanh": np.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.ReLU": lambda x: np.maximum(x, np.float32(0)),
    "torch.nn.modules.activation.GELU": gelu,
    "torch.nn.modules.activation.Sigmoid": sigmoid,
}
