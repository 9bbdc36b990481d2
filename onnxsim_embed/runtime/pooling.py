"""Hidden states -> one embedding per text: pooling, dense layers, L2 normalization, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.manifest import MANIFEST, Artifact
from onnxsim_embed.errors import ArtifactError

Float32 = npt.NDArray[np.float32]


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
    hidden: Float32, attention_mask: npt.NDArray[np.int64] | None, modes: Sequence[PoolingMode]
) -> Float32:
    """Pool token vectors; several modes are concatenated, as in sentence-transformers.

    :param hidden: float32 array (batch, tokens, hidden).
    :param attention_mask: int64 array (batch, tokens), 1 for real tokens; None if all are real. A row
        whose mask is all zero yields zeros.
    :param modes: at least one mode.
    :returns: float32 array (batch, hidden * modes).
    :raises ValueError: if shapes disagree or `modes` is empty.
    """
    if hidden.ndim != 3:
        raise ValueError(f"hidden must have shape (batch, tokens, hidden), got {hidden.shape}")
    if attention_mask is not None and attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"attention_mask {attention_mask.shape} does not match hidden {hidden.shape}"
        )
    if not modes:
        raise ValueError("at least one pooling mode is needed")
    if hidden.shape[1] == 0:
        pooled = [np.zeros((len(hidden), hidden.shape[2]), np.float32) for _ in modes]
    elif attention_mask is None:
        pooled = [_pool_all(hidden, mode) for mode in modes]
    else:
        real = attention_mask.astype(np.bool_)
        alive = real.any(axis=1, keepdims=True)
        pooled = [np.where(alive, _pool_real(hidden, real, mode), np.float32(0)) for mode in modes]
    return pooled[0] if len(pooled) == 1 else np.concatenate(pooled, axis=1)


def _pool_all(hidden: Float32, mode: PoolingMode) -> Float32:
    """Pool rows without padding."""
    tokens = hidden.shape[1]
    if mode is PoolingMode.CLS:
        return hidden[:, 0]
    if mode is PoolingMode.LAST_TOKEN:
        return hidden[:, -1]
    if mode is PoolingMode.MAX:
        return np.asarray(hidden.max(axis=1))
    if mode is PoolingMode.WEIGHTED_MEAN:
        weights = np.arange(1, tokens + 1, dtype=np.float32)
        return np.asarray((hidden * weights[:, None]).sum(axis=1) / weights.sum(dtype=np.float32))
    divisor = tokens if mode is PoolingMode.MEAN else np.sqrt(tokens)
    return np.asarray(hidden.sum(axis=1) / np.float32(divisor))


def _pool_real(hidden: Float32, real: npt.NDArray[np.bool_], mode: PoolingMode) -> Float32:
    """Pool the real tokens of padded rows; padding may be on either side."""
    batch, tokens, _ = hidden.shape
    first = real.argmax(axis=1)
    if mode is PoolingMode.CLS:
        return np.asarray(hidden[np.arange(batch), first])
    if mode is PoolingMode.LAST_TOKEN:
        return np.asarray(hidden[np.arange(batch), tokens - 1 - real[:, ::-1].argmax(axis=1)])
    if mode is PoolingMode.MAX:
        return np.asarray(np.where(real[:, :, None], hidden, np.float32(-np.inf)).max(axis=1))
    weights = real.astype(np.float32)
    if mode is PoolingMode.WEIGHTED_MEAN:
        weights *= (np.arange(1, tokens + 1) - first[:, None]).astype(np.float32)
    total = weights.sum(axis=1, keepdims=True, dtype=np.float32)
    if mode is PoolingMode.MEAN_SQRT_LEN:
        total = np.sqrt(total)
    summed = np.where(real[:, :, None], hidden * weights[:, :, None], np.float32(0)).sum(axis=1)
    return np.asarray(summed / np.where(total > 0, total, np.float32(1)), np.float32)


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
        projected = (
            np.stack([row @ self.weight for row in pooled])
            if len(pooled)
            else np.zeros((0, self.weight.shape[1]), np.float32)
        )
        if self.bias is not None:
            projected = projected + self.bias
        return np.asarray(ACTIVATIONS[self.activation](projected), np.float32)


@dataclass(frozen=True)
class Head:
    """The modules after the encoder.

    :param modes: pooling modes, concatenated.
    :param dense: layers applied to the pooled vectors, in order.
    :param normalizes: whether the last module is an L2 normalization.
    """

    modes: tuple[PoolingMode, ...]
    dense: tuple[Dense, ...] = ()
    normalizes: bool = True

    def __call__(
        self, hidden: Float32, attention_mask: npt.NDArray[np.int64] | None = None
    ) -> Float32:
        """Map hidden, float32 (batch, tokens, hidden), to embeddings, float32 (batch, dim)."""
        vectors = pool(hidden, attention_mask, self.modes)
        for layer in self.dense:
            vectors = layer(vectors)
        return normalize(vectors) if self.normalizes else vectors


def load_dense(config_file: Path, weights_file: Path) -> Dense:
    """Load a Dense module of an artifact."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        tensors = load_file(weights_file)
        dense = Dense(
            np.ascontiguousarray(tensors["linear.weight"].T),
            tensors.get("linear.bias"),
            config["activation_function"],
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot load the Dense module {config_file.parent}: {error!r}"
        ) from None
    if dense.activation not in ACTIVATIONS:
        raise ArtifactError(
            f"{config_file}: activation {dense.activation!r} is not one of {sorted(ACTIVATIONS)}"
        )
    return dense


def load_head(artifact: Artifact) -> Head:
    """Return the modules that follow the encoder of an artifact."""
    manifest = artifact.manifest
    dense = (
        load_dense(artifact.file(f"{path}/config.json"), artifact.file(f"{path}/model.safetensors"))
        for path in manifest.dense
    )
    try:
        modes = tuple(PoolingMode.parse(name) for name in manifest.pooling)
    except ValueError as error:
        raise ArtifactError(f"{artifact.directory / MANIFEST}: {error}") from None
    return Head(modes, tuple(dense), manifest.normalize)


def gelu(x: Float32) -> Float32:
    """Return the exact GELU (not its tanh approximation) in float32."""
    from scipy.special import erf

    return np.asarray(
        x * np.float32(0.5) * (np.float32(1) + erf(x / np.float32(np.sqrt(2)))), np.float32
    )


def _sigmoid(x: Float32) -> Float32:
    from scipy.special import expit

    return np.asarray(expit(x), np.float32)


ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {
    "torch.nn.modules.activation.Tanh": np.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.ReLU": lambda x: np.maximum(x, np.float32(0)),
    "torch.nn.modules.activation.GELU": gelu,
    "torch.nn.modules.activation.Sigmoid": _sigmoid,
}
