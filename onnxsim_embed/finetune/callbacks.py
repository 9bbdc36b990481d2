"""What happens beside the trainer's steps: measuring on validation pairs, a check for NaN, a progress bar."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.evaluation import SentenceEvaluator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from onnxsim_embed.errors import TrainingError
from onnxsim_embed.finetune.retrieval import Encode, Task, measure
from onnxsim_embed.system.progress import progress_bar


class HeldOut(SentenceEvaluator):  # type: ignore[misc]
    """The trainer's way to ask how good the model is now.

    :param encode: the model.
    :param task: what is asked of it.
    """

    KEY = "validation"

    def __init__(self, encode: Encode, task: Task) -> None:
        super().__init__()
        self.encode = encode
        self.task = task

    def __call__(
        self,
        model: object,
        output_path: str | None = None,
        epoch: float = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        """Return the number that checkpoints are chosen by, higher for better."""
        return {self.KEY: measure(self.encode, self.task).metrics.main}


class Finite(TrainerCallback):  # type: ignore[misc]
    """Stops before a gradient that is not finite reaches the weights.

    :param work: directory of the checkpoints, for the message.
    """

    def __init__(self, work: Path) -> None:
        self.work = work

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Look at the gradients; after clipping one NaN is in all of them."""
        assert model is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if all(math.isfinite(float(gradient.sum())) for gradient in gradients):
            return
        from onnxsim_embed.finetune.training import newest_checkpoint

        kept = newest_checkpoint(self.work)
        where = "no checkpoint had been written yet"
        if kept is not None:
            where = f"the last good checkpoint is {kept}"
        raise TrainingError(
            f"the loss is not finite at step {state.global_step + 1} of {state.max_steps}, so training "
            f"stopped; {where}. Start over with --force and a lower --learning-rate than "
            f"{args.learning_rate:g}"
        )


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar on standard error with the loss and the metric on the validation pairs.

    :param shown: False for no bar.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.bar: Any = None
        self.values: dict[str, str] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Show the bar, from the step of the checkpoint that training goes on from."""
        self.bar = progress_bar(
            desc="Training",
            unit="step",
            total=state.max_steps,
            initial=state.global_step,
            disable=not self.shown,
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Show the newest loss and metric."""
        names = {"loss": "loss", f"eval_{HeldOut.KEY}": "validation"}
        self.values |= {names[k]: f"{v:.4f}" for k, v in (logs or {}).items() if k in names}
        if self.bar is not None:
            self.bar.set_postfix(self.values)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Close the bar."""
        self.bar.close()
