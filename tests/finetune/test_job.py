"""The fine-tuning job, end to end on a tiny model: result, resumption, errors."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from support import jargon_pairs, read_json, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import (
    CheckpointError,
    MissingExtraError,
    TrainingError,
    VerificationError,
)
from onnxsim_embed.export import export_model
from onnxsim_embed.export.quantization.calibration import calibration_texts
from onnxsim_embed.finetune import TextPairs, evaluation, finetune, job, read_pairs, training
from onnxsim_embed.finetune.report import report_table, verdict

PAIRS = TextPairs(*jargon_pairs())
EPOCHS_3 = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
EPOCH_1 = {"epochs": 1, "batch_size": 16}


pytestmark = pytest.mark.usefixtures("few_texts")


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """A finished job: its result, its directory, and its stages."""
    output = tmp_path_factory.mktemp("finetune") / "tuned"
    stages = []
    result = finetune(PAIRS, output, model=checkpoint, on_stage=stages.append, **EPOCHS_3)
    return result, output, stages


@pytest.fixture
def brief(monkeypatch):
    """Skip int8 and the plot where they are not tested: they take most of the time."""
    export_fp32 = lambda *args, **options: export_model(*args, **options | {"precisions": ["fp32"]})  # noqa: E731
    monkeypatch.setattr(job, "export_model", export_fp32)
    monkeypatch.setattr(job, "draw_losses", lambda report, path: path.touch())


def interrupt(*_, **__):
    raise KeyboardInterrupt


# result


def test_artifact_loads_here_and_in_sentence_transformers(tuned, checkpoint):
    result, output, _ = tuned
    vectors = Embedder.from_pretrained(output, precision="fp32").encode(PAIRS.sources)
    before = Embedder.from_pretrained(checkpoint, precision="fp32").encode(PAIRS.sources)
    assert not np.allclose(vectors, before, atol=1e-3)
    reference = SentenceTransformer(str(output), device="cpu").encode(PAIRS.sources)
    np.testing.assert_allclose(vectors, reference, atol=2e-6)
    assert set(result.artifact.manifest.precisions) == {"fp32", "int8"}
    assert result.artifact.manifest.name == "tuned"
    assert {"model.safetensors", "report.json", "loss.png"} <= set(result.artifact.manifest.files)
    Artifact.open(output).check()


def test_report(tuned):
    result, output, stages = tuned
    assert [int(word) for word in stages[0].split() if word.isdigit()] == [32, 4, 4]
    assert stages[1:] == [
        "Evaluating the base model.",
        "Training.",
        "Evaluating the fine-tuned model.",
        "Exporting and verifying.",
        "Evaluating the exported fp32 file.",
        "Evaluating the exported int8 file.",
    ]
    assert [path.name for path in output.parent.iterdir()] == ["tuned"]
    report = read_json(output / "report.json")
    assert report == result.report
    assert report["pairs"] == {
        "read": 40, "repeated": 0, "same_text": 0, "dropped": 0, "train": 32, "validation": 4, "held_out": 4,
    }  # fmt: skip
    models = report["held_out"]["models"]
    assert list(models) == ["before", "after", "fp32", "int8"]
    assert report["held_out"]["targets"] == 40
    assert models["fp32"]["min_cosine"] > 0.99999
    assert 0.9 < models["int8"]["min_cosine"] < 1
    for name in ("accuracy_at_1", "mrr_at_10", "ndcg_at_10"):
        assert models["fp32"][name] == models["after"][name]
    assert report["training"]["steps"] == report["training"]["planned"] == 12
    assert [step for step, _ in report["training"]["log"]["validation"]] == [0, 4, 8, 12]
    assert report["training"]["best_step"] in (4, 8, 12)
    losses = [loss for _, loss in report["training"]["log"]["loss"]]
    # Over five seeds the ratio was 0.68 to 0.88.
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def test_model_card_and_plot(tuned):
    result, output, _ = tuned
    card = (output / "README.md").read_text(encoding="utf-8")
    assert verdict(result.report) in card
    header, rows = report_table(result.report)
    assert header[1:4] == ["accuracy@1", "MRR@10", "NDCG@10"]
    assert all(" | ".join(row) in card for row in rows)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_generators_and_threads_are_restored(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(job.Job, "train", interrupt)
    states = random.getstate(), torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        finetune(PAIRS, tmp_path / "out", model=checkpoint, seed=5)
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert states[2] == torch.get_num_threads()


@pytest.mark.usefixtures("brief")
def test_prompts_of_the_base_model_are_kept(tmp_path):
    model = write_checkpoint(tmp_path / "model", prompts={"query": "a ", "document": "the "})
    result = finetune(PAIRS, tmp_path / "out", model=model, show_progress_bar=True, **EPOCH_1)
    assert result.artifact.manifest.prompts == {"query": "a ", "document": "the "}
    assert result.report["held_out"]["models"]["fp32"]["min_cosine"] > 0.99999


# kinds of pairs


@pytest.mark.usefixtures("brief")
def test_scored_pairs(checkpoint, tmp_path):
    pairs = TextPairs(PAIRS.sources, PAIRS.targets, scores=[i % 5 for i in range(40)])
    result = finetune(pairs, tmp_path / "out", model=checkpoint, held_out=0.4, **EPOCHS_3)
    models = result.report["held_out"]["models"]
    assert result.report["training"]["loss"] == "CoSENTLoss"
    assert all(-1 <= metrics["spearman"] <= 1 for metrics in models.values())
    assert models["after"]["spearman"] != models["before"]["spearman"]
    assert "Spearman" in report_table(result.report)[0]


@pytest.mark.usefixtures("brief")
def test_hard_negatives_are_mined_once(checkpoint, tmp_path, monkeypatch, capfd):
    options = {"model": checkpoint, "hard_negatives": 2, **EPOCH_1}
    monkeypatch.setattr(training, "MAX_MINED_SCORE", -1)
    with pytest.raises(ValueError, match="hard_negatives"):
        finetune(PAIRS, tmp_path / "none", **options)
    monkeypatch.setattr(training, "MAX_MINED_SCORE", 0.9999)  # of the tiny model, all are high
    datasets = []
    train = training.train

    def watched(model, dataset, *args, **kwargs):
        datasets.append(dataset.to_dict())
        return train(model, dataset, *args, **kwargs) if len(datasets) > 1 else interrupt()

    monkeypatch.setattr(training, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        finetune(PAIRS, tmp_path / "out", **options)
    monkeypatch.setattr(training, "mine", lambda *_: pytest.fail("mined twice"))
    finetune(PAIRS, tmp_path / "out", **options)
    assert datasets[0] == datasets[1]
    for texts in zip(*datasets[0].values(), strict=True):
        assert len(set(texts)) == 4
        assert set(texts[1:]) <= set(PAIRS.targets)
    assert "%" not in capfd.readouterr().err


@pytest.mark.usefixtures("brief")
def test_memory_limits_the_texts_trained_on_at_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ACTIVATION_BYTES", 200_000)
    options = {"model": checkpoint, **EPOCH_1}
    done = finetune(PAIRS, tmp_path / "plain", **options).report["training"]
    assert done["loss"].startswith("CachedMultipleNegativesRankingLoss, ")
    assert int(done["loss"].split()[1]) < 16
    scored = TextPairs(PAIRS.sources, PAIRS.targets, scores=list(range(40)))
    done = finetune(scored, tmp_path / "scored", **options).report["training"]
    assert "batches of" in done["loss"]


# resumption

KILLED = """
import json, os, signal, sys
from onnxsim_embed.finetune import TextPairs, finetune
from onnxsim_embed.finetune.training import FiniteGradients
def kill(self, arguments, state, control, **_):
    if state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
