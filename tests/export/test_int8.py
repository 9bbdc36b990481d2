"""The int8 export as a whole: what it records, rejects and proves, and how faithful MiniLM's is."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import VOCABULARY, bert_config, bert_tensors, cosines, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import ENCODER_FILES, MODEL_FILES, Artifact
from onnxsim_embed.errors import VerificationError
from onnxsim_embed.export import build, export_model
from onnxsim_embed.export.quantization import calibration, ranges, search
from onnxsim_embed.export.quantization.calibration import calibration_texts

CALIBRATION = [f"the {word} of the water {number}" for number, word in enumerate(VOCABULARY[5:40])]
KEYS = {"query, key, value", "output", "up", "down"}

pytestmark = pytest.mark.usefixtures("few_texts")


def kept_in_float(layers) -> int:
    return sum("kept" in choice for layer in layers for choice in layer.values())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A checkpoint whose attention is so sharp that the smallest error picks another token."""
    tensors = bert_tensors(bert_config())
    for name in tensors:
        if ".self.query." in name or ".self.key." in name:
            tensors[name] *= np.float32(16)
    return write_checkpoint(tmp_path_factory.mktemp("hostile") / "checkpoint", tensors=tensors)


# What is recorded


def test_int8_records_what_was_chosen_and_on_what(artifact):
    manifest = Artifact.open(artifact).manifest
    entry, texts = manifest.precisions["int8"], calibration_texts()
    assert len(entry.layers) == manifest.layers
    assert all(set(layer) == KEYS for layer in entry.layers)
    assert kept_in_float(entry.layers) == 0
    assert entry.calibration["source"] == "onnxsim-embed"
    assert entry.calibration["texts"] == len(texts)
    assert entry.calibration["tokens"] > 2 * len(texts)
    assert entry.operators["MatMulIntegerToFloat"] == 6 * manifest.layers
    report = manifest.verification["int8"]
    assert (report["problems"], report["batch_variant"]) == ([], 0)
    assert report["mean_cosine"] >= 0.999
    assert report["min_cosine"] >= 0.99
    assert report["below_0.99"] == 0
    cosines = [entry["cosine"] for entry in report["worst_texts"]]
    assert cosines == sorted(cosines)
    assert cosines[0] == report["min_cosine"]
    assert 0 <= entry.calibration["additional_time"] <= 0.05
    assert 0 < entry.calibration["held_out_loss_without"] < 0.002


def test_calibration_texts_decide_the_file_and_are_recorded_by_their_digest(checkpoint, tmp_path):
    first, again, other = (
        export_model(checkpoint, tmp_path / name, calibration=texts).manifest
        for name, texts in (
            ("a", CALIBRATION),
            ("b", CALIBRATION),
            ("c", [text[::-1] for text in CALIBRATION]),
        )
    )
    file = MODEL_FILES["int8"]
    assert first.files[file] == again.files[file] != other.files[file]
    record = first.precisions["int8"].calibration
    assert (record["source"], record["texts"]) == ("user", len(CALIBRATION))
    assert record["sha256"] == hashlib.sha256(json.dumps(CALIBRATION).encode()).hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_run_path_file_holds_no_weights_of_its_own(artifact, precision):
    portable, run = (
        (artifact / names[precision]).stat().st_size for names in (MODEL_FILES, ENCODER_FILES)
    )
    assert run < 0.5 * portable


# What is rejected


@pytest.mark.parametrize(
    "value", ["", "0.9", "0.9,0.8,0.7", "high,low", "0.9;0.8", "2,0.9", "0.9,-2", "nan,nan"]
)
def test_an_invalid_min_fidelity_is_one_line(run, checkpoint, tmp_path, value):
    code, out, err = run("export", checkpoint, "-o", tmp_path / "a", "--min-fidelity", value)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert repr(value) in err


