"""Which parts of an int8 encoder are computed in float32: what gains most per microsecond.

The input of one or more linears may leave its largest channels, or its linears, in float32. What each
gains is measured where users see it, in the loss (1 - cosine) of the final vectors of texts that were not
used for calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxsim_embed.export.encoder import Linear
from onnxsim_embed.export.fidelity import row_cosines
from onnxsim_embed.export.quantization.calibration import Activations, TokenIds
from onnxsim_embed.export.quantization.ranges import ChannelSplit, Fit
from onnxsim_embed.runtime.pooling import Head
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.threads import map_chunks

# Numbers of float channels tried; most layers have two to four outliers, some a dozen.
CHANNEL_COUNTS = (0, 4, 8, 16)

# Cost in int8 multiply-adds, measured in MiniLM-L6 on a Zen 4 core at 15 and 92 tokens: a float product of
# k channels costs FLOAT_PRODUCT + FLOAT_CHANNEL k for each output, a multiply-add of a float32 linear
# FLOAT_LINEAR more than an int8 one, and a split channel SPLIT_CHANNEL for each output, as the linear
# before the activation computes it too.
FLOAT_PRODUCT, FLOAT_CHANNEL, FLOAT_LINEAR, SPLIT_CHANNEL = 32.0, 5.0, 1.6, 1.5

# One in HELD_OUT_STEP calibration texts is for the search, and no more of it than this: short texts lose
# most, and the search runs them again and again.
HELD_OUT_STEP, HELD_OUT_TOKENS = 6, 64

# Inputs of one layer of a transformer: those of query, key and value, of output, up and down.
LAYER_INPUTS = 4
BLOCKS, FITTING_ROUNDS = 4, 20


def channel_counts(weights: Sequence[Float32]) -> list[int]:
    """Return the numbers of float channels to try for linears of these weights."""
    return [count for count in CHANNEL_COUNTS if count <= len(weights[0]) // 16]


@dataclass(frozen=True)
class Group:
    """The linears that share an input, the activations of it, and ways to quantize it.

    :param fits: the first without float channels.
    """

    linears: tuple[Linear, ...]
    seen: Activations
    fits: tuple[Fit, ...]

    @property
    def size(self) -> int:
        """Multiply-adds a token."""
        return sum(linear.weight.size for linear in self.linears)

    def cost(self, fit: Fit | None) -> float:
        """Return the additional cost of a fit, or None for float32 linears, in int8 multiply-adds."""
        if fit is None:
            return FLOAT_LINEAR * self.size
        count, each = len(fit.float_channels), 0.0
        if count:
            each = FLOAT_PRODUCT + FLOAT_CHANNEL * count
        if isinstance(fit, ChannelSplit):
            each += SPLIT_CHANNEL * (len(fit.columns) + fit.padding[1])
        return each * sum(linear.weight.shape[1] for linear in self.linears)


Choice = Mapping[str, Fit | None]


def hold_out(
    token_ids: TokenIds,
) -> tuple[list[Int64], list[Int64]]:
    """Split calibration texts into those for ranges, and the beginnings of some for the search."""
    held = [ids[:HELD_OUT_TOKENS] for ids in token_ids[::HELD_OUT_STEP] if len(ids)]
    rest = [ids for row, ids in enumerate(token_ids) if row % HELD_OUT_STEP]
    return rest, held


def held_out_loss(file: Path, token_ids: TokenIds, head: Head) -> Callable[[Path], float]:
    """Return a function from an ONNX file to the mean of 1 - cosine of its vectors to those of `file`."""

    def vectors(path: Path) -> Float32:
        session = Session(path, "cpu")
        return np.concatenate(list(map_chunks(lambda ids: head(session.run(ids[None])), token_ids)))

    reference = vectors(file)
    return lambda path: 1 - float(row_cosines(reference, vectors(path)).mean())


@dataclass(frozen=True)
class Search:
    """The search for one encoder.

    :param groups: by the name of their input, in the order of the encoder.
    :param loss: from the fit of each input, or None for float32 linears, to the loss.
    """

    groups: Mapping[str, Group]
    loss: Callable[[Choice], float]

    @cached_property
    def plain(self) -> Choice:
        """The choice without anything in float32."""
        return {name: group.fits[0] for name, group in self.groups.items()}

    @cached_property
    def plain_loss(self) -> float:
        """The loss of the plain choice."""
        return self.loss(self.plain)

    @cached_property
    def contributions(self) -> dict[str, float]:
        """The part of the plain choice's loss that each input contributes.

        Measured for BLOCKS of layers and for each position in a layer by computing them in float32;
        between them the local errors decide, scaled so that rows and columns have the measured sums
        (iterative proportional fitting). A few runs instead of one for each input.
        """
        names = list(self.groups)

        def without(part: Sequence[str]) -> float:
            return max(self.plain_loss - self.loss({**self.plain, **dict.fromkeys(part)}), 0.0)

        block = LAYER_INPUTS * -(-len(names) // (LAYER_INPUTS * BLOCKS))
        layers = [names[i : i + block] for i in range(0, len(names), block)]
        kinds = [names[i::LAYER_INPUTS] for i in range(min(LAYER_INPUTS, len(names)))]
        parts = [(part, without(part)) for part in (layers + kinds if len(layers) > 1 else kinds)]
        result = {name: group.fits[0].error for name, group in self.groups.items()}
        for part, measured in parts * FITTING_ROUNDS:
            factor = measured / max(sum(result[name] for name in part), 1e-30)
            result |= {name: factor * result[name] for name in part}
        return result

    def choose(self, effort: float, linears: bool = False) -> Choice:
        """Return the choice for a budget of additional time, the best gain for its cost first.

        :param effort: share of the time that an encoder without float32 parts takes.
        :param linears: whether whole linears may be float32.
        """
        choice = dict(self.plain)
        left = effort * sum(group.size for group in self.groups.values())
        left -= sum(self.groups[name].cost(fit) for name, fit in choice.items())
        while True:
            steps = [
                (self._gain(name, choice[name], fit) / cost, cost, name, fit)
                for name, group in self.groups.items()
                for fit in (*group.fits, *([None] if linears else []))
                if choice[name] is not None
                and 0 < (cost := group.cost(fit) - group.cost(choice[name])) <= left
            ]
            rate, cost, name, fit = max(steps, key=lambda step: step[0], default=(0, 0, "", None))
            if rate <= 0:
                return choice
            choice[name], left = fit, left - cost

    def _gain(self, name: str, now: Fit | None, then: Fit | None) -> float:
        """Return how much less an input contributes to the loss with another fit."""
        before, after = (0.0 if fit is None else fit.error for fit in (now, then))
        return (
            self.contributions[name]
            * (before - after)
            / max(self.groups[name].fits[0].error, 1e-30)
        )

    def describe(self, choice: Choice) -> dict[str, float]:
        """Return what the manifest records of the search."""
        return {
            "additional_time": round(self.share(choice), 4),
            "held_out_loss_without": round(self.plain_loss, 7),
        }

    def share(self, choice: Choice) -> float:
        """Return the additional time of a choice, relative to the encoder without float32 parts."""
        cost = sum(self.groups[name].cost(fit) for name, fit in choice.items())
        return cost / sum(group.size for group in self.groups.values())
