"""Configuration and module files of an artifact, in the legacy schema that all readers understand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.modules import LEGACY_POOLING, read_dense
from onnxsim_embed.export.tokenizer import (
    SPECIAL_TOKENS,
    TokenizerFiles,
    check_ids,
    prepend_lowercase,
)
from onnxsim_embed.export.weights import write_json

# Keys of tokenizer_config.json that fix a length, a padding or a path of the machine that saved it.
STALE_KEYS = (
    "max_length", "stride", "truncation_side", "truncation_strategy", "pad_to_multiple_of",
    "padding_side", "pad_token_type_id", "name_or_path", "is_local", "local_files_only",
    "special_tokens_map_file", "tokenizer_file",
)  # fmt: skip


def write_configs(checkpoint: Checkpoint, hidden: int, work: Path) -> int:
    """Write configuration, tokenizer and module files; from the dim of hidden states, return that of vectors."""
    write_json(work / "config.json", dict(checkpoint.config))
    _write_tokenizer(checkpoint, work)
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
    table: dict[str, Any] = {"word_embedding_dimension": hidden, **modes}
    table["include_prompt"] = checkpoint.include_prompt
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


def _write_tokenizer(checkpoint: Checkpoint, work: Path) -> None:
    """Write tokenizer.json without length and padding, its configuration and, for BERT, vocab.txt."""
    source = TokenizerFiles.read(checkpoint)
    tokenizer = source.tokenizer()
    if checkpoint.do_lower_case:
        prepend_lowercase(tokenizer)
    config = {key: value for key, value in source.config.items() if key not in STALE_KEYS}
    config["model_max_length"] = checkpoint.max_seq_length
    direction = (tokenizer.get("truncation") or {}).get("direction", "right")
    side = source.config.get("truncation_side") or str(direction).lower()
    tokenizer["truncation"] = tokenizer["padding"] = None
    if side == "left":
        config["truncation_side"] = side
        tokenizer["truncation"] = {"direction": "Left", "max_length": checkpoint.max_seq_length,
                                   "strategy": "LongestFirst", "stride": 0}  # fmt: skip
    write_json(work / "tokenizer.json", tokenizer)
    check_ids(checkpoint, work / "tokenizer.json")
    tokens, vocabulary = dict(source.tokens), tokenizer["model"].get("vocab")
    if isinstance(vocabulary, dict):
        tokens = {k: t for k, t in SPECIAL_TOKENS.items() if t and t in vocabulary} | tokens
    tokens = {key: tokens[key] for key in SPECIAL_TOKENS if key in tokens}
    config |= tokens
    config.setdefault("tokenizer_class", source.name)
    write_json(work / "tokenizer_config.json", config)
    write_json(work / "special_tokens_map.json", tokens)
    if (checkpoint.transformer / "vocab.txt").is_file():
        shutil.copyfile(checkpoint.transformer / "vocab.txt", work / "vocab.txt")
    elif isinstance(vocabulary, dict) and tokenizer["model"].get("type") == "WordPiece":
        words = {index: word for word, index in vocabulary.items()}
        lines = [words.get(index, "") for index in range(max(words) + 1)]  # ids are line numbers
        (work / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
