"""tokenizer.json of a checkpoint, with all that transformers applies to it.

transformers changes what it reads: settings of tokenizer_config.json replace those of tokenizer.json,
and tokens of four other files are added. Its versions 4 (which edits tokenizer.json) and 5 (which
builds known classes again from their vocabulary) agree on what is done here. Where they would not
agree, the checkpoint contradicts itself and is rejected.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.reference import first_line, has_transformers
from onnxsim_embed.export.weights import check_content, read_json, read_optional_json

logger = logging.getLogger(__name__)

# Keys of special_tokens_map.json, with the default tokens of BERT and of RoBERTa.
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_BERT = (None, None, "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
_ROBERTA = ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")
SPECIAL_TOKENS, ROBERTA_TOKENS = (
    {f"{name}_token": token for name, token in zip(_NAMES, tokens, strict=True)}
    for tokens in (_BERT, _ROBERTA)
)
# Fields of an added token.
TOKEN_FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Default special tokens of the tokenizer classes whose settings are applied here, without "Fast".
WORDPIECE = dict.fromkeys(
    ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"),
    SPECIAL_TOKENS,
) | {"MPNetTokenizer": ROBERTA_TOKENS | {"unk_token": "[UNK]"}}
BYTE_LEVEL = dict.fromkeys(("RobertaTokenizer", "LongformerTokenizer"), ROBERTA_TOKENS)
UNIGRAM = dict.fromkeys(("XLMRobertaTokenizer", "CamembertTokenizer"), ROBERTA_TOKENS)
APPLIED = WORDPIECE | BYTE_LEVEL | UNIGRAM
# Classes whose tokenizer.json is used as it is; a comparison with transformers shows if it is not.
COMPLETE = (
    "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "AlbertTokenizer",
    "BartTokenizer", "DebertaTokenizer", "DebertaV2Tokenizer", "FunnelTokenizer", "GPT2Tokenizer",
    "GPTNeoXTokenizer", "GemmaTokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "RemBertTokenizer",
    "T5Tokenizer", "XLNetTokenizer",
)  # fmt: skip

# Classes of checkpoints that state none, by architecture.
DEFAULT_CLASSES = {
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "longformer": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
} | dict.fromkeys(("bert", "distilbert", "electra", "mobilebert", "nomic_bert"), "BertTokenizer")


def _content(token: Any) -> str:  # noqa: ANN401
    """Return the text of a special token, which configurations hold bare or as an AddedToken."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


