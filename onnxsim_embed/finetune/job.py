"""The fine-tuning job: split, measure, train, export, measure again, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxsim_embed.artifact.manifest import MANIFEST, Artifact, list_files
from onnxsim_embed.errors import VerificationError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.checkpoint import Checkpoint
from onnxsim_embed.export.fidelity import compare_vectors
from onnxsim_embed.export.quantization.calibration import MIN_TEXTS
from onnxsim_embed.files.atomic import atomic_directory, atomic_file
from onnxsim_embed.finetune.base import base_prompts, open_base, versions
from onnxsim_embed.finetune.pairs import TextPairs, clean_pairs, without_negatives
from onnxsim_embed.finetune.report import add_to_card, draw_losses, make_report
from onnxsim_embed.finetune.retrieval import Encode, Float32, Measured, Task, make_task, measure
from onnxsim_embed.finetune.settings import Settings
from onnxsim_embed.finetune.split import Split, split_pairs
from onnxsim_embed.finetune.workplace import (
    check_output,
    digest,
    read_json,
    workplace,
    write_json,
)
from onnxsim_embed.runtime.embedder import Embedder

WEIGHTS = "model.safetensors"
REPORT = "report.json"
PICTURE = "loss.png"

# Targets that are searched: all, up to here. For the choice of the checkpoint, which happens again and
# again, fewer.
MOST_TARGETS = 20_000
MOST_VALIDATION_TARGETS = 1000

CALIBRATION_TEXTS = 512

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """What all stages share."""

    split: Split
    counts: dict[str, int]
    settings: Settings
    source: str
    checkpoint: Checkpoint
    prompts: tuple[str, str]
    work: Path
    name: str
    progress: bool
    say: Say

    def task(self) -> Task:
        """What the held-out pairs ask of a model."""
        split = self.split
        return make_task(
            split.held_out,
            [without_negatives(part) for part in (split.train, split.validation)],
            MOST_TARGETS,
            self.settings.seed,
            self.prompts,
        )


def run_job(
    given: TextPairs,
    judged: TextPairs | None,
    output: Path,
    model: str | Path,
    settings: Settings,
    force: bool,
    progress: bool,
    say: Say,
) -> tuple[Artifact, dict[str, Any]]:
    """Run the job, from where it stopped the last time; see `finetune`."""
    check_output(output, force)
    if settings.hard_negatives and (given.negatives is not None or given.scores is not None):
        held = "hard negatives" if given.negatives is not None else "scores"
        raise ValueError(f"--hard-negatives are mined for plain pairs; these have {held} already")
    pairs, counts = clean_pairs(given)
    if judged is not None and (judged.scores is None) != (pairs.scores is None):
        raise ValueError("the pairs and those to judge by must both have scores, or neither")
    split = split_pairs(pairs, settings.share, settings.seed, judged)
    checkpoint = open_base(model)
    job = {
        "settings": asdict(settings),
        "pairs": digest([asdict(part) for part in (split.train, split.validation)]),
        "evaluation": digest(asdict(split.held_out)),
        "model": digest({k: v.sha256 for k, v in list_files(checkpoint.directory).items()}),
        "versions": versions(),
    }
    prompts = base_prompts(checkpoint)
    if pairs.scores is not None:  # both sides of a scored pair are of one kind
        prompts = ("", "")
    with workplace(output, job, force) as work:
        stages = _Job(
            split,
            {**asdict(counts), "dropped": split.dropped},
            settings,
            str(model),
            checkpoint,
            prompts,
            work,
            output.absolute().name,
            progress,
            say,
        )
        say(_describe(split, counts.repeated, counts.same_text))
        return _run_stages(stages, output)


def _run_stages(job: _Job, output: Path) -> tuple[Artifact, dict[str, Any]]:
    from onnxsim_embed.finetune.training import encoder_of, load_model, quiet_and_seeded

    task = job.task()
    final = job.work / "model" / job.name
    with quiet_and_seeded(job.settings.seed):
        before = _measure_before(job, task)
        training = read_json(job.work / "trained.json")
        if training is None:
            training = _train(job, final)
        tuned = load_model(final, job.checkpoint.prompts)
        after = measure(encoder_of(tuned), task)
    job.say("Exporting and verifying.")
    with atomic_directory(output) as place:
        artifact = _export(job, final, place)
        measured = {"before": before, "after": after}
        fidelity = {}
        for precision in artifact.manifest.precisions:
            embedder = Embedder(artifact, precision=precision, device="cpu")
            measured[precision] = measure(_encode_with(embedder), task)
            fidelity[precision] = _cosines(after.vectors, measured[precision].vectors)
            del embedder
        report = make_report(
            source=job.source,
            settings=asdict(job.settings),
            pairs={
                **job.counts,
                "train": len(job.split.train),
                "validation": len(job.split.validation),
                "held_out": len(job.split.held_out),
            },
            training=training,
            searched=(len(task.queries), len(task.corpus)),
            measured=measured,
            fidelity=fidelity,
            versions=versions(),
        )
        write_json(place / REPORT, report)
        draw_losses(report, place / PICTURE)
        shutil.copyfile(final / WEIGHTS, place / WEIGHTS)
        add_to_card(report, place)
        manifest = replace(artifact.manifest, files=list_files(place))
        (place / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(output), report


def _measure_before(job: _Job, task: Task) -> Measured:
    """Measure the model as it was; what a run before this one measured is taken over."""
    from onnxsim_embed.finetune.training import encoder_of, load_model

    kept = job.work / "before.npz"
    if kept.is_file():
        with np.load(kept) as arrays:
            vectors = arrays["vectors"]
        return measure(_replay(vectors), task)
    job.say("Measuring the model as it is.")
    model = load_model(job.checkpoint.directory, job.checkpoint.prompts)
    texts: list[Float32] = []

    def encode(batch: list[str], prompt: str) -> Float32:
        texts.append(encoder_of(model)(batch, prompt))
        return texts[-1]

    before = measure(encode, task)
    with atomic_file(kept) as work, work.open("wb") as stream:
        np.savez(stream, vectors=np.concatenate(texts))
    return before


def _replay(vectors: Float32) -> Encode:
    """Return an encoder that hands out kept vectors in the order they were made."""
    position = 0

    def encode(texts: list[str], prompt: str) -> Float32:
        nonlocal position
        position += len(texts)
        return vectors[position - len(texts) : position]

    return encode


def _train(job: _Job, final: Path) -> dict[str, Any]:
    from datasets import load_from_disk

    from onnxsim_embed.finetune.training import (
        encoder_of,
        load_model,
        mine,
        newest_checkpoint,
        train,
    )

    settings, split = job.settings, job.split
    model = load_model(job.checkpoint.directory, job.checkpoint.prompts)
    validation = make_task(
        split.validation,
        [without_negatives(split.train)],
        MOST_VALIDATION_TARGETS,
        settings.seed,
        job.prompts,
    )
    start = measure(encoder_of(model), validation).metrics.main
    mined = None
    if settings.hard_negatives:
        kept = job.work / "mined"
        if not kept.is_dir():
            job.say("Mining hard negatives.")
            found = mine(model, split.train, settings.hard_negatives, job.progress)
            if not len(found):
                raise ValueError(
                    f"no pair has {settings.hard_negatives} hard negatives among {len(split.train)} "
                    "pairs; ask for fewer"
                )
            found.save_to_disk(str(kept) + ".partial")
            Path(str(kept) + ".partial").rename(kept)
        mined = load_from_disk(str(kept))
    checkpoints = job.work / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    job.say("Training." if newest is None else f"Going on from {newest.name}.")
    done = train(
        model, split.train, validation, settings, checkpoints, progress=job.progress, mined=mined
    )
    shutil.rmtree(final.parent, ignore_errors=True)
    model.save(str(final), create_model_card=False)
    table = asdict(done)
    table["log"]["validation"].insert(0, [0.0, start])
    write_json(job.work / "trained.json", table)
    shutil.rmtree(checkpoints)
    return table


def _export(job: _Job, final: Path, place: Path) -> Artifact:
    try:
        return export_model(
            final, place, precisions=("fp32", "int8"), calibration=_calibration(job)
        )
    except VerificationError as error:
        raise VerificationError(
            f"{str(error).removesuffix('. Nothing was written')}. The fine-tuned checkpoint is kept in "
            f"{final}: onnxsim-embed export {final} -o NEW_DIRECTORY --precision fp32"
        ) from None


def _calibration(job: _Job) -> list[str] | None:
    """Return texts that were learnt from, as the model sees them; None where there are too few."""
    train = job.split.train
    texts = [job.prompts[0] + text for text in train.sources]
    texts += [job.prompts[1] + text for text in train.targets]
    texts = list(dict.fromkeys(texts))
    if len(texts) > CALIBRATION_TEXTS:
        chosen = np.random.default_rng(job.settings.seed).choice(
            len(texts), CALIBRATION_TEXTS, replace=False
        )
        texts = [texts[i] for i in sorted(chosen.tolist())]
    return texts if len(texts) >= MIN_TEXTS else None


def _encode_with(embedder: Embedder) -> Encode:
    return lambda texts, prompt: embedder.encode(texts, prompt=prompt)


def _cosines(reference: Float32, vectors: Float32) -> dict[str, float]:
    fidelity = compare_vectors(reference, vectors)
    return {
        "mean_cosine": round(fidelity.mean_cosine, 6),
        "min_cosine": round(fidelity.min_cosine, 6),
    }


def _describe(split: Split, repeated: int, same_text: int) -> str:
    parts = [
        f"{len(split.train):,} pairs to learn from, {len(split.validation):,} to choose the checkpoint "
        f"by, {len(split.held_out):,} to judge by."
    ]
    left = {
        "repeat another": repeated,
        "have one text on both sides": same_text,
        "share their source with the evaluation file": split.dropped,
    }
    parts += [f"{number:,} left out: they {why}." for why, number in left.items() if number]
    return " ".join(parts)
