"""Tokens: the model's own length, no padding, transformers' ids, bad rows named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TEXTS, VOCABULARY, tokenizer_json

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.tokenization import Tokenizer

CLS, SEP, UNK = (VOCABULARY.index(token) for token in ("[CLS]", "[SEP]", "[UNK]"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_text(json.dumps(tokenizer_json()), encoding="utf-8")
    return file


@pytest.fixture
def tokenizer(path):
    return Tokenizer(path, 48)


def ids_of(tokens):
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


def test_stale_padding_and_truncation_of_the_file_are_ignored(tokenizer):
    tokens = tokenizer(["water", "water " * 20])
    assert tokens.counts.tolist() == [3, 22]  # the file says: cut at 8, pad to 8
    assert not tokens.truncated.any()


@pytest.mark.parametrize("length", [3, 8, 48, 100])
def test_ids_equal_those_of_transformers(checkpoint, tokenizer, length):
    from transformers import AutoTokenizer

    tokenizer.max_seq_length = length
    theirs = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    expected = theirs(TEXTS, truncation=True, max_length=length, padding=False)["input_ids"]
    assert ids_of(tokenizer(TEXTS)) == expected


def test_only_texts_that_lose_tokens_count_as_truncated(path):
    tokens = Tokenizer(path, 5)(["water road", "water road city", "water road city bank", ""])
    assert tokens.counts.tolist() == [4, 5, 5, 2]
    assert tokens.truncated.tolist() == [False, False, True, False]


def test_a_truncated_text_keeps_its_special_tokens(path):
    assert ids_of(Tokenizer(path, 3)(["water road"])) == [[CLS, VOCABULARY.index("water"), SEP]]


def test_an_empty_text_is_its_special_tokens(tokenizer):
    assert ids_of(tokenizer([""])) == [[CLS, SEP]]


def test_no_texts_give_no_tokens(tokenizer):
    tokens = tokenizer([])
    assert tokens.ids.dtype == tokens.offsets.dtype == np.int64
    assert (len(tokens.ids), tokens.offsets.tolist(), len(tokens.truncated)) == (0, [0], 0)


def test_rows_of_equal_count_stack(tokenizer):
    tokens = tokenizer(["water", "road city", "bank"])
    stacked = tokens.stack(np.array([2, 0]))
    assert stacked.dtype == np.int64
    assert stacked.tolist() == [ids_of(tokens)[2], ids_of(tokens)[0]]


@pytest.mark.parametrize(("bad", "name"), [(None, "NoneType"), (7, "int"), (b"x", "bytes")])
def test_a_row_that_is_no_string_is_named(tokenizer, bad, name):
    with pytest.raises(TypeError, match=rf"^text 2 is {name} .*not a string; drop .* replace"):
        tokenizer(["water", "", bad])


def test_a_lone_surrogate_is_named_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"^text 1 is not valid Unicode: .*U\+D83D at character 3"):
        tokenizer(["🙂", "sun\ud83d"])


@pytest.mark.parametrize("bad", [None, "\udc00"])
def test_rows_are_counted_from_first_row(tokenizer, bad):
    with pytest.raises((TypeError, ValueError), match=r"^text 4097 is "):
        tokenizer(["water", bad], first_row=4096)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer(file, 48)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.json is not a readable tokenizer"):
        Tokenizer(tmp_path / "nowhere.json", 48)


def test_do_lower_case_lowers_texts_that_the_tokenizer_would_not(tmp_path):
    table = tokenizer_json()
    table["normalizer"]["lowercase"] = False
    (tmp_path / "cased.json").write_text(json.dumps(table), encoding="utf-8")
    cased, lowered = (
        Tokenizer(tmp_path / "cased.json", 48, do_lower_case=lower)(["WATER"])
        for lower in (False, True)
    )
    assert UNK in cased.ids
    assert ids_of(lowered) == [[CLS, VOCABULARY.index("water"), SEP]]


@pytest.mark.parametrize("length", [2, 0, -1, 2.5, "8", None])
def test_a_length_without_room_for_a_token_is_refused(tokenizer, length):
    with pytest.raises(ValueError, match="max_seq_length must be an integer above 2, got"):
        tokenizer.max_seq_length = length
    assert tokenizer.max_seq_length == 48