@dataclass(frozen=True)
class TokenizerFiles:
    """Tokenizer files of a checkpoint; `kind` is the class's name without "Fast".

    `stated` is tokenizer_config.json with special_tokens_map.json, where transformers reads that;
    `tokens` are the special tokens with a name.
    """

    checkpoint: Checkpoint
    name: str
    kind: str
    config: dict[str, Any]
    stated: dict[str, Any]
    tokens: Mapping[str, str]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> TokenizerFiles:
        """Read the small files; raise CheckpointError for a class that is not supported."""
        directory = checkpoint.transformer
        config = read_optional_json(directory / "tokenizer_config.json")
        stated = config
        if "added_tokens_decoder" not in config:
            stated = config | read_optional_json(directory / "special_tokens_map.json")
        name = str(
            config.get("tokenizer_class")
            or checkpoint.config.get("tokenizer_class")
            or DEFAULT_CLASSES.get(checkpoint.architecture, "PreTrainedTokenizerFast")
        )
        kind = name.removesuffix("Fast")
        if kind not in APPLIED and kind not in COMPLETE:
            raise CheckpointError(
                f"{directory}: tokenizer class {name!r} is not supported, as its code may do more than "
                f"tokenizer.json states; supported: {', '.join((*APPLIED, *COMPLETE))}"
            )
        if config.get("split_special_tokens"):
            raise CheckpointError(f"{directory}: split_special_tokens is not supported")
        defaults = APPLIED.get(kind, {})
        named = {key: stated.get(key) or defaults.get(key) for key in SPECIAL_TOKENS}
        tokens = {key: _content(token) for key, token in named.items() if token}
        return cls(checkpoint, name, kind, config, stated, tokens)

    def tokenizer(self) -> dict[str, Any]:
        """Return tokenizer.json with the settings and tokens of the other files."""
        path = self.checkpoint.transformer / "tokenizer.json"
        if path.is_file():
            tokenizer = read_json(path)
        elif self.kind in WORDPIECE and path.with_name("vocab.txt").is_file():
            path = path.with_name("vocab.txt")
            tokenizer = _from_vocabulary(path, self.tokens)
        else:
            return _from_transformers(self.checkpoint)
        try:
            self._apply_settings(tokenizer, path)
            self._apply_tokens(tokenizer, path)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception, damaged files KeyError ...
            raise CheckpointError(f"{path} is not a readable tokenizer: {error!r}") from error
        return tokenizer

    def _apply_settings(self, tokenizer: dict[str, Any], path: Path) -> None:
        """Set what tokenizer_config.json sets; the rest must be what the tokenizer class implies."""
        required: dict[str, object] = {}
        settings: dict[str, object] = {}
        part = "normalizer"
        if self.kind in WORDPIECE:
            required = {
                "model.type": "WordPiece",
                "model.unk_token": self.tokens["unk_token"],
                "model.continuing_subword_prefix": "##",
                "model.max_input_chars_per_word": 100,
                "normalizer.type": "BertNormalizer",
                "normalizer.clean_text": True,
                "pre_tokenizer.type": "BertPreTokenizer",
            }
            settings = {
                "lowercase": bool(self.config.get("do_lower_case", True)),
                "strip_accents": self.config.get("strip_accents"),
                "handle_chinese_chars": bool(self.config.get("tokenize_chinese_chars", True)),
            }
        elif self.kind in BYTE_LEVEL:
            required = {"model.type": "BPE", "normalizer": None, "pre_tokenizer.type": "ByteLevel"}
            settings = {"add_prefix_space": bool(self.config.get("add_prefix_space"))}
            part = "pre_tokenizer"
        elif self.kind in UNIGRAM:
            required = {"model.type": "Unigram"}
        for key, expected in required.items():
            value: Any = tokenizer
            for name in key.split("."):
                value = (value or {}).get(name)
            if value != expected and not (key == "model.type" and value is None):
                raise CheckpointError(
                    f"{path}: {key} {value!r:.80} contradicts tokenizer class {self.name!r}, which "
                    f"implies {expected!r}: if tokenizer.json is right, set tokenizer_class to "
                    "'PreTrainedTokenizerFast' in tokenizer_config.json"
                )
        for key, setting in settings.items():
            if (old := tokenizer[part].get(key)) != setting:
                logger.warning(
                    "%s: tokenizer_config.json sets %s to %s, not %s", path, key, setting, old
                )
                tokenizer[part][key] = setting

    def _apply_tokens(self, tokenizer: dict[str, Any], path: Path) -> None:
        """Add the tokens of all files as transformers does, and check that their ids stay."""
        from tokenizers import AddedToken, Tokenizer

        listed = tokenizer.get("added_tokens") or []
        rebuilt = self.kind in APPLIED
        added = [] if rebuilt else listed
        backend = Tokenizer.from_str(json.dumps({**tokenizer, "added_tokens": added}))
        backend.no_padding()
        backend.no_truncation()
        special = [*self.tokens.values(), *map(_content, self._extra_tokens())]
        ids: dict[str, int | None] = {}

        def add(text: str, index: int | None, fields: dict[str, Any]) -> None:
            ids[text] = index
            known = {key: fields[key] for key in TOKEN_FIELDS if key in fields}
            backend.add_tokens([AddedToken(text, **known)])

        for entry in self._entries(listed, special):
            named = entry["content"] in self.tokens.values()
            add(entry["content"], entry["id"], entry | {"special": True} if named else entry)
        stated = [self.stated.get(key) or token for key, token in self.tokens.items()]
        for token in (*stated, *self._extra_tokens()):
            if (text := _content(token)) not in ids:
                add(text, None, (token if isinstance(token, dict) else {}) | {"special": True})
        for text, index in ids.items():
            if index not in (None, backend.token_to_id(text)):
                raise CheckpointError(
                    f"{path}: added token {text!r} has id {index}, transformers gives it "
                    f"{backend.token_to_id(text)}, as the ids of the vocabulary have holes"
                )
        if rebuilt:
            if unlisted := [e["content"] for e in listed if e["content"] not in ids]:
                raise CheckpointError(
                    f"{path}: added token {unlisted[0]!r} is not in the added_tokens_decoder of "
                    "tokenizer_config.json; add it there, or remove it here"
                )
            ends = [self.tokens["cls_token"], self.tokens["sep_token"]]
            if backend.encode("").tokens != ends:
                raise CheckpointError(
                    f"{path}: the post_processor adds {backend.encode('').tokens} to a text, tokenizer "
                    f"class {self.name!r} adds {ends}"
                )
        own = {entry["id"]: entry for entry in listed}  # in their own order of keys
        applied = json.loads(backend.to_str())["added_tokens"]
        tokenizer["added_tokens"] = [
            own[entry["id"]] if own.get(entry["id"]) == entry else entry for entry in applied
        ]

    def _entries(self, listed: list[dict[str, Any]], special: list[str]) -> list[dict[str, Any]]:
        """Return the added tokens with an id, by id, from the files that transformers reads."""
        decoder = self.config.get("added_tokens_decoder")
        if decoder is not None:
            entries = [{**entry, "id": int(index)} for index, entry in decoder.items()]
        else:
            older = read_optional_json(self.checkpoint.transformer / "added_tokens.json")
            entries = [
                {"id": index, "content": text, "normalized": text not in special,
                 "special": text in special}
                for text, index in older.items()
            ]  # fmt: skip
            entries += listed
        return sorted({e["id"]: e for e in entries}.values(), key=lambda e: int(e["id"]))

    def _extra_tokens(self) -> list[Any]:
        """Return the special tokens without a name, each a text or the fields of an AddedToken."""
        extra = self.stated.get("extra_special_tokens")
        extra = extra or self.stated.get("additional_special_tokens") or []
        return list(extra.values() if isinstance(extra, dict) else extra)


