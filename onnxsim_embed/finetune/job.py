"""The fine-tuning job: split, evaluate, train, export, evaluate again, report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from onnxsim_embed.artifact.locate import locate_checkpoint
from onnxsim_embed.artifact.manifest import MANIFEST, Artifact, check_target, list_files
from onnxsim_embed.errors import CheckpointError, VerificationError
from onnxsim_embed.export.api import export_model, resolve_via
from onnxsim_embed.export.checkpoint import Checkpoint, open_checkpoint
from onnxsim_embed.export.encoder import load_encoder
from onnxsim_embed.export.fidelity import compare_vectors
from onnxsim_embed.export.quantization.calibration import calibration_texts
from onnxsim_embed.export.weights import read_optional_json
from onnxsim_embed.files import checkpoint as checkpoints
from onnxsim_embed.files.atomic import atomic_directory, write_json
from onnxsim_embed.finetune import Settings, training
from onnxsim_embed.finetune.evaluation import PairEvaluator, sample
from onnxsim_embed.finetune.pairs import TextPairs, clean_pairs
from onnxsim_embed.finetune.report import add_to_card, draw_losses, held_out_report
from onnxsim_embed.finetune.split import split_pairs
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.prompts import DOCUMENT_PROMPTS

# More targets than this are sampled: fewer for the choice of the checkpoint, which is made repeatedly.
MAX_TARGETS = 20_000
MAX_VALIDATION_TARGETS = 1000

CALIBRATION_TEXTS = 512

# What trained weights depend on, apart from pairs, settings and the model.
PACKAGES = ("onnxsim-embed", "torch", "transformers", "sentence-transformers", "accelerate", "datasets")  # fmt: skip


class UnfinishedRun(checkpoints.Checkpoint):
    """Checkpoint of a run: mined negatives, the trainer's checkpoints, then the trained model."""

    suffix = "finetune"
    settings_key = "job"


