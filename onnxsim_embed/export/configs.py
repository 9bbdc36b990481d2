"""Configuration and module files of an artifact, in the legacy schema that all readers understand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.modules import LEGACY_POOLING, read_dense
from onnxsim_embed.export.tokenizer import write_tokenizer
from onnxsim_embed.export.weights import write_json


def write_configs(checkpoint: Checkpoint, hidden: int, work: Path) -> int:
    """Write configuration, tokenizer and module files.

    :param hidden: dim of the encoder's hidden states.
    :param work: directory of the artifact.
    :returns: dim of the vectors.
    :raises CheckpointError: if a file of the checkpoint cannot be used.
    """
    write_json(work / "config.json", dict(checkpoint.config))
    write_tokenizer(checkpoint, work)
    write_json(
        work / "sentence_bert_config.json",
        {"max_seq_length": checkpoint.max_seq_length, "do_lower_case": checkpoint.do_lower_case},
    )
    write_json(
        work / "config_sentence_transformers.json",
        {
            "prompts": dict(checkpoint.prompts),
            "default_prompt_name": checkpoint.default_prompt_name,
            "similarity_fn_name": checkpoint.similarity_fn_name,
        },
    )
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modes = {key: mode in checkpoint.pooling for key, mode in LEGACY_POOLING.items()}
    table: dict[str, Any] = {"word_embedding_dimension": hidden, **modes, "include_prompt": True}
    if checkpoint.pooling != tuple(m for m in LEGACY_POOLING.values() if m in checkpoint.pooling):
        # The booleans imply another order; sentence-transformers 5.4 and later read this key.
        table["pooling_mode"] = [mode.value for mode in checkpoint.pooling]
    write_json(work / "1_Pooling/config.json", table)
    dim = hidden * len(checkpoint.pooling)
    for path in checkpoint.dense:
        modules.append((path, "Dense"))
        dim = _write_dense(checkpoint.directory / path, work / path, dim)
    if checkpoint.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (work / modules[-1][0]).mkdir()
    write_json(
        work / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    return dim


def _write_dense(source: Path, target: Path, inputs: int) -> int:
    from safetensors.numpy import save_file

    from onnxsim_embed.runtime.pooling import ACTIVATIONS

    weight, bias, activation = read_dense(source)
    if weight.shape[0] != inputs:
        raise CheckpointError(
            f"{source} takes {weight.shape[0]} features, the previous module outputs {inputs}"
        )
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{source}: activation {activation!r} is not one of {sorted(ACTIVATIONS)}"
        )
    write_json(
        target / "config.json",
        {
            "in_features": weight.shape[0],
            "out_features": weight.shape[1],
            "bias": bias is not None,
            "activation_function": activation,
        },
    )
    tensors = {"linear.weight": weight.T.copy()} | ({} if bias is None else {"linear.bias": bias})
    save_file(tensors, target / "model.safetensors")
    return int(weight.shape[1])
