"""Calibration: the texts that serve, and what is kept of a model's inner values."""

import numpy as np
import onnxruntime
import pytest
from support import VOCABULARY, bert_config, bert_tensors

from onnxsim_embed.export.bert import load_bert
from onnxsim_embed.export.onnx.bert_graph import build_encoder
from onnxsim_embed.export.quantization import calibration as calibrate
from onnxsim_embed.export.quantization.calibration import (
    MIN_TEXTS,
    calibration_texts,
    check_calibration,
    collect_activations,
    input_names,
)
from onnxsim_embed.export.verify import verification_texts
from onnxsim_embed.runtime.tokenization import Tokenizer

CLS, SEP = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")
NAMES = [name for layer in range(2) for name in input_names(layer)]


def token_ids(seed: int, texts: int, longest: int = 40) -> list[np.ndarray]:
    """Return texts of random tokens, of any length from the two special tokens on."""
    rng = np.random.default_rng(seed)
    inner = [rng.integers(5, len(VOCABULARY), rng.integers(longest - 1)) for _ in range(texts)]
    return [np.array([CLS, *tokens, SEP], np.int64) for tokens in inner]


@pytest.fixture(scope="module")
def bert():
    return load_bert(bert_config(), bert_tensors(bert_config()))


@pytest.fixture(scope="module")
def plain(bert):
    """Run one text; return what each linear's input is, (tokens, channels)."""
    model = build_encoder(bert, "run", expose=NAMES)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(ids):
        values = session.run(NAMES, {"input_ids": ids[:, None]})
        return {name: value[:, 0] for name, value in zip(NAMES, values, strict=True)}

    return run


@pytest.fixture(scope="module")
def texts():
    return token_ids(0, 60)


@pytest.fixture(scope="module")
def seen(bert, texts):
    return collect_activations(bert, texts)


# Activations


def test_every_input_of_every_layer_is_seen(seen, bert):
    assert list(seen) == NAMES
    for name, found in seen.items():
        width = 64 if name.endswith(".up") else 32
        assert found.low.shape == found.high.shape == (width,)
        assert found.rows.shape[1] == width
        assert {part.dtype for part in (found.low, found.high, found.rows)} == {np.dtype("f4")}


def test_ranges_are_those_of_a_plain_run(seen, plain, texts):
    runs = [plain(ids) for ids in texts]
    for name, found in seen.items():
        values = np.concatenate([run[name] for run in runs])
        assert found.low == pytest.approx(values.min(axis=0), abs=1e-5)
        assert found.high == pytest.approx(values.max(axis=0), abs=1e-5)


def test_the_sample_lies_within_the_ranges_and_is_aligned_across_inputs(seen):
    assert len({len(found.rows) for found in seen.values()}) == 1
    for found in seen.values():
        assert (found.rows >= found.low).all()
        assert (found.rows <= found.high).all()


def test_sampled_rows_are_rows_of_the_run(seen, plain, texts):
    values = np.concatenate([plain(ids)["layer1.up"] for ids in texts])
    for row in seen["layer1.up"].rows[::20]:
        assert np.abs(values - row).max(axis=1).min() < 1e-5


def test_both_ends_of_every_text_are_sampled(bert, plain, texts, monkeypatch):
    monkeypatch.setattr(calibrate, "SAMPLE_ROWS", 3 * len(texts))  # the ends and a few others
    found = collect_activations(bert, texts)["layer0.up"].rows
    for ids in texts[::6]:
        for row in plain(ids)["layer0.up"][[0, -1]]:
            assert np.abs(found - row).max(axis=1).min() < 1e-5


def test_short_texts_give_all_their_tokens(bert):
    texts = token_ids(1, 20, longest=6)
    found = collect_activations(bert, texts)["layer0.up"].rows
    assert len(found) == sum(map(len, texts))


@pytest.mark.parametrize("texts", [100, 3000])
def test_the_sample_is_bounded_however_many_texts_there_are(bert, texts, monkeypatch):
    monkeypatch.setattr(calibrate, "SAMPLE_ROWS", 500)
    found = collect_activations(bert, token_ids(2, texts, longest=12))
    assert 256 <= len(found["layer0.up"].rows) <= 2 * 500


def test_a_wide_model_is_sampled_less(bert, monkeypatch):
    texts = token_ids(3, 64)
    much = len(collect_activations(bert, texts)["layer0.up"].rows)
    monkeypatch.setattr(calibrate, "SAMPLE_BYTES", 300 * 4 * 2 * (3 * 32 + 64))
    assert len(collect_activations(bert, texts)["layer0.up"].rows) < 0.6 * much


def test_collecting_twice_gives_the_same(bert, texts, seen):
    again = collect_activations(bert, texts)
    for name in NAMES:
        assert np.array_equal(again[name].rows, seen[name].rows)
        assert np.array_equal(again[name].high, seen[name].high)


# Texts that cannot serve


@pytest.mark.parametrize(
    ("texts", "different"),
    [
        ([], 0),
        (["one"], 1),
        (["the same"] * 20, 1),
        ([str(i) for i in range(MIN_TEXTS - 1)] * 3, MIN_TEXTS - 1),
    ],
)
def test_too_few_different_texts_are_refused_with_their_number(texts, different):
    with pytest.raises(ValueError, match=f"at least {MIN_TEXTS} distinct texts, got {different};"):
        check_calibration(texts)


@pytest.mark.parametrize("wrong", [None, 3.5, b"bytes"])
def test_a_row_without_a_text_is_named(wrong):
    with pytest.raises(TypeError, match="text 17 is "):
        check_calibration([*map(str, range(17)), wrong])


def test_one_text_is_no_list_of_texts():
    with pytest.raises(TypeError, match="text"):
        check_calibration("the quick brown fox jumps over the lazy dog")


def test_enough_different_texts_serve():
    check_calibration([str(i) for i in range(MIN_TEXTS)])
    check_calibration(calibration_texts())


# The texts that ship


def test_the_texts_that_ship_are_many_and_different():
    texts = calibration_texts()
    assert len(texts) >= 300
    assert len(set(texts)) == len(texts)


def test_the_texts_that_ship_are_not_those_of_the_proof():
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    assert not set(map(plain, calibration_texts())) & set(map(plain, verification_texts()))


def test_the_texts_that_ship_are_in_several_scripts():
    texts = "".join(calibration_texts())
    for first, last in ("а", "я"), ("一", "龥"), ("ぁ", "ん"), ("ا", "ي"), ("α", "ω"), ("0", "9"):
        assert any(first <= letter <= last for letter in texts), (first, last)


@pytest.mark.real
def test_the_texts_that_ship_are_of_every_length(real_checkpoint):
    counts = Tokenizer(real_checkpoint / "tokenizer.json", 100_000)(calibration_texts()).counts
    assert counts.min() <= 3
    assert counts.max() >= 512
    assert (np.histogram(counts, (0, 8, 16, 32, 64, 128, 100_000))[0] >= 20).all()
