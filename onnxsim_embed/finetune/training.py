"""Training with sentence-transformers' trainer, sized for small machines and resumable after a kill."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import CoSENTLoss
from sentence_transformers.training_args import BatchSamplers
from sentence_transformers.util import mine_hard_negatives
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from onnxsim_embed.errors import TrainingError
from onnxsim_embed.finetune import Settings
from onnxsim_embed.finetune.evaluation import PairEvaluator
from onnxsim_embed.finetune.pairs import TextPairs
from onnxsim_embed.finetune.repeats import EvenBatchSampler, MaskedRankingLoss, RightTargets
from onnxsim_embed.system.hardware import available_cpus

# What a forward pass may keep for the backward pass: weights, gradients, optimizer and embeddings of a
# base-size model need 2 GB more, and 8 GB is to suffice.
ACTIVATION_BYTES = 2 << 30

# At most this many steps between checkpoints: some ten minutes of work on two cores.
MAX_STEPS_BETWEEN_CHECKPOINTS = 250

# Fraction of the steps over which the learning rate rises.
WARMUP = 0.1

# Texts this close to a source are more likely right than hard negatives.
MAX_MINED_SCORE = 0.95


def load_model(directory: Path, prompts: Mapping[str, str]) -> SentenceTransformer:
    """Load a checkpoint for training; `prompts` replace its own."""
    model = SentenceTransformer(str(directory), local_files_only=True)
    model.prompts = dict(prompts)
    # Else the card of each checkpoint asks the Hub for its base model, and samples examples.
    model.model_card_data.local_files_only = True
    model.model_card_data.widget = [{"source_sentence": "", "sentences": [""]}]
    return model


def to_dataset(pairs: TextPairs) -> Dataset:
    """Return pairs as a dataset; the order of its columns says what they are."""
    columns = {"source": pairs.sources, "target": pairs.targets}
    columns |= {"negative": pairs.negatives, "label": pairs.scores}  # type: ignore[dict-item]
    return Dataset.from_dict({k: list(v) for k, v in columns.items() if v is not None})


def mine(model: SentenceTransformer, pairs: TextPairs, number: int, progress: bool) -> Dataset:
    """Return the pairs with hard negatives: targets that the model confuses most with their own.

    :param number: hard negatives for each pair; pairs with fewer are skipped.
    """
    options = {"max_score": MAX_MINED_SCORE, "output_format": "n-tuple", "verbose": False}
    with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
        return mine_hard_negatives(to_dataset(pairs), model, num_negatives=number, **options)


def train(
    model: SentenceTransformer,
    dataset: Dataset,
    evaluator: PairEvaluator,
    settings: Settings,
    checkpoints: Path,
    prompts: tuple[str, str],
    progress: bool,
) -> dict[str, Any]:
    """Train a model in place, from the newest of `checkpoints` if there is one, to the best.

    :param dataset: pairs in the columns of `to_dataset`, with mined hard negatives if there are any.
    :param evaluator: chooses the best checkpoint.
    :returns: what report.json says of the training.
    :raises TrainingError: if a gradient is not finite.
    """
    columns = [name for name in dataset.column_names if name != "label"]
    scored = "label" in dataset.column_names
    capacity = max_texts(model, dataset, columns)
    batch_size, accumulation = settings.batch_size, 1
    sampler: Any
    if scored:
        batch_size = max(2, min(batch_size, capacity // len(columns)))
        accumulation = math.ceil(settings.batch_size / batch_size)
        loss, name = CoSENTLoss(model), "CoSENTLoss"
        sampler = BatchSamplers.BATCH_SAMPLER
        if accumulation > 1:
            name += f", {accumulation} batches of {batch_size} a step"
    else:
        targets = RightTargets([dataset[column] for column in columns])
        sampler = partial(EvenBatchSampler, targets=targets)
        dataset = dataset.add_column("label", range(len(dataset)))
        loss, name = MaskedRankingLoss(model, targets, capacity), "MultipleNegativesRankingLoss"
        if batch_size * len(columns) > capacity:
            name = f"Cached{name}, {min(batch_size, capacity)} texts at once"
    epoch_steps = math.ceil(math.ceil(len(dataset) / batch_size) / accumulation)
    planned = math.ceil(epoch_steps * settings.epochs)
    interval = min(epoch_steps, MAX_STEPS_BETWEEN_CHECKPOINTS)
    logging_steps = max(1, interval // 25)
    save_steps = max(1, interval // logging_steps) * logging_steps
    metric = f"eval_{evaluator.primary_metric}"
    column_prompts = {column: prompts[column != columns[0]] for column in columns}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=math.ceil(WARMUP * planned),
        batch_sampler=sampler,
        prompts={column: prompt for column, prompt in column_prompts.items() if prompt} or None,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=save_steps,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )
    callbacks = [EarlyStoppingCallback(settings.patience), FiniteGradients()]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        evaluator=evaluator,
        callbacks=[*callbacks, ProgressBar()] if progress else callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    newest = newest_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    state = trainer.state

    def history(key: str) -> list[list[float]]:
        return [[float(e["step"]), float(e[key])] for e in state.log_history if key in e]

    return {
        "loss": name,
        "pairs": len(dataset),
        "steps": state.global_step,
        "planned": state.max_steps,
        "best_step": state.best_global_step or state.global_step,
        "log": {"loss": history("loss"), "validation": history(metric)},
    }


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the last complete checkpoint, which the trainer's own search may not be.

    The trainer writes trainer_state.json last; after a kill it may be missing or cut short.
    """
    complete = {}
    for path in directory.glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete[int(path.name.rpartition("-")[2])] = path
    return complete[max(complete)] if complete else None


