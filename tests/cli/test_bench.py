"""`onnxsim-embed bench`: a table on the user's own texts, and one line for what it cannot do."""

from __future__ import annotations

import json

from support import names

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.benchmark import measure


def test_own_texts_are_measured(run, artifact, texts_csv, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onnxsim_embed.benchmark.measure.find_spec", lambda name: None)
    code, out, err = run(
        "bench", "--model", artifact, "--texts", texts_csv, "--column", "text", "--against", "none",
        "--cases", "start", "--rounds", 1, "--patience", 0, "-o", tmp_path / "results",
    )  # fmt: skip
    assert code == 0, err
    assert "**onnxsim-embed int8**" in out
    assert "mean / min cosine" in out
    assert "round 1 of 1: ours-fp32" in err
    assert names(tmp_path / "results") == ["speed.png", "tables.md", "text.json"]
    result = json.loads((tmp_path / "results/text.json").read_text())
    assert result["source"] == texts_csv.name
    assert result["texts"] == 11  # "solar energy" is there twice
    assert list(result["systems"]) == ["ours-int8", "ours-fp32"]
    assert 'choose it with Embedder(..., precision="' in out


def test_the_fastest_of_ours_is_named_with_how_to_choose_it(artifact, monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: True)
    monkeypatch.setattr(measure, "bf16_supported", lambda: (True, ""))
    own = measure.own_systems(Artifact.open(artifact))
    assert own == [
        f"ours-{kind}" for kind in ("int8", "fp32", "int8-openvino", "fp32-openvino", "bf16")
    ]
    for fastest, chosen in [("ours-int8-openvino", "--precision int8 --engine openvino"),
                            ("ours-bf16", "--precision bf16."), ("ours-fp32", "--precision fp32.")]:  # fmt: skip
        systems = {"torch": {"seconds": 0.1}}
        for name in own:
            figures = {"seconds": 2 - (name == fastest), "mean_cosine": 0.9}
            systems[name] = figures | {"title": measure.own_title(name)}
        assert chosen in measure.recommendation({"systems": systems})


def test_an_unknown_peer_or_case_is_one_line(reject, artifact):
    assert "unknown peer 'jax'; allowed are torch, " in reject("bench", "--against", "torch,jax")
    assert "unknown case 'speed'; allowed are latency, growth, start" in reject(
        "bench", "--cases", "speed"
    )


def test_results_that_are_there_are_kept(reject, artifact, tmp_path):
    (tmp_path / "text.json").write_text("{}")
    assert "--force" in reject("bench", "--model", artifact, "-o", tmp_path)
    assert (tmp_path / "text.json").read_text() == "{}"