@pytest.mark.parametrize(
    ("name", "value"),
    [("calibration", ["same"] * 20), *(("int8_effort", n) for n in (-0.1, 1.5, float("nan")))],
)
def test_invalid_arguments_are_rejected_before_anything_is_done(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        export_model("no/such-model", tmp_path / "a", **{name: value})


def test_a_hostile_checkpoint_is_rejected_with_numbers_after_keeping_more_in_float32(
    hostile, tmp_path, monkeypatch
):
    shares = []
    monkeypatch.setattr(
        search.Search, "describe", lambda self, choice: shares.append(self.share(choice)) or {}
    )
    with pytest.raises(VerificationError, match=r"mean cosine 0\.\d{5} \(threshold 0\.999"):
        export_model(hostile, tmp_path / "a", calibration=CALIBRATION)
    assert list(tmp_path.iterdir()) == []
    assert len(shares) > 2
    assert shares == sorted(set(shares))
    assert shares[-1] <= build.MAX_EFFORT


def test_a_hostile_checkpoint_passes_below_a_lower_threshold(hostile, tmp_path):
    lower = export_model(hostile, tmp_path / "b", min_fidelity=(0.9, 0.5), calibration=CALIBRATION)
    assert lower.manifest.verification["int8"]["mean_cosine"] < 0.995


def test_more_in_float32_rescues_an_export_with_a_warning(
    checkpoint, tmp_path, monkeypatch, caplog
):
    """The range of one kind of linear is too narrow."""
    fit = ranges.fit_outlier_splits

    def too_narrow(*arguments):
        for split in fit(*arguments):
            narrow = replace(split.range, scale=np.float32(split.range.scale / 4))
            yield replace(split, range=narrow, error=0.05)

    monkeypatch.setattr(ranges, "fit_outlier_splits", too_narrow)
    manifest = export_model(checkpoint, tmp_path / "a").manifest
    entry = manifest.precisions["int8"]
    assert manifest.verification["int8"]["problems"] == []
    assert "float32" in [layer["down"].get("kept") for layer in entry.layers]
    assert entry.operators["MatMulIntegerToFloat"] < 12
    assert entry.calibration["additional_time"] > 0.05
    assert "int8_effort" in caplog.text


# The proportions of BERT-base and BGE-base, with outlier channels

OUTLIERS = [3, 77, 300]
FACTOR = np.float32(30)


def wide_tensors(config: dict) -> dict[str, np.ndarray]:
    """Weights with three outlier channels behind each norm, as trained models of this shape have.

    What reads them is scaled down and the last norm takes them back: they carry no more than others.
    """
    tensors = bert_tensors(config)
    last = f"encoder.layer.{config['num_hidden_layers'] - 1}.output.LayerNorm.weight"
    for name, value in tensors.items():
        if name.startswith("encoder") and name.endswith(".weight") and value.ndim == 2:
            value *= np.float32(0.08 * np.sqrt(value.shape[1]) / 1.4)
        if name.endswith("LayerNorm.weight"):
            value[OUTLIERS] *= 1 / FACTOR if name == last else FACTOR
        if name.endswith((".query.weight", ".key.weight", ".value.weight", "mediate.dense.weight")):
            value[:, OUTLIERS] /= FACTOR
    return tensors


WIDE = [("mean", 384, 2), ("cls", 384, 2)]
BASE = [
    pytest.param("mean", 768, 12, marks=pytest.mark.timeout(3000))
]  # minutes; `make interop` runs it


@pytest.mark.parametrize(
    ("pooling", "width", "layers"), WIDE + BASE if os.environ.get("ONNXSIM_EMBED_BASE") else WIDE
)
def test_outlier_channels_are_smoothed_and_no_linear_stays_float32(
    tmp_path, monkeypatch, pooling, width, layers
):
    # Where a model is wide, seconds count.
    monkeypatch.setattr(ranges, "SEARCH_ROWS", 128)
    monkeypatch.setattr(calibration, "SAMPLE_ROWS", width)
    config = bert_config(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=12,
        num_hidden_layers=layers,
    )
    directory = write_checkpoint(
        tmp_path / "c", config=config, tensors=wide_tensors(config), pooling=pooling
    )
    texts = calibration_texts()[::8]
    manifest = export_model(directory, tmp_path / "a", calibration=texts).manifest
    report, records = manifest.verification["int8"], manifest.precisions["int8"].layers
    assert (report["problems"], report["batch_variant"]) == ([], 0)
    assert report["mean_cosine"] > 0.999
    assert report["min_cosine"] > 0.998
    assert kept_in_float(records) == 0
    assert all(
        record[name]["exponent"] for record in records for name in ("query, key, value", "up")
    )


# The real MiniLM

HARD = [
    "a", "?", "é", "字", " ", "\U0001f642",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }  // O(n)",
    "^(?:[a-z0-9!#$%&'*+/=?^_`{|}~-]+)@(?:[a-z0-9]+\\.)+[a-z]{2,}$",
    "0x1F 0b1011 3.14159e-10 +49 (0)89 / 123-456 192.168.0.1:8080",
    "∀x∈ℝ: x² ≥ 0 ⇒ ∑ᵢ xᵢ² ≥ 0",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "色は匂へど散りぬるを、我が世誰ぞ常ならむ。",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "\u200b\u200d zero width ﬁ ＦＵＬＬ ｗｉｄｔｈ",
    "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "buffalo " * 600,
    " ".join(f"{word}{number}" for number, word in enumerate(["delta", "ключ", "東京", "a+b"] * 150)),
]  # fmt: skip


@pytest.fixture(scope="module")
def minilm(real_artifact):
    opened = Artifact.open(real_artifact)
    return {name: Embedder(opened, precision=name, device="cpu") for name in ("fp32", "int8")}


@pytest.mark.real
def test_minilm_s_artifact_is_small_faithful_and_int8_throughout(real_artifact):
    manifest = Artifact.open(real_artifact).manifest
    report, layers = manifest.verification["int8"], manifest.precisions["int8"].layers
    assert (report["problems"], report["batch_variant"]) == ([], 0)
    assert report["mean_cosine"] >= 0.998
    assert report["min_cosine"] >= 0.99
    assert kept_in_float(layers) == 0
    assert sum(layer["down"]["copies"] for layer in layers) > 0
    assert all(choice["error"] < 0.005 for layer in layers for choice in layer.values())
    assert manifest.files[MODEL_FILES["int8"]].size < 25_000_000
    graphs = [ENCODER_FILES[name] for name in manifest.precisions]
    assert all(manifest.files[name].size < 100_000 for name in graphs)


@pytest.mark.real
def test_minilm_in_int8_is_close_to_fp32_on_hard_texts(minilm):
    fidelity = cosines(*(model.encode(HARD) for model in minilm.values()))
    assert fidelity.mean() >= 0.995
    assert fidelity.min() >= 0.99, HARD[int(fidelity.argmin())][:60]
