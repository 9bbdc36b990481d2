"""`onnxsim-embed bench`: a table on the user's own texts, and one line for what it cannot do."""

from __future__ import annotations

import json


def test_own_texts_are_measured(run, artifact, texts_csv, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "cache"))
    code, out, err = run(
        "bench", "--model", artifact, "--texts", texts_csv, "--column", "text", "--against", "none",
        "--cases", "start", "--rounds", 1, "--patience", 0, "-o", tmp_path / "results",
    )  # fmt: skip
    assert code == 0, err
    assert "**onnxsim-embed int8**" in out
    assert "mean / min cosine" in out
    assert "throughput, texts" in err
    result = json.loads((tmp_path / "results/text.json").read_text())
    assert result["corpora"]["texts"]["source"] == texts_csv.name
    assert result["corpora"]["texts"]["texts"] == 11  # "solar energy" is there twice


def test_an_unknown_peer_or_case_is_one_line(refuse, artifact):
    assert "'jax' is not among the peers: torch, " in refuse("bench", "--against", "torch,jax")
    assert "'speed' is not among the cases: latency, growth, start" in refuse(
        "bench", "--cases", "speed"
    )


def test_results_that_are_there_are_kept(refuse, artifact, tmp_path):
    (tmp_path / "text.json").write_text("{}")
    assert "--force" in refuse("bench", "--model", artifact, "-o", tmp_path)
    assert (tmp_path / "text.json").read_text() == "{}"
