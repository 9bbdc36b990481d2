"""The fine-tuning job, end to end on a tiny model: result, resumption, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import WORDS, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import (
    CheckpointError,
    MissingExtraError,
    TrainingError,
    VerificationError,
)
from onnxsim_embed.export import export_model
from onnxsim_embed.finetune import TextPairs, finetune
from onnxsim_embed.finetune.report import draw_losses, report_table, verdict
from onnxsim_embed.finetune.settings import Settings
from onnxsim_embed.finetune.workplace import workplace_of

NOUNS = [word for word in WORDS[15:45] if len(word) > 3]


def made_pairs(count=40):
    """A code of two letters stands for a noun, and a digit must be found again."""
    rng = np.random.default_rng(0)
    chosen = [(NOUNS[int(rng.integers(8))], i) for i in range(count)]
    code = {noun: f"x{chr(97 + n)}" for n, noun in enumerate(NOUNS)}
    return TextPairs(
        [f"the {code[noun]} {i}" for noun, i in chosen], [f"{noun} at {i}" for noun, i in chosen]
    )


PAIRS = made_pairs()
QUICK = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def few(few_texts):
    """Exports are verified on few texts."""


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """A finished job: its result, its directory, and what it said on the way."""
    output = tmp_path_factory.mktemp("finetune") / "tuned"
    said = []
    result = finetune(PAIRS, output, model=checkpoint, on_stage=said.append, **QUICK)
    return result, output, said


@pytest.fixture
def brief(monkeypatch):
    """Leave int8 and the picture out where they are not what is tested: they take most of the time."""
    from onnxsim_embed.finetune import job

    def export_fp32(*arguments, **options):
        return export_model(*arguments, **(options | {"precisions": ("fp32",)}))

    monkeypatch.setattr(job, "export_model", export_fp32)
    monkeypatch.setattr(job, "draw_losses", lambda report, path: path.touch())


def weights(directory):
    return load_file(directory / "model.safetensors")


# what comes out


def test_the_result_is_an_artifact(tuned, checkpoint):
    result, output, _ = tuned
    model = Embedder.from_pretrained(output, precision="fp32")
    before = Embedder.from_pretrained(checkpoint, precision="fp32").encode(PAIRS.sources)
    assert model.encode(PAIRS.sources).shape == (40, 32)
    assert not np.allclose(model.encode(PAIRS.sources), before, atol=1e-3)
    assert set(result.artifact.manifest.precisions) == {"fp32", "int8"}
    assert result.artifact.manifest.name == "tuned"
    assert {"model.safetensors", "report.json", "loss.png"} <= set(result.artifact.manifest.files)
    Artifact.open(output).check()


def test_sentence_transformers_loads_the_same_directory(tuned):
    from sentence_transformers import SentenceTransformer

    _, output, _ = tuned
    vectors = SentenceTransformer(str(output), device="cpu").encode(PAIRS.targets)
    ours = Embedder(output, precision="fp32").encode(PAIRS.targets)
    np.testing.assert_allclose(vectors, ours, atol=2e-6)


def test_the_model_learns(tuned):
    result, _, _ = tuned
    losses = [loss for _, loss in result.report["training"]["log"]["loss"]]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_the_report_is_saved_and_complete(tuned):
    result, output, _ = tuned
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report == result.report
    assert report["pairs"] == {
        "read": 40, "repeated": 0, "same_text": 0, "dropped": 0, "train": 32, "validation": 4, "held_out": 4,
    }  # fmt: skip
    assert list(report["held_out"]["models"]) == ["before", "after", "fp32", "int8"]
    assert report["held_out"]["targets"] == 40
    assert report["held_out"]["models"]["fp32"]["min_cosine"] > 0.99999
    assert 0.9 < report["held_out"]["models"]["int8"]["min_cosine"] < 1
    for name in ("accuracy_at_1", "mrr_at_10", "ndcg_at_10"):
        figures = report["held_out"]["models"]
        assert figures["fp32"][name] == figures["after"][name]
    assert report["training"]["steps"] == report["training"]["planned"] == 12
    steps = [step for step, _ in report["training"]["log"]["validation"]]
    assert steps == [0, 4, 8, 12]
    assert report["training"]["best_step"] in steps[1:]


def test_the_card_says_what_was_done(tuned):
    result, output, _ = tuned
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "## Fine-tuned" in card
    assert verdict(result.report) in card
    header, rows = report_table(result.report)
    assert header[1:4] == ["accuracy@1", "MRR@10", "NDCG@10"]
    assert all(" | ".join(row) in card for row in rows)


def test_the_stages_are_named_and_nothing_is_left_behind(tuned):
    _, output, said = tuned
    assert said[0].startswith(
        "32 pairs to learn from, 4 to choose the checkpoint by, 4 to judge by."
    )
    assert said[1:] == ["Measuring the model as it is.", "Training.", "Exporting and verifying."]
    assert [path.name for path in output.parent.iterdir()] == ["tuned"]


def test_the_same_seed_gives_the_same_bytes(tuned, checkpoint, tmp_path):
    _, output, _ = tuned
    finetune(PAIRS, tmp_path / "tuned", model=checkpoint, **QUICK)
    for name in ("onnxsim_embed.json", "model.safetensors", "report.json", "loss.png"):
        assert (tmp_path / "tuned" / name).read_bytes() == (output / name).read_bytes(), name


@pytest.mark.usefixtures("brief")
def test_another_seed_gives_another_model(tuned, checkpoint, tmp_path):
    _, output, _ = tuned
    finetune(PAIRS, tmp_path / "other", model=checkpoint, seed=1, **QUICK)
    mine, others = weights(output), weights(tmp_path / "other")
    assert mine.keys() == others.keys()
    assert not all(np.array_equal(mine[name], others[name]) for name in mine)


def test_generators_are_put_back(checkpoint, tmp_path, monkeypatch):
    import random

    import torch

    from onnxsim_embed.finetune import job

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_train", stop)
    states = random.getstate(), torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        finetune(PAIRS, tmp_path / "out", model=checkpoint, seed=5)
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert states[2] == torch.get_num_threads()


# other kinds of pairs


@pytest.mark.usefixtures("brief")
def test_scores_are_learnt_by_cosent(checkpoint, tmp_path):
    scores = [i % 5 for i in range(40)]
    pairs = TextPairs(PAIRS.sources, PAIRS.targets, scores=scores)
    result = finetune(pairs, tmp_path / "out", model=checkpoint, held_out=0.4, **QUICK)
    figures = result.report["held_out"]["models"]
    assert result.report["training"]["loss"] == "CoSENTLoss"
    assert all(-1 <= figures[name]["spearman"] <= 1 for name in figures)
    assert figures["after"]["spearman"] != figures["before"]["spearman"]
    assert "Spearman" in report_table(result.report)[0]


@pytest.mark.usefixtures("brief")
def test_a_hard_negative_is_a_third_text(checkpoint, tmp_path, monkeypatch):
    from onnxsim_embed.finetune import training

    seen = []
    real = training.MultipleNegativesRankingLoss.forward
    monkeypatch.setattr(
        training.MultipleNegativesRankingLoss,
        "forward",
        lambda self, features, labels: seen.append(len(features)) or real(self, features, labels),
    )
    pairs = TextPairs(PAIRS.sources, PAIRS.targets, PAIRS.targets[1:] + PAIRS.targets[:1])
    finetune(pairs, tmp_path / "out", model=checkpoint, epochs=1, batch_size=16)
    assert seen
    assert set(seen) == {3}


@pytest.mark.usefixtures("brief")
def test_hard_negatives_are_mined_once(checkpoint, tmp_path, monkeypatch, capfd):
    from onnxsim_embed.finetune import training

    monkeypatch.setattr(training, "MINED_MAX_SCORE", 0.9999)  # the tiny model finds all texts alike
    kept = []
    real = training.train

    def watched(*arguments, mined, **options):
        kept.append(mined.to_dict())
        if len(kept) == 1:
            raise KeyboardInterrupt
        return real(*arguments, mined=mined, **options)

    monkeypatch.setattr(training, "train", watched)
    options = {"model": checkpoint, "epochs": 1, "batch_size": 16, "hard_negatives": 2}
    with pytest.raises(KeyboardInterrupt):
        finetune(PAIRS, tmp_path / "out", **options)
    monkeypatch.setattr(training, "mine", lambda *_: pytest.fail("mined twice"))
    finetune(PAIRS, tmp_path / "out", **options)
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4
    for values in zip(*kept[0].values(), strict=True):
        assert len(set(values)) == 4
        assert set(values[1:]) <= set(PAIRS.targets)
    assert "%" not in capfd.readouterr().err


@pytest.mark.usefixtures("brief")
def test_long_texts_are_learnt_in_parts(checkpoint, tmp_path, monkeypatch):
    from onnxsim_embed.finetune import training

    monkeypatch.setattr(training, "ACTIVATION_BYTES", 200_000)
    options = {"model": checkpoint, "epochs": 1, "batch_size": 16}
    done = finetune(PAIRS, tmp_path / "plain", **options).report["training"]
    assert done["loss"].startswith("CachedMultipleNegativesRankingLoss, ")
    assert int(done["loss"].split()[1]) < 16
    scored = TextPairs(PAIRS.sources, PAIRS.targets, scores=list(range(40)))
    done = finetune(scored, tmp_path / "scored", **options).report["training"]
    assert "batches of" in done["loss"]


# after a stop

KILLED = """
import os, signal, sys
from onnxsim_embed.finetune import TextPairs, finetune
from onnxsim_embed.finetune.callbacks import Finite
import json
def kill(self, arguments, state, control, **_):
    if state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
