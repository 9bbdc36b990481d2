"""Independent references for an export: PyTorch if it is installed, else BERT written in numpy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.system.hardware import available_cpus
from onnxsim_embed.system.threads import single_blas_thread

Float32 = npt.NDArray[np.float32]
Hidden = Callable[[npt.NDArray[np.int64]], Float32]


def has_torch() -> bool:
    """Return whether PyTorch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def torch_reference(checkpoint: Checkpoint) -> Hidden:
    """Return transformers' own model as a function from input_ids (1, t) to hidden states (1, t, h)."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(
        checkpoint.transformer, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    if enabled:
        logging.enable_progress_bar()

    def run(input_ids: npt.NDArray[np.int64]) -> Float32:
        with torch.inference_mode():
            ids = torch.from_numpy(input_ids)
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return np.asarray(hidden.numpy())

    return run


def numpy_reference(config: Mapping[str, object], tensors: Mapping[str, Float32]) -> Hidden:
    """Return BERT as Devlin et al. (arXiv:1810.04805) define it, from its unmodified weights.

    Shares no code with the exported graph, so that an error in either shows.
    """
    from scipy.special import erf

    heads, layers = int(str(config["num_attention_heads"])), int(str(config["num_hidden_layers"]))
    epsilon = float(str(config.get("layer_norm_eps", 1e-12)))
    kind = str(config.get("hidden_act", "gelu"))

    def linear(x: Float32, name: str) -> Float32:
        return np.asarray(x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])

    def norm(x: Float32, name: str) -> Float32:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(epsilon))
        return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def activation(x: Float32) -> Float32:
        if kind == "relu":
            return np.maximum(x, np.float32(0))
        if kind == "gelu":
            return np.asarray(x * (1 + erf(x / np.float32(np.sqrt(2)))) / 2, np.float32)
        return np.asarray(
            x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3))) / 2,
            np.float32,
        )

    def run(input_ids: npt.NDArray[np.int64]) -> Float32:
        ids = input_ids[0]
        x = tensors["embeddings.word_embeddings.weight"][ids]
        x = x + tensors["embeddings.position_embeddings.weight"][: len(ids)]
        x = norm(x + tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for number in range(layers):
            name = f"encoder.layer.{number}"
            q, k, v = (
                linear(x, f"{name}.attention.self.{projection}")
                .reshape(len(ids), heads, -1)
                .transpose(1, 0, 2)
                for projection in ("query", "key", "value")
            )
            scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(q.shape[-1]))
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            context = (weights @ v).transpose(1, 0, 2).reshape(len(ids), -1)
            x = norm(
                x + linear(context, f"{name}.attention.output.dense"),
                f"{name}.attention.output.LayerNorm",
            )
            inner = activation(linear(x, f"{name}.intermediate.dense"))
            x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return np.asarray(x[None], np.float32)

    return run


def reference_vectors(
    hidden: Hidden, finish: Callable[[Float32], Float32], token_ids: Sequence[npt.NDArray[np.int64]]
) -> Float32:
    """Run a reference one text at a time, unpadded; `finish` pools (1, t, h) to (1, dim)."""
    # Texts in parallel with one BLAS thread each, which is faster than the reverse.
    with single_blas_thread(), ThreadPoolExecutor(available_cpus()) as pool:
        return np.concatenate(list(pool.map(lambda ids: finish(hidden(ids[None])), token_ids)))
