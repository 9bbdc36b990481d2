"""Reports of verification, and the references it compares with."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from support import TEXTS, change_json, write_checkpoint

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import VerificationError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.fidelity import token_ids_note
from onnxsim_embed.export.tokenizer import TokenizerFiles
from onnxsim_embed.export.verify import bf16_runs, verify_artifact, verify_derived, verify_fp32


def test_both_precisions_are_reported(checkpoint, artifact):
    opened, made = open_checkpoint(checkpoint), Artifact.open(artifact)
    fp32 = verify_fp32(made, opened, True)
    int8 = verify_derived("int8", made)
    for entry in (fp32, int8):
        assert entry["problems"] == []
        assert entry["texts"] >= 50
        assert entry["min_cosine"] <= entry["mean_cosine"] <= 1
    assert (fp32["reference"], int8["reference"]) == ("PyTorch", "fp32")
    assert fp32["min_cosine"] > 0.99999
    assert verify_fp32(made, opened, True, texts=TEXTS)["texts"] == len(TEXTS)


def test_another_checkpoint_is_a_problem_with_numbers(tmp_path, artifact):
    other = open_checkpoint(write_checkpoint(tmp_path / "c", seed=1))
    report = verify_fp32(Artifact.open(artifact), other, True, texts=TEXTS)
    assert len(report["problems"]) == 3  # on the texts, unusual ones, and those of odd lengths
    assert re.search(r"fp32 .*mean cosine -?0\.\d+ \(threshold", report["problems"][0])


def test_other_token_ids_than_those_of_transformers_are_a_problem(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(TokenizerFiles, "_apply_settings", lambda *a: None)
    directory = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    change_json(directory / "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(VerificationError, match=r"token ids of \d+ of \d+ texts differ"):
        export_model(directory, tmp_path / "a", precisions=["fp32"])
    monkeypatch.undo()
    artifact = export_model(directory, tmp_path / "a", precisions=["fp32"])
    original = open_checkpoint(checkpoint)
    problems = verify_fp32(artifact, original, True, texts=TEXTS)["problems"]
    assert "token ids" in problems[0]


def test_a_wrong_pooling_is_a_problem(checkpoint, tmp_path):
    directory = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    artifact = export_model(directory, tmp_path / "a", precisions=["fp32"], pooling="cls")
    original = open_checkpoint(directory)
    report = verify_fp32(artifact, original, True, texts=TEXTS)
    assert report["token_ids"]["pipeline"] == "sentence-transformers"
    assert "fp32 is not faithful to PyTorch" in report["problems"][0]


def test_without_transformers_the_reference_is_numpy_and_ids_are_not_compared(
    checkpoint, artifact, tmp_path, monkeypatch, caplog
):
    original = artifact / "onnx/model.onnx"
    monkeypatch.setitem(sys.modules, "transformers", None)
    artifact = export_model(checkpoint, tmp_path / "a", precisions=["fp32"])
    report = artifact.manifest.verification
    assert (artifact.directory / "onnx/model.onnx").read_bytes() == original.read_bytes()
    assert report["fp32"]["reference"] == "numpy"
    assert report["fp32"]["min_cosine"] > 0.99999
    assert report["fp32"]["token_ids"]["reference"] is None
    assert "not compared" in token_ids_note(report)
    assert "not compared" in (artifact.directory / "README.md").read_text()
    assert "token ids are not compared" in caplog.text


@pytest.mark.skipif(not bf16_runs(), reason="needs OpenVINO, and a processor with bfloat16")
def test_bf16_is_reported_where_it_runs(artifact, monkeypatch, tmp_path):
    monkeypatch.setattr("onnxsim_embed.export.verify.bf16_runs", lambda: True)
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path))
    report = verify_artifact(Artifact.open(artifact), texts=TEXTS)["bf16"]
    assert (report["problems"], report["batch_variant"]) == ([], 0)
    assert 0.999 < report["min_cosine"] < 1
