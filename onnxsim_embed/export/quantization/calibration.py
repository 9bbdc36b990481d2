"""Calibration: ranges and a sample of the inputs of a model's linear layers over real texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.encoder import Encoder
from onnxsim_embed.export.fidelity import bundled_texts
from onnxsim_embed.export.onnx.builder import share_constants
from onnxsim_embed.export.onnx.encoder_graph import build_encoder
from onnxsim_embed.export.onnx.files import start_beside
from onnxsim_embed.runtime.batching import plan_batches
from onnxsim_embed.runtime.texts import check_texts
from onnxsim_embed.system.arrays import Float32, Int64
from onnxsim_embed.system.memory import release_memory
from onnxsim_embed.system.threads import map_chunks

TokenIds = Sequence[Int64]

# Sampled tokens stay in memory for every layer at once: at most this many bytes, and no more rows
# than tell two candidates apart.
SAMPLE_BYTES = 768 << 20
SAMPLE_ROWS = 3072

# Share of tokens at either end of a channel that a range excludes; a sample of fewer than twice its
# inverse is too small to tell, and its extremes count. On unseen texts a thousandth was never worse
# than the extremes and better for very short ones; five thousandths were worse, and so were extremes
# narrowed by 5 or widened by 10 %.
OUTERMOST = 0.001

# Tokens of one run, whose outputs are the inner values of every layer.
CALIBRATION_TOKENS = 256

# Fewer distinct texts say too little about ranges.
MIN_TEXTS = 16


@dataclass(frozen=True)
class Activations:
    """One value of an ONNX graph over the calibration texts."""

    low: Float32  # (channels,), minimum
    high: Float32  # (channels,), maximum
    rows: Float32  # (tokens, channels), a sample

    @cached_property
    def ends(self) -> tuple[Float32, Float32]:
        """The lowest and highest value of each channel that a range must hold."""
        rows = len(self.rows)
        if rows < 2 / OUTERMOST:
            return self.low, self.high
        outside = round(OUTERMOST * rows)
        ordered = np.partition(self.rows, [outside, rows - 1 - outside], axis=0)
        return ordered[outside].copy(), ordered[rows - 1 - outside].copy()


def calibration_texts() -> list[str]:
    """Return the calibration texts that ship with the package."""
    return bundled_texts("calibration.jsonl")


def check_calibration(texts: Sequence[str]) -> None:
    """Raise ValueError for too few distinct texts, TypeError for anything but a list of strings."""
    if isinstance(texts, str):
        raise TypeError("calibration must be a list of texts, got one text")
    check_texts(texts)
    if (distinct := len(set(texts))) < MIN_TEXTS:
        raise ValueError(
            f"calibration needs at least {MIN_TEXTS} distinct texts, got {distinct}; a few hundred like "
            "those to be embedded are best, or None for the package's own"
        )


def input_names(layer: int) -> tuple[str, str, str, str]:
    """Return the inputs of query, key and value, of output, of up, and of the activation before down."""
    first = "embeddings" if layer == 0 else f"layer{layer - 1}.norm"
    name = f"layer{layer}"
    return first, f"{name}.context", f"{name}.attention_norm", f"{name}.up"


def collect_activations(
    encoder: Encoder, token_ids: TokenIds, file: Path
) -> dict[str, Activations]:
    """Run the float32 encoder over texts, and record the inputs of its linears by `input_names`.

    :param file: the encoder's ONNX file, of which the weights are read.
    """
    names = [name for layer in range(len(encoder.layers)) for name in input_names(layer)]
    model = build_encoder(encoder, "run", expose=names)
    share_constants(model, file)
    session = start_beside(model, file)
    del model
    release_memory()
    dim = len(encoder.layers) * (3 * encoder.hidden + encoder.layers[0].up.weight.shape[1])

    def run(ids: Int64) -> dict[str, Float32]:
        return dict(zip(names, session.run(names, {"input_ids": ids}), strict=True))

    return observe(run, dim, token_ids)


def observe(
    run: Callable[[Int64], Mapping[str, Float32]], dim: int, token_ids: TokenIds
) -> dict[str, Activations]:
    """Run an encoder over texts and record some of its values: those that every run has.

    :param run: from input_ids (tokens, texts) to values by name, each (tokens, texts, channels).
    :param dim: channels of all values together.
    """
    token_ids = [ids for ids in token_ids if len(ids)]
    counts = np.array([len(ids) for ids in token_ids], np.int64)
    rows = min(SAMPLE_ROWS, max(256, SAMPLE_BYTES // (4 * dim)))
    # A vector is a mean over its text's tokens, so that a token of a short text weighs more; the ends
    # ([CLS], [SEP]) occur in every text and differ from the rest.
    per_text = max(1.0, rows / len(token_ids))
    # Of very many texts, only some contribute rows; all contribute their ranges.
    share = min(1.0, rows / (3 * len(token_ids)))
    rng, runs = np.random.default_rng(0), []
    for batch in plan_batches(counts, CALIBRATION_TOKENS):
        ids = np.stack([token_ids[row] for row in batch], axis=1)
        sampled = rng.random(ids.shape) < per_text / len(ids)
        sampled[0] = sampled[-1] = True
        if share < 1:
            sampled &= rng.random(len(batch)) < share
        runs.append((ids, sampled.ravel()))

    def record(run_of: tuple[Int64, npt.NDArray[np.bool_]]) -> dict[str, Any]:
        ids, sampled = run_of
        flat = {name: value.reshape(ids.size, -1) for name, value in run(ids).items()}
        return {k: (v.min(axis=0), v.max(axis=0), v[sampled]) for k, v in flat.items()}

    ends = np.cumsum([sampled.sum() for _, sampled in runs])
    seen: dict[str, Activations] = {}
    recorded = Counter[str]()
    for end, values in zip(ends.tolist(), map_chunks(record, runs), strict=True):
        recorded.update(values.keys())
        for name, (low, high, sample) in values.items():
            if name not in seen:  # where samples go at once: they are not in memory twice
                seen[name] = Activations(low, high, np.empty((ends[-1], len(low)), np.float32))
            np.minimum(seen[name].low, low, out=seen[name].low)
            np.maximum(seen[name].high, high, out=seen[name].high)
            seen[name].rows[end - len(sample) : end] = sample
    return {name: entry for name, entry in seen.items() if recorded[name] == len(runs)}
