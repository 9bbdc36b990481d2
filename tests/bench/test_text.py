"""The whole measurement of texts, on the tiny model: every figure is there, and fidelity beside speed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from lab import report, text_bench
from lab.corpus import Corpus
from lab.documents import blocks
from lab.peers import Environments
from lab.text_bench import TextBench
from lab.text_plan import TextPlan, count_tokens, most_tokens
from support import WORDS

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.benchmark.measure import fidelity

RANDOM = np.random.default_rng(0)
TEXTS = tuple(" ".join(RANDOM.choice(WORDS[:40], 7)) for _ in range(12))
LONG = tuple(" ".join(RANDOM.choice(WORDS[:40], 200)) for _ in range(3))
CORPORA = (
    Corpus("short", "a test", TEXTS),
    Corpus("descriptions", "a test", TEXTS[:9]),
    Corpus("long", "a test", LONG),
    Corpus("texts", "names.csv", TEXTS[2:]),
)


@pytest.fixture(scope="module")
def result(artifact, tmp_path_factory):
    """One round of ours and of a peer that is not there."""
    directory = tmp_path_factory.mktemp("bench")
    (directory / "sts.csv").write_text("a road,the road,5\nthe sun,a dog,0\na cat,the cat,4\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_bench, "LATENCY_CALLS", {1: 10, 8: 10, 500: 10})
        patch.setattr(text_bench, "GROWTH", (10, 1000))
        plan = TextPlan(
            model=str(artifact), corpora=CORPORA, peers=("fastembed", "torch"), threads=2, rounds=1,
            work=directory, patience=0, roof_seconds=0.01, sts=directory / "sts.csv",
        )  # fmt: skip
        return TextBench(plan, Environments(None, None, lambda _: None), lambda _: None).run()


def test_speed_never_stands_without_fidelity(result, artifact):
    assert list(result["systems"]) == ["ours-int8", "ours-fp32"]
    for name, row in result["systems"].items():
        assert set(row["throughput"]) == {"short", "descriptions", "long", "texts"}
        vectors = Embedder(artifact, precision=name.removeprefix("ours-")).encode(TEXTS)
        exact = Embedder(artifact, precision="fp32").encode(TEXTS)
        cell = row["throughput"]["short"]
        assert cell["texts_per_second"] > 0
        assert cell["fidelity"] == pytest.approx(fidelity(vectors, exact) | {"to": "ours-fp32"})


def test_every_case_is_measured(result):
    for row in result["systems"].values():
        assert list(row["latency_ms"]) == ["1", "8"]  # 500 texts are not there
        assert list(row["growth_seconds"]) == ["10"]
        assert len(row["start_seconds"]["all"]) == 1
        assert row["peak_mb"] >= 0
        assert -100 <= row["sts_spearman"] <= 100
        shares = row["throughput"]["short"]["stages"]
        assert set(shares) == {"tokenize", "run", "pool", "all", "rest"}
    assert set(result["load"]) >= {"throughput, short", "latency", "growth", "start and memory"}


def test_a_peer_that_cannot_run_is_listed_with_the_reason(result):
    assert result["failed"] == {
        "fastembed": "not installed: fastembed",
        "torch": "needs the checkpoint the artifact was made from; name it: --checkpoint DIRECTORY",
    }


def test_it_is_json_and_becomes_tables_and_pictures(result, tmp_path):
    report.write_json(tmp_path / "text.json", result)
    assert json.loads((tmp_path / "text.json").read_text()) == result
    report.write_report(tmp_path, (), print)
    assert {path.name for path in tmp_path.iterdir()} == {
        "text.json", "tables.md", "speed.png", "stages.png", "growth.png",
    }  # fmt: skip
    tables = (tmp_path / "tables.md").read_text()
    assert "not installed: fastembed" in tables
    assert "**onnxsim-embed int8**" in tables
    made = blocks({"text": result})
    assert "12 texts of" in made["speed"]
    assert "| names, texts/s |" in made["speed"]
    assert "0 ratios" not in tables
    for name in ("speed", "latency", "detail"):  # no time without fidelity
        assert "mean cosine" in made[name].replace("mean / min", "mean")


def test_a_run_compared_with_itself_has_not_fallen(result, tmp_path):
    said = []
    slower = result | {
        "ratios": {n: r | {"value": r["value"] / 2} for n, r in result["ratios"].items()}
    }
    report.write_json(tmp_path / "a/text.json", result)
    report.write_json(tmp_path / "b/text.json", slower)
    assert report.compare(tmp_path / "a", tmp_path / "a", said.append)
    assert said == [f"{len(result['ratios'])} ratios compared: none fell"]
    assert not report.compare(tmp_path / "a", tmp_path / "b", said.append)
    assert "50% less" in said[1]
    assert not report.compare(tmp_path / "a", tmp_path / "none", said.append)
    assert "share no ratio" in said[-1]


# what a plan is made of


def test_long_texts_fill_the_positions_whatever_the_model_is_set_to(artifact, result):
    opened = Artifact.open(artifact)
    assert most_tokens(opened, "short") == opened.manifest.max_seq_length == 48
    assert most_tokens(opened, "long") == 64
    assert count_tokens(opened, CORPORA[2]) == 3 * 64
    assert result["corpora"]["long"]["most_tokens"] == 64
