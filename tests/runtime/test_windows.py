"""Texts longer than the model: windows, their mean, and what reports count."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import numpy as np
import pytest
from support import TEXTS, tokenizer_json

from onnxsim_embed import AsyncEmbedder, Embedder, encode_to_file
from onnxsim_embed.files.vectors import read_provenance
from onnxsim_embed.runtime import tokenization
from onnxsim_embed.runtime.tokenization import Tokenizer
from onnxsim_embed.runtime.windows import WindowSplitter, cut_windows

SENTENCE = "the women of the village farm food for the market. "  # 11 tokens
LONG = [SENTENCE * 9, "water road " * 60, "," * 70, SENTENCE * 20 + "x"]


@pytest.fixture(scope="module")
def model(artifact):
    return Embedder(artifact, precision="fp32", threads=2)


def expected(model, text, spans, prompt=""):
    """The mean of the windows of a text, in float64, from token ids."""
    skip = len(model.token_ids([prompt])[0]) - 1 if prompt else 1
    content = model._pipeline.tokenizer.content(prompt + text)[0][skip - 1 :]
    ends = model.token_ids([prompt])[0][:skip].tolist(), model.token_ids([""])[0][-1:].tolist()
    vectors = []
    for start, stop in spans:
        ids = np.array([[*ends[0], *content[start:stop], *ends[1]]])
        vectors.append(model.head(model._pipeline.engine.run(ids))[0])
    mean = np.average(vectors, axis=0, weights=[b - a for a, b in spans]).astype(np.float64)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize(
    ("text", "stride", "spans"),
    [
        (LONG[0], 0, [(0, 44), (44, 88), (88, 99)]),  # after sentences
        (LONG[0], 10, [(0, 44), (34, 77), (67, 99)]),
        (LONG[1], 0, [(0, 46), (46, 92), (92, 120)]),  # after words, none in the middle
        (LONG[2], 6, [(0, 46), (40, 70)]),
    ],
)
@pytest.mark.parametrize("prompt", ["", "a dog "])
def test_windows_fit_the_model_and_their_mean_is_weighted(model, text, stride, spans, prompt):
    size = 46 - (2 if prompt else 0)
    content, ends = model._pipeline.tokenizer.content(text)
    found = cut_windows(text, ends, size, stride)
    if not prompt:
        assert found == spans
    assert (found[0][0], found[-1][1]) == (0, len(content))
    assert all(0 < stop - start <= size for start, stop in found)
    assert all(a[1] - b[0] == stride for a, b in pairwise(found))
    result = model.encode(text, prompt=prompt, long_texts="mean", stride=stride)
    np.testing.assert_allclose(result, expected(model, text, found, prompt), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"stride": 8}, {"prompt": "a dog "}, {"precision": "binary"},
     {"truncate_dim": 8, "normalize_embeddings": True}],
)  # fmt: skip
def test_a_vector_depends_on_nothing_but_its_text(model, options):
    texts = [*TEXTS, *LONG, LONG[0]]
    together = model.encode(texts, long_texts="mean", **options)
    stream = np.concatenate(list(model.encode_stream(texts, long_texts="mean", **options)))
    alone = np.stack([model.encode(text, long_texts="mean", **options) for text in texts])
    backwards = model.encode(texts[::-1], long_texts="mean", batch_size=1, **options)[::-1]
    for other in (stream, alone, backwards):
        np.testing.assert_array_equal(other, together, strict=True)
    others = {name: value for name, value in options.items() if name != "stride"}
    cut = model.encode(texts, **others)
    long = np.isin(texts, [*LONG, TEXTS[10]])
    np.testing.assert_array_equal(together[~long], cut[~long])  # texts that fit
    assert (together[long] != cut[long]).any(axis=1).all() or options.get("precision")


def test_reports_count_what_was_cut_and_what_was_split(model):
    texts = ["x", LONG[0], LONG[0], LONG[1]]
    model.encode(texts)
    report = model.last_report
    assert (report.truncated, report.truncated_rows, report.split) == (3, [1, 2, 3], 0)
    assert report.lost_tokens == 2 * (99 - 46) + (120 - 46)
    assert report.row_tokens == [3, 48, 48, 48]
    model.encode(LONG[0])
    assert model.last_report.lost_tokens == 99 - 46
    model.encode(texts, long_texts="mean")
    report = model.last_report
    assert (report.truncated, report.lost_tokens, report.split) == (0, 0, 3)
    assert report.row_tokens == [3, 99 + 3 * 2, 99 + 3 * 2, 120 + 3 * 2]
    assert report.tokens == 3 + 105 + 126  # the repeated text ran once


def test_lost_tokens_of_a_very_long_text_are_estimated(model):
    model.encode(SENTENCE * 1000)  # of which some 1,500 characters are tokenized
    assert abs(model.last_report.lost_tokens / 11_000 - 1) < 0.05


def test_a_long_text_of_unknown_tokens_is_one(model):
    texts = ["\u2602 " * 100, "\u2602 " * 100 + "road", "road"]
    model.encode(texts, prompt="a dog ", long_texts="mean")
    assert model.last_report.unknown_rows == [0]


@pytest.mark.parametrize("direction", ["Left", "Right"])
def test_pieces_of_a_text_have_the_tokens_of_the_whole(tmp_path, monkeypatch, direction):
    truncation = tokenizer_json()["truncation"] | {"direction": direction}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json() | {"truncation": truncation}), encoding="utf-8")
    tokenizer = Tokenizer(path, 9)
    text = " ".join([*TEXTS, *LONG])
    whole = tokenizer.content(text)
    monkeypatch.setattr(tokenization, "PIECE", 50)
    for one, other in zip(tokenizer.content(text), whole, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.diff(whole[1]) >= 0).all()
    large = Tokenizer(path, 10_000)
    np.testing.assert_array_equal(whole[0], large([text]).ids[1:-1])
    tokens, windows = WindowSplitter(tokenizer, "", 0)(["x", text], tokenizer(["x", text]))
    assert windows.weights[1:].sum() == len(whole[0])
    assert tokens.counts.max() <= 9


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stride": 3}, "stride"),
        ({"long_texts": "mean", "stride": 24}, "0 to 23"),
        ({"long_texts": "mean", "stride": True}, "stride"),
        ({"long_texts": "mean", "prompt": "road " * 60}, "46 tokens"),
        ({"long_texts": "mean", "output_value": "token_embeddings"}, "token embeddings"),
    ],
)
def test_invalid_options_are_named(model, options, named):
    with pytest.raises(ValueError, match=named):
        model.encode(TEXTS, **options)


def test_other_callers_split_too(model):
    vectors = model.encode(LONG, long_texts="mean", stride=4)

    async def main():
        async with AsyncEmbedder(model) as shared:
            return await asyncio.gather(
                shared.encode(LONG[:2], long_texts="mean", stride=4),
                shared.encode(LONG[2:], long_texts="mean", stride=4),
                shared.encode(LONG),
            )

    first, second, cut = asyncio.run(main())
    np.testing.assert_array_equal(np.concatenate([first, second]), vectors)
    np.testing.assert_array_equal(cut, model.encode(LONG))


def test_files_tell_that_texts_were_split(model, tmp_path, run):
    vectors, path = model.encode(LONG, long_texts="mean", stride=4), tmp_path / "vectors.npy"
    encode_to_file(model, LONG, path, long_texts="mean", stride=4)
    np.testing.assert_array_equal(np.load(path), vectors)
    assert read_provenance(path).long_texts == "mean, stride 4"
    with pytest.raises(FileExistsError, match="long_texts: mean, stride 4, now None"):
        encode_to_file(model, LONG, path)
    encode_to_file(model, LONG, path, force=True)
    assert "long_texts" not in json.loads(path.with_name("vectors.npy.json").read_text())["origin"]
    (tmp_path / "long.txt").write_text("\n".join(LONG), encoding="utf-8")
    command = ["encode", tmp_path / "long.txt", "-m", model.artifact.directory]
    command += ["-o", tmp_path / "v.npy", "--precision", "fp32"]
    code, out, _ = run(*command, "--long-texts", "mean", "--stride", 4)
    assert code == 0
    assert "windows" in out
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), vectors)
    assert "Cut off: " in run(*command, "--force")[1]
