"""Settings of a fine-tuning job."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxsim_embed.system.units import check_integer


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
        for name, least in {"batch_size": 2, "hard_negatives": 0, "patience": 1}.items():
            check_integer(name, getattr(self, name), least)
        check_integer("seed", self.seed, 0, (1 << 32) - 1, "the limit of numpy's generator")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not 0 < self.share <= 0.5:
            raise ValueError(f"held_out must be above 0 and at most 0.5, got {self.share!r}")
