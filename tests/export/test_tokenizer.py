"""Tokenizer files of an artifact."""

import re

import pytest
from support import VOCABULARY, change_json, read_json, write_json

from onnxsim_embed import Embedder
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export import export_model

FP32 = ["fp32"]
pytestmark = pytest.mark.usefixtures("few_texts")


def test_tokenizer_json_alone_gives_the_vocabulary(tiny, tmp_path):
    (tiny / "vocab.txt").unlink()
    export_model(tiny, tmp_path / "a", precisions=FP32)
    assert (tmp_path / "a/vocab.txt").read_text().splitlines() == VOCABULARY


def test_a_setting_that_replaces_that_of_tokenizer_json_is_logged(tiny, tmp_path, caplog):
    change_json(tiny / "tokenizer_config.json", do_lower_case=False)
    artifact = export_model(tiny, tmp_path / "a", precisions=FP32)
    upper, lower = Embedder(artifact).token_ids(["WATER", "water"])
    assert VOCABULARY.index("[UNK]") in upper
    assert VOCABULARY.index("water") in lower
    assert "lowercase" in caplog.text


def test_special_tokens_that_are_objects_become_texts(tiny, tmp_path):
    pad = {"content": "[PAD]", "special": True}
    change_json(tiny / "tokenizer_config.json", pad_token=pad, mask_token=None)
    export_model(tiny, tmp_path / "a", precisions=FP32)
    tokens = read_json(tmp_path / "a/special_tokens_map.json")
    assert (tokens["pad_token"], tokens["mask_token"]) == ("[PAD]", "[MASK]")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "Bark", "vocab": {}}}'),
        ("vocab.txt", ""),
        ("vocab.txt", "water\nriver\n"),
        ("vocab.txt", "\xff\xfe"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_an_unusable_tokenizer_names_its_file_in_the_checkpoint(tiny, tmp_path, name, text):
    if name == "vocab.txt":
        (tiny / "tokenizer.json").unlink()
    (tiny / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=re.escape(str(tiny / name))):
        export_model(tiny, tmp_path / "a", precisions=FP32)
    assert not (tmp_path / "a").exists()


def special(**changes) -> dict:
    fields = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return fields | {"special": True} | changes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapanese"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "RobertaTokenizer"},
            "model.type 'WordPiece'",
        ),
        ("tokenizer_config.json", {"unk_token": "[MASK]"}, "model.unk_token"),
        ("tokenizer_config.json", {"cls_token": "[MASK]"}, "post_processor"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": special(content="x")}}, "holes"),
        ("tokenizer.json", {"normalizer": None}, "normalizer.type None"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
        ("tokenizer.json", {"post_processor": None}, "post_processor"),
        ("added_tokens.json", {"zzq1": 9999}, "'zzq1' has id 9999"),
        ("special_tokens_map.json", {"additional_special_tokens": ["zzq1"]}, "'zzq1' has id"),
    ],
)
def test_contradictions_and_unknown_classes_are_rejected(tiny, tmp_path, name, changes, message):
    change_json(tiny / name, **changes)
    with pytest.raises(CheckpointError, match=message):
        export_model(tiny, tmp_path / "a", precisions=FP32)
    assert not (tmp_path / "a").exists()


def test_a_token_missing_from_the_decoder_is_named(tiny, tmp_path):
    decoder = {str(i): special(content=token) for i, token in enumerate(VOCABULARY[:5])}
    change_json(tiny / "tokenizer_config.json", added_tokens_decoder=decoder)
    table = read_json(tiny / "tokenizer.json")
    table["added_tokens"].append(special(id=9, content=VOCABULARY[9]))
    write_json(tiny / "tokenizer.json", table)
    with pytest.raises(CheckpointError, match=f"'{VOCABULARY[9]}' is not in the added_tokens_dec"):
        export_model(tiny, tmp_path / "a", precisions=FP32)


def test_the_largest_id_must_have_an_embedding(tiny, tmp_path):
    table = read_json(tiny / "tokenizer.json")
    del table["model"]["vocab"]["z"], table["model"]["vocab"]["y"]
    table["model"]["vocab"]["zebra"] = len(VOCABULARY)
    write_json(tiny / "tokenizer.json", table)
    with pytest.raises(CheckpointError, match=f"'zebra' has id {(n := len(VOCABULARY))}.*size {n}"):
        export_model(tiny, tmp_path / "a", precisions=FP32)
