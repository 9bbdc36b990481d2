"""Tokens: the model's own length, no padding, transformers' ids, bad rows named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support import TEXTS, VOCABULARY, tokenizer_json

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.tokenization import Tokenizer

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


@pytest.mark.parametrize("prompt", ["", "a dog "])
def test_texts_of_unknown_tokens_only_are_found(tokenizer, prompt):
    texts = ["☂", "☂ ☃", "☂ road", "", "[UNK]", "[MASK]", "road"]
    tokens = tokenizer([prompt + text for text in texts])
    assert tokenizer.unknown_only(tokens, prompt).tolist() == [0, 1, 4]
    assert tokenizer.unknown_only(tokenizer(["road"])).tolist() == []


def test_rows_of_equal_count_stack(tokenizer):
    tokens = tokenizer(["water", "road city", "bank"])
    stacked = tokens.stack(np.array([2, 0]))
    assert stacked.dtype == np.int64
    assert stacked.tolist() == [ids_of(tokens)[2], ids_of(tokens)[0]]


@pytest.mark.parametrize(("bad", "name", "advice"),
    [(None, "NoneType", "drop"), (float("nan"), "float", "drop"), (7, "int", "str"),
     (b"x", "bytes", "decode"), (["x"], "list", "flat"), ({"text": "x"}, "dict", "row")],
)  # fmt: skip
def test_a_row_that_is_not_a_string_is_named_with_advice(tokenizer, bad, name, advice):
    with pytest.raises(TypeError, match=rf"^text 2 is {name} .*not a string; .*{advice}"):
        tokenizer(["water", "", bad])


def test_a_lone_surrogate_is_named_with_its_position(tokenizer):
    with pytest.raises(ValueError, match=r"^text 1 is not valid Unicode: .*U\+D83D at character 3"):
        tokenizer(["🙂", "sun\ud83d"])


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_an_unreadable_tokenizer_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer(file, 48)


def changed_tokenizer(tmp_path, **changes):
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(tokenizer_json() | changes), encoding="utf-8")
    return file


def test_do_lower_case_spares_special_tokens(tmp_path):
    normalizer = tokenizer_json()["normalizer"] | {"lowercase": False}
    file = changed_tokenizer(tmp_path, normalizer=normalizer)
    cased, lowered = (Tokenizer(file, 48, lower)(["WATER [MASK]"]) for lower in (False, True))
    mask = VOCABULARY.index("[MASK]")
    assert ids_of(cased) == [[CLS, UNK, mask, SEP]]
    assert ids_of(lowered) == [[CLS, VOCABULARY.index("water"), mask, SEP]]


def test_the_truncation_direction_of_the_file_applies(tmp_path):
    truncation = tokenizer_json()["truncation"] | {"direction": "Left"}
    tokenizer = Tokenizer(changed_tokenizer(tmp_path, truncation=truncation), 4)
    expected = [[CLS, VOCABULARY.index("city"), VOCABULARY.index("bank"), SEP]]
    for text in ("water road city bank", "water " * 9000 + "city bank"):
        tokens = tokenizer([text])
        assert (ids_of(tokens), tokens.truncated.tolist()) == (expected, [True])


@pytest.mark.parametrize("length", [2, 0, -1, 2.5, "8", None])
def test_a_length_without_room_for_a_token_is_an_error(tokenizer, length):
    with pytest.raises(ValueError, match="max_seq_length must be an integer above 2, got"):
        tokenizer.max_seq_length = length
    assert tokenizer.max_seq_length == 48


# very long texts

LONG = [
    "water road " * 4000,
    "water, road. " * 4000,
    "water\n" * 4000,
    "road" * 9000,  # one word
    " " * 20_000 + "water",
    "漢字" * 9000,
    "water [MASK] " * 4000,
    "[MASK]" * 4000,
    "\x00" * 20_000 + "road",
    "e\u0301 cole " * 4000,
]


@pytest.mark.parametrize(("length", "lower"), [(3, True), (5, False), (48, True), (512, False)])
def test_a_prefix_of_a_long_text_has_the_tokens_of_the_whole(path, length, lower):
    tokenizer = Tokenizer(path, length, lower)
    beginnings = tokenizer(LONG)
    tokenizer._boundary = None  # read whole
    whole = tokenizer(LONG)
    np.testing.assert_array_equal(beginnings.ids, whole.ids)
    np.testing.assert_array_equal(beginnings.truncated, whole.truncated)


def test_only_a_prefix_of_a_long_text_is_read(path, monkeypatch):
    tokenizer = Tokenizer(path, 48)
    watched = Mock(side_effect=tokenizer._encode)
    monkeypatch.setattr(tokenizer, "_encode", watched)
    tokenizer(["water road " * 1_000_000])
    assert max(len(text) for call in watched.call_args_list for text in call.args[0]) < 1000


def test_padding_is_on_the_right_up_to_a_multiple_of_eight(tokenizer):
    tokens = tokenizer(["water road", "", "water " * 9])
    ids, mask = tokens.pad(np.array([2, 0, 1]), 77)
    assert ids.shape == mask.shape == (3, 16)
    assert mask.sum(axis=1).tolist() == [11, 4, 2]
    for row, count, expected in zip(ids, (11, 4, 2), (2, 0, 1), strict=True):
        assert row[:count].tolist() == ids_of(tokens)[expected]
        assert (row[count:] == 77).all()


def test_the_library_uses_the_available_processors(path):
    """In a process of its own: the library makes its threads once."""
    code = """
import os, sys
os.environ.pop("RAYON_NUM_THREADS", None)
from onnxsim_embed.system import threads
from onnxsim_embed.runtime import tokenization
threads.available_cpus = lambda: 5
before = len(os.listdir("/proc/self/task"))
tokenization.Tokenizer(sys.argv[1], 48)(["water road"] * 500)
print(len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the platform has no /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 5
