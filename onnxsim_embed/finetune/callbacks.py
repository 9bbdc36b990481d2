"""Beside the trainer's steps: its checkpoints, a check for non-finite gradients, a progress bar."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from onnxsim_embed.errors import TrainingError


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the last complete checkpoint, which the trainer's own search may not be.

    The trainer writes trainer_state.json last; after a kill it may be missing or cut short.
    """
    complete = []
    for path in directory.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            continue
    return max(complete)[1] if complete else None


class FiniteGradients(TrainerCallback):  # type: ignore[misc]
    """Stops before a gradient that is not finite reaches the weights.

    :param checkpoints: directory of the checkpoints, for the message.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        model: torch.nn.Module,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Check the gradients; after clipping, one NaN is in all of them."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if all(math.isfinite(float(gradient.sum())) for gradient in gradients):
            return
        checkpoint = newest_checkpoint(self.checkpoints)
        raise TrainingError(
            f"the loss is not finite at step {state.global_step + 1} of {state.max_steps}, so training "
            f"stopped; the last good checkpoint: {checkpoint or 'none was written yet'}. Start over with "
            f"force=True and a lower learning_rate than {args.learning_rate:g}"
        )


class ProgressBar(ProgressCallback):  # type: ignore[misc]
    """The trainer's bar, with the newest loss and validation metric behind it, not in lines of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Show the newest loss and metric."""
        for key, value in (logs or {}).items():
            if key == "loss" or key == f"eval_{args.metric_for_best_model.removeprefix('eval_')}":
                self.values[key.removeprefix("eval_")] = f"{value:.4f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.values)