FiniteGradients.on_pre_optimizer_step = kill
options, pairs = map(json.loads, sys.argv[1:])
finetune(TextPairs(*pairs), **options)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_run_continues_to_the_same_bytes(tuned, checkpoint, tmp_path):
    result, uninterrupted, _ = tuned
    output = tmp_path / "tuned"
    options = {"output": str(output), "model": str(checkpoint), **EPOCHS_3}
    command = [sys.executable, "-c", KILLED, json.dumps(options), json.dumps(jargon_pairs())]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    checkpoints = job.UnfinishedRun(output).directory / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    incomplete = checkpoints / "checkpoint-8"
    shutil.copytree(checkpoints / "checkpoint-4", incomplete)
    (incomplete / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="epochs: 3, now 1"):
        finetune(PAIRS, output, model=checkpoint, **EPOCHS_3 | {"epochs": 1})
    stages = []
    continued = finetune(PAIRS, output, model=checkpoint, on_stage=stages.append, **EPOCHS_3)
    assert "Resuming from checkpoint-4." in stages
    assert continued.report == result.report
    for name in ("onnxsim_embed.json", "model.safetensors", "report.json", "loss.png"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert not job.UnfinishedRun(output).directory.exists()


# errors


@pytest.mark.usefixtures("brief")
def test_a_loss_that_is_not_finite_stops_training(checkpoint, tmp_path, monkeypatch):
    forward, calls = training.MaskedRankingLoss.forward, []

    def broken(self, features, labels):
        calls.append(1)
        return forward(self, features, labels) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(training.MaskedRankingLoss, "forward", broken)
    with pytest.raises(TrainingError, match=r"step 6 of 12.*learning_rate") as caught:
        finetune(PAIRS, tmp_path / "out", model=checkpoint, **EPOCHS_3)
    last = job.UnfinishedRun(tmp_path / "out").directory / "checkpoints" / "checkpoint-4"
    assert str(last) in str(caught.value)
    assert np.isfinite(SentenceTransformer(str(last), device="cpu").encode("a road")).all()
    assert not (tmp_path / "out").exists()


def test_an_unfaithful_export_keeps_the_checkpoint(checkpoint, tmp_path, monkeypatch):
    def unfaithful(*_, **__):
        raise VerificationError("int8 is far off. Nothing was written")

    options = {"model": checkpoint, **EPOCH_1}
    with monkeypatch.context() as patch:
        patch.setattr(job, "export_model", unfaithful)
        with pytest.raises(VerificationError) as caught:
            finetune(PAIRS, tmp_path / "out", **options)
    trained = job.UnfinishedRun(tmp_path / "out").directory / "model" / "out"
    assert f"onnxsim-embed export {trained}" in str(caught.value)
    assert load_file(trained / "model.safetensors")
    assert not (tmp_path / "out").exists()
    stages = []
    finetune(PAIRS, tmp_path / "out", on_stage=stages.append, **options)
    assert "Training." not in stages


@pytest.mark.usefixtures("brief")
def test_a_worse_model_is_written_and_marked(checkpoint, tmp_path, monkeypatch):
    evaluate, evaluations = evaluation.PairEvaluator.evaluate, []

    def spoiled(self, model):
        got = evaluate(self, model)
        evaluations.append(got)
        if len(evaluations) > 1:
            return got
        perfect = {"accuracy_at_1": 1.0, "mrr_at_10": 1.0, "ndcg_at_10": 1.0, "spearman": None}
        return evaluation.Evaluation(perfect, got.first_hits | True, got.embeddings)

    monkeypatch.setattr(evaluation.PairEvaluator, "evaluate", spoiled)
    result = finetune(PAIRS, tmp_path / "out", model=checkpoint, **EPOCH_1)
    assert result.worse
    assert result.report["worse"] is True
    assert f"\n**{verdict(result.report)}**" in (tmp_path / "out/README.md").read_text("utf-8")
    assert load_file(tmp_path / "out/model.safetensors")


@pytest.mark.usefixtures("brief")
def test_early_stopping(checkpoint, tmp_path, monkeypatch):
    metrics = iter([0.5, 0.6, 0.4, 0.3, 0.9])

    def stub(self, model, output_path=None, **_):
        return {"ndcg_at_10": next(metrics) if output_path else 0.0}

    monkeypatch.setattr(evaluation.PairEvaluator, "__call__", stub)
    options = {"model": checkpoint, "epochs": 10, "batch_size": 16, "patience": 2}
    done = finetune(PAIRS, tmp_path / "out", **options).report["training"]
    assert (done["steps"], done["planned"], done["best_step"]) == (8, 20, 4)
    assert next(metrics) == 0.9


SCORED = TextPairs(PAIRS.sources, PAIRS.targets, scores=list(range(40)))


@pytest.mark.parametrize(
    ("word", "error", "pairs", "options"),
    [
        ("exists", FileExistsError, PAIRS, {"output": "artifact"}),
        ("not an artifact", FileExistsError, PAIRS, {"output": "taken", "force": True}),
        ("minnilm", CheckpointError, PAIRS, {"model": "minnilm"}),
        ("hard_negatives", ValueError, SCORED, {"hard_negatives": 2}),
        ("scores", ValueError, SCORED, {"evaluation": PAIRS}),
        ("batch_size", ValueError, PAIRS, {"batch_size": 1}),
        ("epochs", ValueError, PAIRS, {"epochs": 0}),
        ("held_out", ValueError, PAIRS, {"held_out": 0.6}),
        ("learning_rate", ValueError, PAIRS, {"learning_rate": float("nan")}),
        ("seed", ValueError, PAIRS, {"seed": 1 << 32}),
        ("ONNX", CheckpointError, PAIRS, {"model": "artifact"}),
        ("modules.json", CheckpointError, PAIRS, {"model": "plain"}),
    ],
)
def test_errors_before_any_work(checkpoint, artifact, tmp_path, word, error, pairs, options):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").touch()
    paths = {"artifact": artifact, "plain": tmp_path / "plain", "taken": tmp_path / "taken"}
    if options.get("model") == "plain":
        write_checkpoint(paths["plain"], pooling=None)
    before = sorted(tmp_path.iterdir())
    arguments = {"model": checkpoint, "output": tmp_path / "out", **options}
    arguments |= {k: paths[v] for k, v in options.items() if str(v) in paths}
    with pytest.raises(error, match=word):
        finetune(pairs, **arguments)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("package", ["accelerate", "torch"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # for which find_spec returns None
    with pytest.raises(MissingExtraError, match=rf"{package}.*\[finetune\]"):
        finetune(PAIRS, tmp_path / "out")


@pytest.mark.real
@pytest.mark.usefixtures("real_checkpoint")
def test_the_real_minilm_improves(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CALIBRATION_TEXTS", 64)  # an eighth of all: its int8 is good enough
    monkeypatch.setattr(job, "calibration_texts", lambda: calibration_texts()[::8])
    pairs = read_pairs(Path(__file__).parent.parent.parent / "examples" / "jargon_pairs.csv")
    pairs = pairs.rows(range(0, len(pairs), 2))
    result = finetune(pairs, tmp_path / "out", model="minilm", epochs=2, learning_rate=1e-4)
    models = result.report["held_out"]["models"]
    assert models["after"]["ndcg_at_10"] > models["before"]["ndcg_at_10"] + 0.05
    assert models["int8"]["ndcg_at_10"] > models["before"]["ndcg_at_10"] + 0.05
    assert models["fp32"]["min_cosine"] > 0.99999
    assert models["int8"]["mean_cosine"] > 0.995
    assert os.path.getsize(tmp_path / "out" / "onnx" / "model_int8.onnx") < 30e6
