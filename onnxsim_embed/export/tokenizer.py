"""Tokenizer files of an artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.reference import has_torch
from onnxsim_embed.export.weights import read_json, read_optional_json, write_json

# Keys of special_tokens_map.json, with BERT's own tokens as defaults.
SPECIAL_TOKENS = {
    "bos_token": None,
    "eos_token": None,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# Keys of tokenizer_config.json that fix a length, a padding or a path of the machine that saved it.
STALE_KEYS = (
    "max_length", "stride", "truncation_side", "truncation_strategy", "pad_to_multiple_of",
    "padding_side", "pad_token_type_id", "name_or_path", "is_local", "local_files_only",
    "special_tokens_map_file", "tokenizer_file",
)  # fmt: skip

# Architectures whose vocab.txt is BERT's.
WORDPIECE = ("bert", "distilbert", "electra")


def write_tokenizer(checkpoint: Checkpoint, work: Path) -> None:
    """Write tokenizer.json without length and padding, its configuration and, for BERT, vocab.txt.

    :raises CheckpointError: if the checkpoint's tokenizer cannot be read, or does not fit the model.
    """
    source = checkpoint.transformer
    config = read_optional_json(source / "tokenizer_config.json")
    if (source / "tokenizer.json").is_file():
        tokenizer = read_json(source / "tokenizer.json")
    elif checkpoint.architecture in WORDPIECE and (source / "vocab.txt").is_file():
        tokenizer = _from_vocabulary(source / "vocab.txt", config)
    else:
        tokenizer = _from_transformers(checkpoint)
    tokenizer["truncation"] = tokenizer["padding"] = None
    write_json(work / "tokenizer.json", tokenizer)
    _check(checkpoint, work / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab")
    tokens = _special_tokens(source, config, vocabulary)
    config = {key: value for key, value in config.items() if key not in STALE_KEYS}
    config |= tokens | {"model_max_length": checkpoint.max_seq_length}
    bert = checkpoint.architecture in WORDPIECE
    config.setdefault("tokenizer_class", "BertTokenizer" if bert else "PreTrainedTokenizerFast")
    write_json(work / "tokenizer_config.json", config)
    write_json(work / "special_tokens_map.json", tokens)
    if (source / "vocab.txt").is_file():
        shutil.copyfile(source / "vocab.txt", work / "vocab.txt")
    elif isinstance(vocabulary, dict) and tokenizer["model"].get("type") == "WordPiece":
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        (work / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def _special_tokens(source: Path, config: Mapping[str, Any], vocabulary: object) -> dict[str, str]:
    """Return the special tokens that the checkpoint names, else BERT's own from its vocabulary."""
    saved = read_optional_json(source / "special_tokens_map.json")
    tokens = {}
    for key, default in SPECIAL_TOKENS.items():
        token = _content(config.get(key)) or _content(saved.get(key))
        if token is None and isinstance(vocabulary, dict) and default in vocabulary:
            token = default
        if token is not None:
            tokens[key] = token
    return tokens


def _content(token: Any) -> str | None:  # noqa: ANN401
    """Return the text of a special token, which configurations hold bare or as an AddedToken."""
    return token.get("content") if isinstance(token, dict) else token


def _from_vocabulary(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Build tokenizer.json for a checkpoint that has BERT's vocab.txt only."""
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


def _from_transformers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Build tokenizer.json from the older files of an architecture (sentencepiece, BPE)."""
    path = checkpoint.transformer
    if not has_torch():
        raise CheckpointError(
            f"{path} has no tokenizer.json, and converting the tokenizer of "
            f"{checkpoint.architecture!r} needs transformers: pip install 'onnxsim-embed[optimum]'"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, use_fast=True, local_files_only=True, trust_remote_code=False
        )
        content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers' and the tokenizers library's share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} has no tokenizer.json, and transformers cannot convert its tokenizer: {reason}"
        ) from error
    return content


def _check(checkpoint: Checkpoint, written: Path) -> None:
    """Raise if the tokenizer cannot be read, or has more tokens than the model has embeddings."""
    from tokenizers import Tokenizer

    try:
        size = Tokenizer.from_file(str(written)).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        path = checkpoint.transformer / "tokenizer.json"
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
    rows = checkpoint.config.get("vocab_size")
    if isinstance(rows, int) and size > rows:
        raise CheckpointError(
            f"{checkpoint.transformer}: the tokenizer has {size} tokens, config.json states vocab_size {rows}"
        )
