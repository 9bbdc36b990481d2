"""Token ids equal those of transformers, each read from the checkpoint alone, on generated texts.

All configurations with 2,000 texts each:
ONNXSIM_EMBED_TOKEN_TEXTS=2000 pytest tests/export/test_token_ids.py
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from support import TEXTS, VOCABULARY, bert_config, tokenizer_json, write_json

from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.configs import write_configs
from onnxsim_embed.export.reference import PROBES, reference_tokenizer
from onnxsim_embed.runtime.tokenization import Tokenizer

COUNT = int(os.environ.get("ONNXSIM_EMBED_TOKEN_TEXTS", "120"))
WORDS = [*VOCABULARY, "Water", "ROAD", "café", "cafe", "naïve", "ÜBER", "你", "你好", "好", "ß", "##É",
         "<s>", "</s>", "<unk>", "<pad>", "<mask>"]  # fmt: skip
PIECES = [*WORDS, " ", "  ", "\t", "\n", "\u00a0", "\u200b", "\u3000", "\x07", "é", "e\u0301", "İ",
          "漢字", "한국", "ไทย", "🙂", "…", "-", "'", "[", "]", "<", ">", "zzq1", "ZZQ1", "<ent>",
          "[mask]", "[MASK]s", "ﬁ", "Ａ", "http://a.b/c?d=e"]  # fmt: skip
TOKEN = {
    "lstrip": False,
    "normalized": True,
    "rstrip": False,
    "single_word": False,
    "special": False,
}
CORPUS = [*TEXTS, *PROBES, " ".join(WORDS), *WORDS] * 3


def bert(directory: Path, vocabulary_only=False, files=None, holes=(), **config) -> None:
    """Write a WordPiece checkpoint; `config` is tokenizer_config.json, `files` are other files."""
    words = [*WORDS]
    for index, line in holes:
        words.insert(index, line)
    write_json(directory / "tokenizer.json", tokenizer_json(WORDS))
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (directory / ("tokenizer.json" if vocabulary_only else "vocab.txt")).unlink()
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | config)
    for name, content in (files or {}).items():
        write_json(directory / name, content)


def mpnet(directory: Path) -> None:
    """Write MPNet's WordPiece, whose special tokens are RoBERTa's."""
    bert(directory, tokenizer_class="MPNetTokenizer", mask_token="<mask>")
    path = directory / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    table = json.loads(text.replace('"[CLS]"', '"<s>"').replace('"[SEP]"', '"</s>"'))
    table["model"]["vocab"] = {word: i for i, word in enumerate(WORDS)}
    table["added_tokens"] = [
        TOKEN | {"id": WORDS.index(t), "content": t, "special": True, "normalized": False}
        for t in ("[UNK]", "<s>", "</s>", "<pad>", "<mask>")
    ]
    for token in ("<s>", "</s>"):
        table["post_processor"]["special_tokens"][token]["ids"] = [WORDS.index(token)]
    write_json(path, table)


def roberta(directory: Path, prefix: bool = False, **config) -> None:
    """Write a trained byte-level BPE; tokenizer.json says the opposite of `prefix`."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    tokenizer = ByteLevelBPETokenizer(add_prefix_space=not prefix)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(CORPUS, 600, special_tokens=special)
    tokenizer._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": prefix} | config
    write_json(directory / "tokenizer_config.json", config)


def xlm_roberta(directory: Path, **config) -> None:
    """Write a trained Unigram tokenizer as XLM-RoBERTa's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "XLMRobertaTokenizer"} | config
    write_json(directory / "tokenizer_config.json", config)


N = len(WORDS)
OTHER_TOKENS = {"cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                "mask_token": "<mask>"}  # fmt: skip
DECODER = {
    str(i): TOKEN | {"content": w, "special": True, "normalized": False}
    for i, w in enumerate(WORDS[:5])
}
CONFIGURATIONS = {
    "uncased": (bert, {}),
    "cased": (bert, {"do_lower_case": False}),
    "accents kept": (bert, {"do_lower_case": True, "strip_accents": False}),
    "cased, accents stripped": (bert, {"do_lower_case": False, "strip_accents": True}),
    "Chinese in words": (bert, {"tokenize_chinese_chars": False}),
    "vocabulary only": (bert, {"vocabulary_only": True, "do_lower_case": False}),
    "other special tokens": (bert, {"vocabulary_only": True, **OTHER_TOKENS}),
    "special_tokens_map.json": (
        bert, {"vocabulary_only": True, "files": {"special_tokens_map.json": OTHER_TOKENS}},
    ),
    "vocabulary with blank and repeated lines": (
        bert, {"vocabulary_only": True, "holes": [(30, ""), (60, "  "), (70, "water")]},
    ),
    "added_tokens.json": (
        bert, {"vocabulary_only": True, "files": {"added_tokens.json": {"zzq1": N, "<ent>": N + 1}}},
    ),
    "added_tokens_decoder": (
        bert, {"added_tokens_decoder": DECODER | {
            str(N): TOKEN | {"content": "zzq1", "single_word": True},
            str(N + 1): TOKEN | {"content": "<ent>", "lstrip": True, "special": True}}},
    ),
    "additional special tokens": (
        bert, {"additional_special_tokens": ["water", "<ent>", "[MASK]"]},
    ),
    "left truncation": (bert, {"truncation_side": "left"}),
    "sentence-transformers' lower case": (
        bert, {"do_lower_case": False,
               "files": {"sentence_bert_config.json": {"do_lower_case": True, "max_seq_length": 12}}},
    ),
    "MPNet": (mpnet, {}),
    "RoBERTa": (roberta, {}),
    "RoBERTa, prefix space": (roberta, {"prefix": True}),
    "RoBERTa, left truncation": (roberta, {"truncation_side": "left"}),
    "XLM-RoBERTa": (xlm_roberta, {}),
    "XLM-RoBERTa, added token": (xlm_roberta, {"additional_special_tokens": ["<ent>"]}),
    "PreTrainedTokenizerFast": (bert, {"tokenizer_class": "PreTrainedTokenizerFast",
                                       "do_lower_case": False, "additional_special_tokens": ["zzq1"]}),
}  # fmt: skip
ARCHITECTURES = {mpnet: "mpnet", roberta: "roberta", xlm_roberta: "xlm-roberta"}


def generated_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    texts = [
        rng.choice(("", " ")).join(rng.choices(PIECES, k=rng.choice((1, 2, 3, 5, 8, 30))))
        for _ in range(count)
    ]
    return [*PROBES, *TEXTS, *texts]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_token_ids_equal_those_of_transformers(tmp_path, name):
    write, options = CONFIGURATIONS[name]
    directory, work = tmp_path / "c", tmp_path / "a"
    kind = ARCHITECTURES.get(write, "bert")
    config = bert_config(model_type=kind, vocab_size=2000, pad_token_id=0 if kind == "bert" else 1)
    write_json(directory / "config.json", config)
    write(directory, **options)
    length = 12 if "truncation" in name else 30
    checkpoint = open_checkpoint(directory, pooling="mean", max_seq_length=length)
    write_configs(checkpoint, 32, work)
    texts = generated_texts(len(name), COUNT)
    tokens = Tokenizer(work / "tokenizer.json", length)(texts)
    ours = np.split(tokens.ids, tokens.offsets[1:-1])
    expected = reference_tokenizer(checkpoint)(texts)
    different = [
        text for text, a, b in zip(texts, ours, expected, strict=True) if a.tolist() != b.tolist()
    ]
    assert different == []
