"""Pairs of texts -> a fine-tuned, exported and judged model. Needs the `finetune` extra.

Nothing at run time imports this package; only fine-tuning itself imports PyTorch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.finetune.pairs import TextPairs, read_pairs
from onnxsim_embed.finetune.settings import Settings

__all__ = ["FinetuneResult", "TextPairs", "finetune", "read_pairs"]

PACKAGES = ("torch", "sentence_transformers", "accelerate", "datasets", "onnx", "matplotlib")


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning made.

    :param artifact: the exported model, in whose directory the PyTorch weights are as well.
    :param report: what report.json holds: pairs, training, and the held-out figures of each model.
    :param worse: whether the model got worse at the held-out pairs.
    """

    artifact: Artifact
    report: dict[str, Any]
    worse: bool


def finetune(
    pairs: TextPairs | str | Path,
    output: str | Path,
    *,
    model: str | Path = "all-MiniLM-L6-v2",
    evaluation: TextPairs | str | Path | None = None,
    epochs: float = 1,
    batch_size: int = 64,
    learning_rate: float = 2e-5,
    hard_negatives: int = 0,
    held_out: float = 0.2,
    patience: int = 3,
    seed: int = 0,
    force: bool = False,
    show_progress_bar: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a model on pairs of texts, export it, and measure it on pairs it has not seen.

    Pairs that belong together are learnt with MultipleNegativesRankingLoss, pairs with scores with
    CoSENTLoss, by sentence-transformers' trainer. Part of the pairs is never learnt from: half of it
    chooses the best checkpoint and stops training early, the other half, the held-out pairs, is used
    once before and once after. Work in progress is in a hidden directory beside the output; after a
    kill the same call goes on from the last checkpoint, to the same result.

    :param pairs: pairs, or a file that `read_pairs` reads.
    :param output: the directory to write: the artifact, and beside its ONNX files model.safetensors
        (sentence-transformers loads the directory too), report.json and loss.png.
    :param model: recipe name, checkpoint directory or Hub id.
    :param evaluation: pairs to judge by, in place of held-out ones.
    :param epochs: passes over the pairs, if training does not stop early.
    :param batch_size: pairs in a step.
    :param learning_rate: its highest value, after the first tenth of the steps.
    :param hard_negatives: targets of other pairs that the model confuses most with each pair's own,
        so many a pair, to learn from.
    :param held_out: part of the pairs that is not learnt from, at most 0.5.
    :param patience: stop after so many evaluations without an improvement.
    :param seed: equal seeds give equal models, on the same machine and CPU only.
    :param force: start over, and replace an artifact that exists.
    :param show_progress_bar: whether to show one on standard error.
    :param on_stage: called with a line of text when a stage begins or ends.
    :raises FileExistsError: if the output exists, or is half done with other pairs or settings.
    :raises ValueError: for arguments or pairs that cannot be.
    :raises TableError: for a file that cannot be read, naming the row.
    :raises CheckpointError: if the model cannot be found, trained or exported.
    :raises TrainingError: if the loss is not finite, naming the last good checkpoint.
    :raises VerificationError: if the export is not faithful, naming the fine-tuned checkpoint.
    :raises MissingExtraError: if a package is not installed.
    """
    settings = Settings(epochs, batch_size, learning_rate, hard_negatives, held_out, patience, seed)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("fine-tuning", "finetune", package.replace("_", "-"))
    from onnxsim_embed.finetune.job import run_job

    given = read_pairs(pairs) if isinstance(pairs, str | Path) else pairs
    judged = read_pairs(evaluation) if isinstance(evaluation, str | Path) else evaluation
    artifact, report = run_job(
        given,
        judged,
        Path(output),
        model,
        settings,
        force,
        show_progress_bar,
        on_stage or (lambda line: None),
    )
    return FinetuneResult(artifact, report, bool(report["worse"]))