Finite.on_pre_optimizer_step = kill
table = json.loads(sys.argv[1])
finetune(TextPairs(*table["pairs"]), table["output"], model=table["model"], **table["options"])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_after_a_kill_the_same_call_gives_the_same_model(tuned, checkpoint, tmp_path):
    result, uninterrupted, _ = tuned
    output = tmp_path / "tuned"
    table = {
        "pairs": [PAIRS.sources, PAIRS.targets], "output": str(output), "model": str(checkpoint), "options": QUICK,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(table)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    kept = workplace_of(output) / "checkpoints"
    assert [path.name for path in kept.glob("checkpoint-*")] == ["checkpoint-4"]
    half = kept / "checkpoint-8"  # one that was being written
    shutil.copytree(kept / "checkpoint-4", half)
    (half / "trainer_state.json").unlink()
    said = []
    again = finetune(PAIRS, output, model=checkpoint, on_stage=said.append, **QUICK)
    assert said[1:] == ["Going on from checkpoint-4.", "Exporting and verifying."]
    assert again.report == result.report
    assert (output / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()
    assert not workplace_of(output).exists()


@pytest.mark.usefixtures("brief")
def test_what_is_half_done_with_other_pairs_or_settings_is_refused(
    checkpoint, tmp_path, monkeypatch
):
    from onnxsim_embed.finetune import job

    with monkeypatch.context() as patch:
        patch.setattr(job, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(PAIRS, tmp_path / "out", model=checkpoint, **QUICK)
    with pytest.raises(FileExistsError, match=r"half done with other settings: finish.*--force"):
        finetune(PAIRS, tmp_path / "out", model=checkpoint, epochs=1)
    with pytest.raises(FileExistsError, match="other pairs, evaluation"):
        finetune(made_pairs(41), tmp_path / "out", model=checkpoint, **QUICK)
    other = write_checkpoint(tmp_path / "other", seed=3)
    with pytest.raises(FileExistsError, match="other model"):
        finetune(PAIRS, tmp_path / "out", model=other, **QUICK)
    finetune(PAIRS, tmp_path / "out", model=other, epochs=1, batch_size=16, force=True)
    assert not workplace_of(tmp_path / "out").exists()


def test_two_at_once_are_refused(checkpoint, tmp_path, monkeypatch):
    from onnxsim_embed.finetune import job

    inside, leave = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        leave.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_train", wait)

    def first():
        with pytest.raises(KeyboardInterrupt):
            finetune(PAIRS, tmp_path / "out", model=checkpoint)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(TrainingError, match="another process is fine-tuning into"):
            finetune(PAIRS, tmp_path / "out", model=checkpoint)
    finally:
        leave.set()
        thread.join()


# what goes wrong


@pytest.mark.usefixtures("brief")
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    checkpoint, tmp_path, monkeypatch
):
    from sentence_transformers import SentenceTransformer

    from onnxsim_embed.finetune import training

    real, calls = training.MultipleNegativesRankingLoss.forward, []

    def broken(self, features, labels):
        calls.append(1)
        return real(self, features, labels) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(training.MultipleNegativesRankingLoss, "forward", broken)
    output = tmp_path / "out"
    with pytest.raises(
        TrainingError, match=r"not finite at step 6 of 12.*lower --learning-rate"
    ) as caught:
        finetune(PAIRS, output, model=checkpoint, **QUICK)
    kept = workplace_of(output) / "checkpoints" / "checkpoint-4"
    assert str(kept) in str(caught.value)
    assert np.isfinite(SentenceTransformer(str(kept), device="cpu").encode("a road")).all()
    assert not output.exists()


def test_an_export_that_is_not_faithful_keeps_the_checkpoint(checkpoint, tmp_path, monkeypatch):
    from onnxsim_embed.finetune import job

    def unfaithful(*_, **__):
        raise VerificationError("int8 is far off. Nothing was written")

    monkeypatch.setattr(job, "export_model", unfaithful)
    with pytest.raises(
        VerificationError, match=r"far off. The fine-tuned checkpoint is kept in"
    ) as caught:
        finetune(PAIRS, tmp_path / "out", model=checkpoint, epochs=1, batch_size=16)
    kept = workplace_of(tmp_path / "out") / "model" / "out"
    assert f"onnxsim-embed export {kept}" in str(caught.value)
    assert weights(kept)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(job, "export_model", export_model)
    said = []
    finetune(
        PAIRS, tmp_path / "out", model=checkpoint, epochs=1, batch_size=16, on_stage=said.append
    )
    assert said[1:] == ["Exporting and verifying."]  # training was not repeated


@pytest.mark.usefixtures("brief")
def test_a_model_that_got_worse_is_said_in_bold_and_kept(checkpoint, tmp_path, monkeypatch):
    from onnxsim_embed.finetune import job, retrieval

    real, measured = job.measure, []

    def spoilt(encode, task):
        measured.append(real(encode, task))
        got = measured[-1]
        better = retrieval.Metrics(1.0, 1.0, 1.0, None)
        return (
            retrieval.Measured(better, got.first_right | True, got.vectors)
            if len(measured) == 1
            else got
        )

    monkeypatch.setattr(job, "measure", spoilt)
    result = finetune(PAIRS, tmp_path / "out", model=checkpoint, epochs=1, batch_size=16)
    assert result.worse
    assert result.report["worse"] is True
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\n**The model got worse on the held-out pairs: NDCG@10 from 1.0000 to" in card
    assert weights(tmp_path / "out")


@pytest.mark.usefixtures("brief")
def test_early_stopping(checkpoint, tmp_path, monkeypatch):
    from onnxsim_embed.finetune.callbacks import HeldOut

    values = iter([0.5, 0.6, 0.4, 0.3, 0.9])
    monkeypatch.setattr(HeldOut, "__call__", lambda self, *_, **__: {"validation": next(values)})
    result = finetune(
        PAIRS, tmp_path / "out", model=checkpoint, epochs=10, batch_size=16, patience=2
    )
    done = result.report["training"]
    assert (done["steps"], done["planned"], done["best_step"]) == (8, 20, 4)
    assert next(values) == 0.9


def test_refusals_before_any_work(checkpoint, artifact, tmp_path):
    scored = TextPairs(PAIRS.sources, PAIRS.targets, scores=list(range(40)))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").touch()
    for said, kind, pairs, options in [
        ("is not an artifact; choose another", FileExistsError, PAIRS, {"output": taken, "force": True}),
        ("exists; replace it with --force", FileExistsError, PAIRS, {"output": artifact}),
        ("there is no model 'minnilm'", CheckpointError, PAIRS, {"model": "minnilm"}),
        ("these have scores already", ValueError, scored, {"hard_negatives": 2}),
        ("must both have scores, or neither", ValueError, scored, {"evaluation": PAIRS}),
        ("batch_size must be an integer of at least 2, got 1", ValueError, PAIRS, {"batch_size": 1}),
        ("epochs must be a positive number, got 0", ValueError, PAIRS, {"epochs": 0}),
    ]:  # fmt: skip
        output = options.pop("output", tmp_path / "out")
        with pytest.raises(kind, match=said):
            finetune(pairs, output, **{"model": checkpoint, **options})
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_checkpoint_that_does_not_say_how_it_pools_is_refused(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", pooling=None)
    with pytest.raises(CheckpointError, match=r"has no modules.json"):
        finetune(PAIRS, tmp_path / "out", model=plain)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="held_out must be above 0"):
        Settings(share=0.7)
    with pytest.raises(ValueError, match="learning_rate must be a positive number, got nan"):
        Settings(learning_rate=float("nan"))


@pytest.mark.parametrize("package", ["accelerate", "datasets", "torch"])
def test_a_missing_package_is_one_line_with_the_extra(package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    with pytest.raises(
        MissingExtraError, match=rf"'{package}'.*pip install 'onnxsim-embed\[finetune\]'"
    ):
        finetune(PAIRS, tmp_path / "out")


def test_importing_the_package_imports_no_torch():
    code = "import sys, onnxsim_embed.finetune, onnxsim_embed.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# prompts and the picture


@pytest.mark.usefixtures("brief")
def test_prompts_of_the_model_are_trained_measured_and_exported(tmp_path):
    model = write_checkpoint(tmp_path / "model", prompts={"query": "a ", "document": "the "})
    result = finetune(PAIRS, tmp_path / "out", model=model, epochs=1, batch_size=16)
    assert result.artifact.manifest.prompts == {"query": "a ", "document": "the "}
    assert result.report["held_out"]["models"]["fp32"]["min_cosine"] > 0.99999


def test_the_picture_shows_what_the_log_says(tuned, tmp_path):
    result, output, _ = tuned
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    flat = json.loads(json.dumps(result.report))
    flat["training"]["log"]["loss"] = [[1, 1.0], [2, 1.0]]
    draw_losses(flat, tmp_path / "flat.png")
    assert (tmp_path / "flat.png").read_bytes() != (output / "loss.png").read_bytes()


# the real model


@pytest.mark.real
def test_a_few_steps_on_the_real_minilm_lift_its_accuracy(real_checkpoint, tmp_path):
    from pathlib import Path

    file = Path(__file__).parent.parent.parent / "examples" / "jargon_pairs.csv"
    result = finetune(file, tmp_path / "out", model="minilm", epochs=2, learning_rate=1e-4)
    figures = result.report["held_out"]["models"]
    assert figures["after"]["ndcg_at_10"] > figures["before"]["ndcg_at_10"] + 0.05
    assert figures["int8"]["ndcg_at_10"] > figures["before"]["ndcg_at_10"] + 0.05
    assert figures["fp32"]["min_cosine"] > 0.99999
    assert figures["int8"]["mean_cosine"] > 0.995
    assert os.path.getsize(tmp_path / "out" / "onnx" / "model_int8.onnx") < 30e6
