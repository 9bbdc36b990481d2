"""Calibration: the texts that serve, and what is recorded of a model's inner values."""

import numpy as np
import pytest
from support import calibrate, random_token_ids, run_onnx, tiny_bert

from onnxsim_embed.export.fidelity import bundled_texts
from onnxsim_embed.export.onnx.encoder_graph import build_encoder
from onnxsim_embed.export.quantization import calibration
from onnxsim_embed.export.quantization.calibration import (
    MIN_TEXTS,
    calibration_texts,
    check_calibration,
    input_names,
)
from onnxsim_embed.runtime.tokenization import Tokenizer

NAMES = [name for layer in range(2) for name in input_names(layer)]


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@pytest.fixture(scope="module")
def texts():
    return random_token_ids(0, 60)


@pytest.fixture(scope="module")
def runs(bert, texts):
    """The linears' inputs for each text alone, (tokens, channels) by name."""
    model = build_encoder(bert, "portable", expose=NAMES)
    values = [run_onnx(model, ids[None])[1:] for ids in texts]
    return [{name: value[0] for name, value in zip(NAMES, run, strict=True)} for run in values]


@pytest.fixture(scope="module")
def seen(bert, texts):
    return calibrate(bert, texts)


# Activations


def test_ranges_and_samples_are_those_of_a_plain_run(seen, runs):
    assert list(seen) == NAMES
    assert len({len(activations.rows) for activations in seen.values()}) == 1
    for name, activations in seen.items():
        values = np.concatenate([run[name] for run in runs])
        assert values.shape[1] == (64 if name.endswith(".up") else 32)
        assert activations.low == pytest.approx(values.min(axis=0), abs=1e-5)
        assert activations.high == pytest.approx(values.max(axis=0), abs=1e-5)
        arrays = (activations.low, activations.high, activations.rows)
        assert {array.dtype for array in arrays} == {np.dtype("f4")}
        assert (activations.rows >= activations.low).all()
        assert (activations.rows <= activations.high).all()
    for row in seen["layer1.up"].rows[::20]:
        values = np.concatenate([run["layer1.up"] for run in runs])
        assert np.abs(values - row).max(axis=1).min() < 1e-5


def test_both_ends_of_every_text_are_sampled(bert, runs, texts, monkeypatch):
    monkeypatch.setattr(calibration, "SAMPLE_ROWS", 3 * len(texts))  # the ends and a few others
    rows = calibrate(bert, texts)["layer0.up"].rows
    for run in runs[::6]:
        for row in run["layer0.up"][[0, -1]]:
            assert np.abs(rows - row).max(axis=1).min() < 1e-5


def test_short_texts_give_all_their_tokens(bert):
    texts = random_token_ids(1, 20, longest=6)
    assert len(calibrate(bert, texts)["layer0.up"].rows) == sum(map(len, texts))


@pytest.mark.parametrize("texts", [100, 3000])
def test_the_sample_is_bounded_however_many_texts_there_are(bert, texts, monkeypatch):
    monkeypatch.setattr(calibration, "SAMPLE_ROWS", 500)
    seen = calibrate(bert, random_token_ids(2, texts, longest=12))
    assert 256 <= len(seen["layer0.up"].rows) <= 2 * 500


def test_a_wide_model_is_sampled_less(bert, monkeypatch):
    texts = random_token_ids(3, 64)
    rows = len(calibrate(bert, texts)["layer0.up"].rows)
    monkeypatch.setattr(calibration, "SAMPLE_BYTES", 300 * 4 * 2 * (3 * 32 + 64))
    assert len(calibrate(bert, texts)["layer0.up"].rows) < 0.6 * rows


# The user's texts


@pytest.mark.parametrize(
    ("texts", "distinct"), [([], 0), ([str(i) for i in range(MIN_TEXTS - 1)] * 3, MIN_TEXTS - 1)]
)
def test_too_few_distinct_texts_are_rejected_with_their_number(texts, distinct):
    with pytest.raises(ValueError, match=f"at least {MIN_TEXTS} .* got {distinct};"):
        check_calibration(texts)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([*map(str, range(17)), None], "17"), ("one text, not a list", "one text")],
)
def test_anything_but_a_list_of_texts_is_a_type_error(texts, message):
    with pytest.raises(TypeError, match=message):
        check_calibration(texts)


def test_enough_distinct_texts_serve():
    check_calibration([str(i) for i in range(MIN_TEXTS)])
    check_calibration(calibration_texts())


# The texts that ship


def test_the_bundled_texts_are_many_distinct_multilingual_and_not_those_of_verification():
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    texts = calibration_texts()
    assert len(texts) == len(set(texts)) >= 300
    assert not set(map(plain, texts)) & set(map(plain, bundled_texts("verification.jsonl")))
    for first, last in ("а", "я"), ("一", "龥"), ("ぁ", "ん"), ("ا", "ي"), ("α", "ω"), ("0", "9"):
        assert any(first <= letter <= last for letter in "".join(texts)), (first, last)


@pytest.mark.real
def test_the_bundled_texts_are_of_every_length(real_checkpoint):
    counts = Tokenizer(real_checkpoint / "tokenizer.json", 100_000)(calibration_texts()).counts
    assert counts.min() <= 3
    assert counts.max() >= 512
    assert (np.histogram(counts, (0, 8, 16, 32, 64, 128, 100_000))[0] >= 20).all()
