"""Fine-tuning on pairs of texts, followed by export and evaluation. Needs the `finetune` extra.

PyTorch is imported when fine-tuning starts, and never at inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import check_packages
from onnxsim_embed.finetune.pairs import TextPairs, read_pairs
from onnxsim_embed.system.units import check_integer

__all__ = ["FinetuneResult", "TextPairs", "finetune", "read_pairs"]

PACKAGES = ("torch", "sentence_transformers", "accelerate", "datasets", "onnx", "matplotlib")


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; see `finetune`."""

    epochs: float
    batch_size: int
    learning_rate: float
    hard_negatives: int
    share: float
    patience: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 2, "hard_negatives": 0, "patience": 1}.items():
            check_integer(name, getattr(self, name), least)
        check_integer("seed", self.seed, 0, (1 << 32) - 1, "the limit of numpy's generator")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not 0 < self.share <= 0.5:
            raise ValueError(f"held_out must be above 0 and at most 0.5, got {self.share!r}")


@dataclass(frozen=True)
class FinetuneResult:
    """Result of fine-tuning.

    :param artifact: the exported model; its directory holds the PyTorch weights too.
    :param report: content of report.json: pairs, training, and held-out metrics of each model.
    :param worse: whether the model got worse on the held-out pairs.
    """

    artifact: Artifact
    report: dict[str, Any]
    worse: bool


def finetune(
    pairs: TextPairs | str | Path | Iterable[Any],
    output: str | Path,
    *,
    model: str | Path = "all-MiniLM-L6-v2",
    evaluation: TextPairs | str | Path | Iterable[Any] | None = None,
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
    """Fine-tune a model on pairs of texts, export it, and evaluate it on held-out pairs.

    Plain pairs are trained on with MultipleNegativesRankingLoss, scored pairs with CoSENTLoss, by
    sentence-transformers' trainer. A fraction of the pairs is not trained on: half of it chooses the best
    checkpoint and stops training early; on the other half, the held-out pairs, the model is evaluated
    once before and once after. Unfinished runs are kept in a hidden directory beside the output; after a
    kill the same call continues from the last checkpoint, with the same result.

    :param pairs: TextPairs, or what `read_pairs` reads: a file, a data frame, a list of tuples (source,
        target).
    :param output: directory to write: the artifact, and beside its ONNX files model.safetensors
        (sentence-transformers loads the directory too), report.json and loss.png.
    :param model: recipe name, checkpoint directory or Hub id.
    :param evaluation: evaluation pairs; None: a held-out split.
    :param epochs: passes over the pairs, unless training stops early.
    :param batch_size: pairs in a training step.
    :param learning_rate: maximum, reached after the first tenth of the steps.
    :param hard_negatives: number of hard negatives to mine for each pair: targets of other pairs that
        the model confuses most with its own.
    :param held_out: fraction of the pairs that is not trained on, at most 0.5.
    :param patience: evaluations without improvement after which training stops.
    :param seed: equal seeds give equal models, on the same machine and CPU only.
    :param force: discard an unfinished run, and replace an existing artifact.
    :param show_progress_bar: whether to show progress on standard error.
    :param on_stage: called with a line of text at the start of each stage.
    :raises FileExistsError: if the output exists.
    :raises ValueError: for invalid arguments or pairs, or if an unfinished run has other pairs or
        settings, naming those that differ.
    :raises TableError: for a file that cannot be read, naming the row, or if another process writes the
        output.
    :raises CheckpointError: if the model cannot be found, trained or exported.
    :raises TrainingError: if the loss is not finite, naming the last good checkpoint.
    :raises VerificationError: if the export is not faithful, naming the fine-tuned checkpoint.
    :raises MissingExtraError: if a package is not installed.
    """
    settings = Settings(epochs, batch_size, learning_rate, hard_negatives, held_out, patience, seed)
    check_packages("fine-tuning", "finetune", {n: n.replace("_", "-") for n in PACKAGES})
    from onnxsim_embed.finetune.job import Job

    job = Job(
        _as_pairs(pairs), None if evaluation is None else _as_pairs(evaluation), Path(output), model,
        settings, force, show_progress_bar, on_stage or (lambda line: None),
    )  # fmt: skip
    artifact, report = job.run()
    return FinetuneResult(artifact, report, report["worse"])


def _as_pairs(pairs: TextPairs | str | Path | Iterable[Any]) -> TextPairs:
    return pairs if isinstance(pairs, TextPairs) else read_pairs(pairs)