class FiniteGradients(TrainerCallback):  # type: ignore[misc]
    """Raises before a gradient that is not finite reaches the weights."""

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: object,
        model: torch.nn.Module,
        **__: object,
    ) -> None:
        """Check the gradients; after clipping, one NaN is in all of them."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(math.isfinite(float(gradient.sum())) for gradient in gradients):
            last = newest_checkpoint(Path(args.output_dir)) or "none was written yet"
            raise TrainingError(
                f"the loss is not finite at step {state.global_step + 1} of {state.max_steps}, so training "
                f"stopped; the last good checkpoint: {last}. Start over with force=True and a lower "
                f"learning_rate than {args.learning_rate:g}"
            )


class ProgressBar(ProgressCallback):  # type: ignore[misc]
    """The trainer's bar, with the loss and the validation metric behind it, not in lines of their own."""

    def on_log(
        self, args: TrainingArguments, *_: object, logs: dict[str, float], **__: object
    ) -> None:
        """Show the newest loss or metric."""
        shown = {k: v for k, v in logs.items() if k in ("loss", args.metric_for_best_model)}
        if shown and self.training_bar is not None:
            self.training_bar.set_postfix(shown)


def max_texts(model: SentenceTransformer, dataset: Dataset, columns: Sequence[str]) -> int:
    """Return how many texts fit into one forward and backward pass.

    For each token a BERT layer keeps about 34 values of its width, and for each head 4 of each other
    token (scores, softmax, dropout and its mask). The longest text is among the longest by characters.
    """
    texts = sorted((text for column in columns for text in dataset[column]), key=len)[-64:]
    ids = model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
    tokens, config = max(map(len, ids)), model[0].auto_model.config
    per_token = 34 * config.hidden_size + 4 * config.num_attention_heads * tokens
    return max(1, ACTIVATION_BYTES // (4 * config.num_hidden_layers * per_token * tokens))


@contextlib.contextmanager
def quiet_and_seeded(seed: int) -> Iterator[None]:
    """Seed every generator, silence libraries and use this process's CPUs; restore all at the end."""
    with contextlib.ExitStack() as restored:
        restored.callback(random.setstate, random.getstate())
        # numpy's legacy generator too: the trainer draws from it.
        restored.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        restored.callback(torch.set_num_threads, torch.get_num_threads())
        restored.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        if transformers_logging.is_progress_bar_enabled():
            restored.callback(transformers_logging.enable_progress_bar)
        if not are_progress_bars_disabled():
            restored.callback(enable_progress_bars)
        restored.enter_context(torch.random.fork_rng(devices=[]))
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
        torch.set_num_threads(available_cpus())
        set_seed(seed)
        yield