class Job:
    """A fine-tuning job, from pairs to a report; see `finetune`."""

    def __init__(
        self,
        pairs: TextPairs,
        evaluation: TextPairs | None,
        output: Path,
        model: str | Path,
        settings: Settings,
        force: bool,
        progress: bool,
        on_stage: Callable[[str], None],
    ) -> None:
        self.settings, self.output, self.force = settings, output, force
        self.progress, self.on_stage = progress, on_stage
        self.unfinished = UnfinishedRun(output)
        journal = None if force else self.unfinished.read()
        check_target(output, force or (journal is not None and journal["replaces"]))
        if settings.hard_negatives and (pairs.negatives is not None or pairs.scores is not None):
            raise ValueError("hard_negatives are mined for pairs without negatives and scores")
        pairs, counts = clean_pairs(pairs)
        if evaluation is not None and (evaluation.scores is None) != (pairs.scores is None):
            raise ValueError("training and evaluation pairs must both have scores, or neither")
        self.split, counts["dropped"] = split_pairs(
            pairs, settings.share, settings.seed, evaluation
        )
        self.base = open_base_model(model)
        self.versions = {name: version(name) for name in PACKAGES}
        # Both sides of a scored pair are of one kind, so that neither has a prompt.
        prompts = {} if pairs.scores is not None else self.base.prompts
        document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), "")
        self.prompts = prompts.get("query", ""), document
        self.load = partial(training.load_model, prompts=self.base.prompts)
        self.directory = self.unfinished.directory
        self.trained = self.directory / "model" / output.absolute().name
        self.report: dict[str, Any] = {
            "model": str(model),
            "settings": asdict(settings),
            "pairs": counts | {name: len(part) for name, part in self.split._asdict().items()},
        }

    def run(self) -> tuple[Artifact, dict[str, Any]]:
        """Run the job, or continue it where it stopped."""
        files = list_files(self.base.directory)
        digests = {
            "pairs": [asdict(part) for part in self.split[:2]],
            "evaluation": asdict(self.split.held_out),
            "model": {name: entry.sha256 for name, entry in files.items()},
        }
        fingerprint: dict[str, Any] = {"settings": asdict(self.settings), "versions": self.versions}
        for name, value in digests.items():
            text = json.dumps(value, sort_keys=True)
            fingerprint[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        with self.unfinished:
            if self.unfinished.resume(fingerprint, self.force) is None:
                self.unfinished.record()
            self.on_stage(_describe(self.report["pairs"]))
            self.run_stages()
            self.unfinished.complete()
        return Artifact.open(self.output), self.report

    def run_stages(self) -> None:
        """Evaluate, train unless an earlier run has finished that, evaluate again, export and report."""
        *others, held_out = self.split
        seed = self.settings.seed
        evaluator = PairEvaluator(held_out, others, MAX_TARGETS, seed, self.prompts)
        evaluations, fidelity = {}, {}
        with training.quiet_and_seeded(seed):
            self.on_stage("Evaluating the base model.")
            evaluations["before"] = evaluator.evaluate(self.load(self.base.directory))
            summary = read_optional_json(self.directory / "trained.json") or self.train()
            self.on_stage("Evaluating the fine-tuned model.")
            after = evaluations["after"] = evaluator.evaluate(self.load(self.trained))
        self.on_stage("Exporting and verifying.")
        main = evaluator.primary_metric
        with atomic_directory(self.output) as work:
            artifact = self.export(work)
            for precision in artifact.manifest.precisions:
                self.on_stage(f"Evaluating the exported {precision} file.")
                embedder = Embedder(artifact, precision=precision, device="cpu")
                evaluation = evaluations[precision] = evaluator.evaluate(embedder)
                fidelity[precision] = compare_vectors(after.embeddings, evaluation.embeddings)
                del embedder
            self.report |= {
                "training": summary,
                "held_out": held_out_report(len(evaluator.targets), evaluations, fidelity),
                "worse": after.metrics[main] < evaluations["before"].metrics[main],
                "versions": self.versions,
            }
            write_json(work / "report.json", self.report)
            draw_losses(self.report, work / "loss.png")
            shutil.copy(self.trained / "model.safetensors", work)
            add_to_card(self.report, work)
            manifest = replace(artifact.manifest, files=list_files(work))
            (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

    def train(self) -> dict[str, Any]:
        """Train the base model and save its best checkpoint; return what report.json says of it."""
        settings, train = self.settings, self.split.train
        model = self.load(self.base.directory)
        evaluator = PairEvaluator(
            self.split.validation, [train], MAX_VALIDATION_TARGETS, settings.seed, self.prompts
        )
        start = evaluator(model)[evaluator.primary_metric]
        dataset = training.to_dataset(train)
        if settings.hard_negatives:
            mined = self.directory / "mined"
            if not mined.is_dir():
                self.on_stage("Mining hard negatives.")
                dataset = training.mine(model, train, settings.hard_negatives, self.progress)
                if not len(dataset):
                    raise ValueError(
                        f"none of {len(train)} pairs has {settings.hard_negatives} hard negatives; set "
                        "hard_negatives lower"
                    )
                dataset.save_to_disk(f"{mined}.partial")
                Path(f"{mined}.partial").rename(mined)
            dataset = load_from_disk(str(mined))
            if n := len(train) - len(dataset):
                self.on_stage(f"{n:,} pairs skipped: fewer hard negatives were found for them.")
        checkpoints = self.directory / "checkpoints"
        newest = training.newest_checkpoint(checkpoints)
        self.on_stage("Training." if newest is None else f"Resuming from {newest.name}.")
        summary = training.train(
            model, dataset, evaluator, settings, checkpoints, self.prompts, self.progress
        )
        shutil.rmtree(self.trained.parent, ignore_errors=True)
        model.save(str(self.trained), create_model_card=False)
        summary["log"]["validation"].insert(0, [0.0, start])
        write_json(self.directory / "trained.json", summary)
        shutil.rmtree(checkpoints)
        return summary

    def export(self, target: Path) -> Artifact:
        """Export the trained checkpoint, calibrated on training texts and on the bundled ones."""
        train = self.split.train
        columns = zip(self.prompts, (train.sources, train.targets), strict=True)
        distinct = dict.fromkeys(prompt + text for prompt, texts in columns for text in texts)
        texts = sample(list(distinct), CALIBRATION_TEXTS, self.settings.seed)
        # Narrow texts alone do not show the ranges that other texts have.
        calibration = [*texts, *calibration_texts()]
        try:
            return export_model(
                self.trained, target, precisions=("fp32", "int8"), calibration=calibration
            )
        except VerificationError as error:
            raise VerificationError(
                f"{str(error).removesuffix('. Nothing was written')}. The fine-tuned checkpoint is kept "
                f"in {self.trained}: onnxsim-embed export {self.trained} -o NEW_DIRECTORY --precision "
                "fp32"
            ) from None


def open_base_model(model: str | Path) -> Checkpoint:
    """Open a checkpoint and check, before any training, that it can be trained and exported.

    :raises CheckpointError: naming what is missing or not supported.
    """
    directory, recipe = locate_checkpoint(model)
    if not (directory / "modules.json").is_file():
        raise CheckpointError(f"{directory} has no modules.json, which defines the pooling")
    checkpoint = open_checkpoint(directory, recipe=recipe)
    via = resolve_via(checkpoint)
    if via == "adopted":
        raise CheckpointError(
            f"{directory} holds ONNX files without PyTorch weights, so it cannot be trained"
        )
    if via == "direct":
        load_encoder(checkpoint.config, checkpoint.tensors())
    return checkpoint


def _describe(pairs: dict[str, int]) -> str:
    reasons = {
        "repeated": "repeat an earlier pair",
        "same_text": "have the same text on both sides",
        "dropped": "share their source with an evaluation pair",
    }
    skipped = [f" {pairs[k]:,} skipped: they {why}." for k, why in reasons.items() if pairs[k]]
    return (
        f"{pairs['train']:,} pairs for training, {pairs['validation']:,} for validation (choice of the "
        f"checkpoint), {pairs['held_out']:,} for evaluation." + "".join(skipped)
    )
