"""The finetune command: options, output, errors, interruption."""

from __future__ import annotations

import json

import pytest
from support import jargon_pairs

from onnxsim_embed import Embedder


@pytest.fixture(autouse=True)
def few(few_texts):
    """Exports are verified on few texts."""


@pytest.fixture
def pairs_csv(tmp_path):
    path = tmp_path / "pairs.csv"
    lines = (f"{question},{answer}\n" for question, answer in zip(*jargon_pairs(), strict=True))
    path.write_text("".join(["question,answer\n", *lines]))
    return path


COLUMNS = ["--source-column", "question", "--target-column", "answer"]


def test_pairs_become_a_model(run, succeed, pairs_csv, checkpoint, tmp_path):
    output = tmp_path / "model"
    arguments = [pairs_csv, "-m", checkpoint, "-o", output, "--epochs", "2", "--batch-size", "8"]
    out = succeed("finetune", *arguments, *COLUMNS)
    assert out.startswith("32 pairs")
    for label in ("before, PyTorch", "after, PyTorch", "after, ONNX fp32", "after, ONNX int8"):
        assert label in out
    assert "accuracy@1  MRR@10  NDCG@10" in out
    assert "MultipleNegativesRankingLoss: 8 steps on 32 pairs" in out
    assert f"Wrote {output} in" in out
    assert Embedder.from_pretrained(output).encode("a road").shape == (32,)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["epochs"] == 2
    code, out, err = run("finetune", *arguments, *COLUMNS)
    assert code == 2
    assert "exists" in err


def test_options_reach_the_job(run, pairs_csv, tmp_path, monkeypatch):
    import onnxsim_embed.finetune as package
    from onnxsim_embed.errors import TrainingError

    seen = {}

    def record(pairs, output, **options):
        seen.update(options, pairs=pairs)
        raise TrainingError("seen")

    monkeypatch.setattr(package, "finetune", record)
    rows = "question,answer,wrong,rate\n" + "a,b,c,1\n" * 3
    for name in ("pairs.csv", "eval.csv"):
        (tmp_path / name).write_text(rows, encoding="utf-8")
    # fmt: off
    code, _, err = run(
        "finetune", tmp_path / "pairs.csv", "-o", tmp_path / "o", "-m", "x", "--epochs", "1.5", "--batch-size", "9",
        "--learning-rate", "0.1", "--hard-negatives", "3", "--eval", tmp_path / "eval.csv", "--held-out", "0.3",
        "--patience", "7", "--seed", "5", "--force", "--quiet", "--score-column", "rate", *COLUMNS,
    )
    # fmt: on
    assert (code, err) == (1, "onnxsim-embed: seen\n")
    pairs, evaluation = seen.pop("pairs"), seen.pop("evaluation")
    assert pairs == evaluation
    assert (pairs.scores, pairs.negatives) == ([1.0] * 3, None)
    assert seen == {
        "model": "x", "epochs": 1.5, "batch_size": 9, "learning_rate": 0.1, "hard_negatives": 3, "held_out": 0.3,
        "patience": 7, "seed": 5, "force": True, "show_progress_bar": False, "on_stage": None,
    }  # fmt: skip


@pytest.mark.parametrize(("worse", "quiet"), [(True, False), (True, True), (False, True)])
def test_a_worse_model_is_reported_in_bold_even_when_quiet(
    run, pairs_csv, tmp_path, monkeypatch, worse, quiet
):
    import onnxsim_embed.finetune as package

    better = {"accuracy_at_1": 0.5, "mrr_at_10": 0.5, "ndcg_at_10": 0.6, "spearman": None}
    report = {
        "held_out": {"queries": 4, "gained": 0, "lost": 2, "models": {"before": better, "after": better | {"ndcg_at_10": 0.4 if worse else 0.7}}},
        "training": {"loss": "L", "steps": 1, "planned": 1, "pairs": 9, "best_step": 1},
        "worse": worse,
    }  # fmt: skip
    monkeypatch.setattr(
        package, "finetune", lambda *_, **__: package.FinetuneResult(None, report, worse)
    )
    monkeypatch.setattr("typer.style", lambda text, bold: f"<b>{text}</b>" if bold else text)
    rows = "source_sentence,target_sentence\na,b\n"
    pairs_csv.write_text(rows, encoding="utf-8")
    code, out, err = run("finetune", pairs_csv, "-o", tmp_path / "o", *(["-q"] if quiet else []))
    text = err if quiet else out
    assert code == 0
    assert ("<b>The model got worse" in text) == worse
    assert bool(text) == (worse or not quiet)


def test_errors_are_one_line(reject, pairs_csv, tmp_path, checkpoint):
    output = ["-o", tmp_path / "o", "-m", checkpoint]
    assert "source_sentence" in reject("finetune", pairs_csv, *output)
    header = "source_sentence,target_sentence\n"
    pairs_csv.write_text(header + "a,b\n", encoding="utf-8")
    assert "at least 10" in reject("finetune", pairs_csv, *output)
    pairs_csv.write_text(header + "a,\n", encoding="utf-8")
    assert "row 0" in reject("finetune", pairs_csv, *output, code=1)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("force", [False, True])
def test_an_interruption_names_the_command_that_continues(run, tmp_path, monkeypatch, force):
    import onnxsim_embed.finetune as package

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "finetune", interrupt)
    (tmp_path / "p.csv").write_text("anchor,positive\na,b\n", encoding="utf-8")
    flags = ["--force"] if force else []
    code, out, err = run("finetune", tmp_path / "p.csv", "-o", tmp_path / "o", *flags)
    command = "the same command without --force" if force else "the same command"
    assert (code, out, err) == (130, "", f"onnxsim-embed: interrupted; {command} continues\n")