def _from_vocabulary(path: Path, tokens: Mapping[str, str]) -> dict[str, Any]:
    """Build tokenizer.json for a checkpoint that has BERT's vocab.txt only."""
    from tokenizers.implementations import BertWordPieceTokenizer

    check_content(path)
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
        # Blank lines are ids without a token, and of equal tokens the last counts, as in transformers.
        vocabulary = {line.rstrip(): index for index, line in enumerate(lines) if line.strip()}
        special = {k: t for k, t in tokens.items() if k not in ("bos_token", "eos_token")}
        content: dict[str, Any] = json.loads(BertWordPieceTokenizer(vocabulary, **special).to_str())
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a readable BERT vocabulary: {error}") from error
    return content


def _from_transformers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Build tokenizer.json from the older files of an architecture (sentencepiece, BPE)."""
    path = checkpoint.transformer
    if not has_transformers():
        raise CheckpointError(
            f"{path} has no tokenizer.json, and converting the tokenizer of "
            f"{checkpoint.architecture!r} needs transformers: pip install 'onnxsim-embed[torch]'"
        )
    from transformers import AutoTokenizer

    for file in path.iterdir():
        check_content(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, use_fast=True, local_files_only=True, trust_remote_code=False
        )
        content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers' and the tokenizers library's share no base class
        raise CheckpointError(
            f"{path} has no tokenizer.json, and transformers cannot convert its tokenizer: "
            f"{first_line(error)}"
        ) from error
    return content


def prepend_lowercase(tokenizer: dict[str, Any]) -> None:
    """Lower-case texts but not special tokens, as sentence-transformers' do_lower_case does."""
    old = tokenizer["normalizer"]
    steps = old["normalizers"] if old and old["type"] == "Sequence" else [old] if old else []
    if not any(step["type"] == "Lowercase" for step in steps):
        lowercase = {"type": "Lowercase"}
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [lowercase, *steps]}


def check_ids(checkpoint: Checkpoint, written: Path) -> None:
    """Raise if the tokenizer cannot be read, or has an id without an embedding."""
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(written)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        path = checkpoint.transformer / "tokenizer.json"
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
    rows = checkpoint.config.get("vocab_size")
    token, index = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if isinstance(rows, int) and index >= rows:
        raise CheckpointError(
            f"{checkpoint.transformer}: token {token!r} has id {index}, the embeddings have rows up to "
            f"{rows - 1} (vocab_size {rows} in config.json)"
        )
