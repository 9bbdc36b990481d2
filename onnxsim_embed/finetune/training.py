"""Fine-tuning by sentence-transformers' own trainer, set up to fit small machines and to go on after a kill."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.training_args import BatchSamplers
from sentence_transformers.util import mine_hard_negatives
from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.utils import logging as transformers_logging

from onnxsim_embed.finetune.callbacks import Finite, HeldOut, Progress
from onnxsim_embed.finetune.pairs import TextPairs
from onnxsim_embed.finetune.retrieval import Encode, Float32, Task
from onnxsim_embed.system.hardware import available_cpus

if TYPE_CHECKING:
    from onnxsim_embed.finetune.settings import Settings

# What a forward pass may keep for the backward pass: weights, gradients, optimizer and vectors of a
# base-size model need 2 GB more, and 8 GB is to suffice.
ACTIVATION_BYTES = 2 << 30

# Checkpoints are no further apart than so many steps: some ten minutes of work on two cores.
MOST_STEPS_BETWEEN = 250

# The share of steps over which the learning rate rises.
WARM_UP = 0.1

# Texts this close to a source are more likely right than hard negatives.
MINED_MAX_SCORE = 0.95

ENCODE_BATCH = 32


@dataclass(frozen=True)
class Training:
    """What a training run did.

    :param loss: name of the loss, with the size of its mini-batches where it has them.
    :param steps: steps done; `planned` without early stopping.
    :param best_step: step of the checkpoint that is kept.
    :param log: loss by step, and the metric on the validation pairs by step.
    """

    loss: str
    pairs: int
    steps: int
    planned: int
    best_step: int
    log: Mapping[str, list[list[float]]]


def load_model(directory: Path, prompts: Mapping[str, str]) -> SentenceTransformer:
    """Load a checkpoint to be trained.

    :param prompts: the model's prompts; those of the checkpoint are replaced.
    """
    model = SentenceTransformer(str(directory), local_files_only=True)
    model.prompts = dict(prompts)
    # Else the card of each checkpoint asks the Hub what it came from, and looks for examples in the pairs.
    model.model_card_data.local_files_only = True
    model.model_card_data.widget = [{"source_sentence": "", "sentences": [""]}]
    return model


def encoder_of(model: SentenceTransformer) -> Encode:
    """Return the model as a function from texts and a prompt to vectors."""

    def encode(texts: list[str], prompt: str) -> Float32:
        vectors = model.encode(
            texts, prompt=prompt, batch_size=ENCODE_BATCH, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)

    return encode


def mine(model: SentenceTransformer, pairs: TextPairs, number: int, progress: bool) -> Dataset:
    """Return pairs with the targets of other pairs that the model confuses most with their own.

    :param number: hard negatives for each pair; pairs without so many are left out.
    """
    with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
        return mine_hard_negatives(
            _dataset(pairs),
            model,
            num_negatives=number,
            max_score=MINED_MAX_SCORE,
            output_format="n-tuple",
            batch_size=ENCODE_BATCH,
            verbose=False,
        )


def train(
    model: SentenceTransformer,
    pairs: TextPairs,
    task: Task,
    settings: Settings,
    work: Path,
    *,
    progress: bool,
    mined: Dataset | None = None,
) -> Training:
    """Train a model in place, from the newest checkpoint in `work` where there is one.

    The model ends as the checkpoint that was best at `task`.

    :param work: directory for checkpoints.
    :param mined: the pairs with hard negatives, in place of `pairs`.
    :raises TrainingError: if a gradient is not finite.
    """
    dataset = _dataset(pairs) if mined is None else mined
    columns = [name for name in dataset.column_names if name != "label"]
    fits = texts_at_once(model, longest_text(model, pairs))
    batch, gathered = settings.batch_size, 1
    if pairs.scores is not None:
        batch = max(2, min(batch, fits // len(columns)))
        gathered = math.ceil(settings.batch_size / batch)
        loss, name = CoSENTLoss(model), "CoSENTLoss"
        if gathered > 1:
            name += f", {gathered} batches of {batch} a step"
    elif batch * len(columns) <= fits:
        loss, name = MultipleNegativesRankingLoss(model), "MultipleNegativesRankingLoss"
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=min(batch, fits))
        name = f"CachedMultipleNegativesRankingLoss, {min(batch, fits)} texts at once"
    an_epoch = math.ceil(math.ceil(len(dataset) / batch) / gathered)
    planned = math.ceil(an_epoch * settings.epochs)
    logged = max(1, min(an_epoch, MOST_STEPS_BETWEEN) // 25)
    saved = max(1, min(an_epoch, MOST_STEPS_BETWEEN) // logged) * logged
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=gathered,
        learning_rate=settings.learning_rate,
        warmup_steps=math.ceil(WARM_UP * planned),
        batch_sampler=BatchSamplers.NO_DUPLICATES
        if pairs.scores is None
        else BatchSamplers.BATCH_SAMPLER,
        prompts=_column_prompts(columns, task.prompts),
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=saved,
        save_strategy="steps",
        save_steps=saved,
        save_total_limit=1,
        logging_steps=logged,
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{HeldOut.KEY}",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        evaluator=HeldOut(encoder_of(model), task),
        callbacks=[
            EarlyStoppingCallback(settings.patience),
            Finite(work),
            Progress(progress),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    newest = newest_checkpoint(work)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    state = trainer.state
    return Training(
        name,
        len(dataset),
        state.global_step,
        state.max_steps,
        state.best_global_step or state.global_step,
        {
            key: [[float(e["step"]), float(e[name])] for e in state.log_history if name in e]
            for key, name in (("loss", "loss"), ("validation", f"eval_{HeldOut.KEY}"))
        },
    )


def newest_checkpoint(work: Path) -> Path | None:
    """Return the last checkpoint that was written to its end.

    The trainer writes trainer_state.json last; a checkpoint without a whole one was cut short.
    """
    found = []
    for path in work.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            continue
    return max(found)[1] if found else None


def longest_text(model: SentenceTransformer, pairs: TextPairs) -> int:
    """Return about how many tokens the longest text has: the most among the longest by characters."""
    columns = [c for c in (pairs.sources, pairs.targets, pairs.negatives) if c is not None]
    longest = sorted((text for column in columns for text in column), key=len)[-64:]
    ids = model.tokenizer(longest, truncation=True, max_length=model.max_seq_length)["input_ids"]
    return max(map(len, ids))


def texts_at_once(model: SentenceTransformer, tokens: int) -> int:
    """Return how many texts of so many tokens can be trained on at once.

    For each token a BERT layer keeps about 34 values of its width, and for each head 4 of each other
    token (scores, softmax, dropout and its mask).
    """
    config = model[0].auto_model.config
    per_token = 34 * config.hidden_size + 4 * config.num_attention_heads * tokens
    return max(1, ACTIVATION_BYTES // (4 * config.num_hidden_layers * per_token * tokens))


@contextlib.contextmanager
def quiet_and_seeded(seed: int) -> Iterator[None]:
    """Seed every generator and use this process's processors; put all back at the end."""
    # numpy's old generator too: the trainer draws from it.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    saving = not are_progress_bars_disabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(available_cpus())
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if saving:
            enable_progress_bars()


def _dataset(pairs: TextPairs) -> Dataset:
    """Return pairs as sentence-transformers wants them; the order of columns says what they are."""
    columns: dict[str, Any] = {"source": list(pairs.sources), "target": list(pairs.targets)}
    if pairs.negatives is not None:
        columns["negative"] = list(pairs.negatives)
    if pairs.scores is not None:
        columns["label"] = list(pairs.scores)
    return Dataset.from_dict(columns)


def _column_prompts(columns: list[str], prompts: tuple[str, str]) -> dict[str, str] | None:
    chosen = {name: prompts[0] if name == columns[0] else prompts[1] for name in columns}
    return {name: prompt for name, prompt in chosen.items() if prompt} or None
