"""The small files of an artifact, in the form that every reader understands (the legacy schema)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import LEGACY_POOLING, Checkpoint, read_dense
from onnxsim_embed.export.texts import read_json

# What special_tokens_map.json may name, and what BERT's tokenizers call it where nothing is said.
SPECIAL_TOKENS = {
    "bos_token": None,
    "eos_token": None,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# Keys of tokenizer_config.json that bake in a length, a padding or a path of the machine that saved it.
STALE_KEYS = (
    "max_length",
    "stride",
    "truncation_side",
    "truncation_strategy",
    "pad_to_multiple_of",
    "padding_side",
    "pad_token_type_id",
    "name_or_path",
    "is_local",
    "local_files_only",
    "special_tokens_map_file",
    "tokenizer_file",
)


# Architectures whose vocab.txt is BERT's.
WORDPIECE = ("bert", "distilbert", "electra")


def write_configs(checkpoint: Checkpoint, hidden: int, work: Path) -> int:
    """Write configuration, tokenizer and module files.

    :param hidden: width of the encoder's hidden states.
    :param work: the artifact directory being made.
    :returns: width of a finished vector.
    :raises CheckpointError: if a file of the checkpoint cannot be used.
    """
    _write_json(work / "config.json", dict(checkpoint.config))
    _write_tokenizer(checkpoint, work)
    _write_json(
        work / "sentence_bert_config.json",
        {"max_seq_length": checkpoint.max_seq_length, "do_lower_case": checkpoint.do_lower_case},
    )
    _write_json(
        work / "config_sentence_transformers.json",
        {
            "prompts": dict(checkpoint.prompts),
            "default_prompt_name": checkpoint.default_prompt_name,
            "similarity_fn_name": checkpoint.similarity_fn_name,
        },
    )
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write_pooling(checkpoint, hidden, work / "1_Pooling")
    dim = hidden * len(checkpoint.pooling)
    for path in checkpoint.dense:
        modules.append((path, "Dense"))
        dim = _write_dense(checkpoint.directory / path, work / path, dim)
    if checkpoint.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (work / modules[-1][0]).mkdir()
    _write_json(
        work / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    return dim


def _write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_pooling(checkpoint: Checkpoint, hidden: int, directory: Path) -> None:
    chosen = set(checkpoint.pooling)
    config: dict[str, Any] = {"word_embedding_dimension": hidden}
    config |= {key: mode in chosen for key, mode in LEGACY_POOLING.items()}
    config["include_prompt"] = True
    if checkpoint.pooling != tuple(mode for mode in LEGACY_POOLING.values() if mode in chosen):
        # An order that the booleans cannot say; sentence-transformers 5.4 and later read this key.
        config["pooling_mode"] = [mode.value for mode in checkpoint.pooling]
    _write_json(directory / "config.json", config)


def _write_dense(source: Path, target: Path, inputs: int) -> int:
    from safetensors.numpy import save_file

    from onnxsim_embed.runtime.pooling import ACTIVATIONS

    weight, bias, activation = read_dense(source)
    if weight.shape[0] != inputs:
        raise CheckpointError(
            f"{source} takes {weight.shape[0]} features, the module before it gives {inputs}"
        )
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{source}: activation {activation!r} is not one of {sorted(ACTIVATIONS)}"
        )
    tensors = {"linear.weight": weight.T.copy()} | ({} if bias is None else {"linear.bias": bias})
    _write_json(
        target / "config.json",
        {
            "in_features": weight.shape[0],
            "out_features": weight.shape[1],
            "bias": bias is not None,
            "activation_function": activation,
        },
    )
    save_file(tensors, target / "model.safetensors")
    return int(weight.shape[1])


def _write_tokenizer(checkpoint: Checkpoint, work: Path) -> None:
    source = checkpoint.transformer
    config = (
        read_json(source / "tokenizer_config.json")
        if (source / "tokenizer_config.json").is_file()
        else {}
    )
    if (source / "tokenizer.json").is_file():
        tokenizer = read_json(source / "tokenizer.json")
    elif checkpoint.architecture in WORDPIECE and (source / "vocab.txt").is_file():
        tokenizer = _tokenizer_from_vocabulary(source / "vocab.txt", config)
    else:
        tokenizer = _tokenizer_from_transformers(checkpoint)
    tokenizer["truncation"] = tokenizer["padding"] = None
    _write_json(work / "tokenizer.json", tokenizer)
    _check_tokenizer(checkpoint, work / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab")
    tokens = _special_tokens(source, config, vocabulary)
    config = {key: value for key, value in config.items() if key not in STALE_KEYS}
    config |= tokens | {"model_max_length": checkpoint.max_seq_length}
    bert = checkpoint.architecture in WORDPIECE
    config.setdefault("tokenizer_class", "BertTokenizer" if bert else "PreTrainedTokenizerFast")
    _write_json(work / "tokenizer_config.json", config)
    _write_json(work / "special_tokens_map.json", tokens)
    if (source / "vocab.txt").is_file():
        shutil.copyfile(source / "vocab.txt", work / "vocab.txt")
    elif isinstance(vocabulary, dict) and tokenizer["model"].get("type") == "WordPiece":
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        (work / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def _special_tokens(source: Path, config: dict[str, Any], vocabulary: Any) -> dict[str, str]:  # noqa: ANN401
    """Return the special tokens that the checkpoint names, else BERT's own where it has them."""
    named = source / "special_tokens_map.json"
    stated = read_json(named) if named.is_file() else {}
    tokens = {}
    for key, default in SPECIAL_TOKENS.items():
        token = _content(config.get(key)) or _content(stated.get(key))
        if token is None and isinstance(vocabulary, dict) and default in vocabulary:
            token = default
        if token is not None:
            tokens[key] = token
    return tokens


def _tokenizer_from_transformers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Build tokenizer.json's content from the older files of an architecture (sentencepiece, BPE)."""
    from onnxsim_embed.export.reference import has_torch

    where = checkpoint.transformer
    if not has_torch():
        raise CheckpointError(
            f"{where} has no tokenizer.json, and making one of the tokenizer of "
            f"{checkpoint.architecture!r} needs transformers: pip install 'onnxsim-embed[optimum]'"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, use_fast=True, local_files_only=True, trust_remote_code=False
        )
        content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers' and the tokenizers library's share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{where} has no tokenizer.json, and transformers cannot make one: {reason}"
        ) from error
    return content


def _check_tokenizer(checkpoint: Checkpoint, written: Path) -> None:
    """Refuse a tokenizer that cannot be read, or knows more tokens than the model has embeddings."""
    from tokenizers import Tokenizer

    path = checkpoint.transformer / "tokenizer.json"
    try:
        size = Tokenizer.from_file(str(written)).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
    known = checkpoint.config.get("vocab_size")
    if isinstance(known, int) and size > known:
        raise CheckpointError(
            f"{checkpoint.transformer}: the tokenizer knows {size} tokens, config.json says vocab_size {known}"
        )


def _content(token: Any) -> str | None:  # noqa: ANN401
    """Return a special token's text; configurations hold it bare or as an AddedToken object."""
    return token.get("content") if isinstance(token, dict) else token


def _tokenizer_from_vocabulary(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Build tokenizer.json's content for a checkpoint that holds BERT's vocab.txt only."""
    from tokenizers.implementations import BertWordPieceTokenizer

    try:
        tokenizer = BertWordPieceTokenizer(
            str(path),
            lowercase=bool(config.get("do_lower_case", True)),
            handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
            strip_accents=config.get("strip_accents"),
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a readable BERT vocabulary: {error}") from error
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content
