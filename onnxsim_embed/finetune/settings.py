"""Settings of a fine-tuning job."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; see `onnxsim_embed.finetune.finetune`."""

    epochs: float = 1
    batch_size: int = 64
    learning_rate: float = 2e-5
    hard_negatives: int = 0
    share: float = 0.2
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        minimum = {"batch_size": 2, "hard_negatives": 0, "patience": 1, "seed": 0}
        for name, lowest in minimum.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.seed >= 1 << 32:  # the limit of numpy's generator
            raise ValueError(f"seed must be less than 2**32, got {self.seed}")
        if not 0 < self.share <= 0.5:
            raise ValueError(f"held_out must be above 0 and at most 0.5, got {self.share!r}")
