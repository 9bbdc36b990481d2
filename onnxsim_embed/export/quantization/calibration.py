"""What the inputs of a model's linear layers look like on real text: ranges, and a sample of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxsim_embed.export.bert import Bert
from onnxsim_embed.export.fidelity import bundled_texts
from onnxsim_embed.export.onnx.bert_graph import build_encoder
from onnxsim_embed.runtime.batching import plan_batches
from onnxsim_embed.runtime.tokenization import check_texts
from onnxsim_embed.system.onnx_session import onnxruntime

Float32 = npt.NDArray[np.float32]

# Sampled tokens are kept in memory for every layer at once: at most so many bytes, and no more rows
# than tell two candidates apart.
SAMPLE_BYTES = 768 << 20
SAMPLE_ROWS = 3072

# Outputs of one run: every layer's inner values for about so many tokens.
CALIBRATION_TOKENS = 256


@dataclass(frozen=True)
class Activations:
    """One value of the graph over the calibration texts.

    :param low: float32 array (channels,), smallest value seen.
    :param high: float32 array (channels,), largest value seen.
    :param rows: float32 array (tokens, channels), values of a sample of tokens.
    """

    low: Float32
    high: Float32
    rows: Float32


# Fewer different texts say too little about ranges.
LEAST_TEXTS = 16


def calibration_texts() -> list[str]:
    """Return the calibration texts that ship with the package."""
    return bundled_texts("calibration.jsonl")


def check_calibration(texts: Sequence[str]) -> None:
    """Refuse texts that cannot serve for calibration.

    :raises ValueError: if there are too few different ones.
    :raises TypeError: naming the row that is not a string.
    """
    if isinstance(texts, str):
        raise TypeError("calibration takes a list of texts, got one text")
    check_texts(texts)
    if (different := len(set(texts))) < LEAST_TEXTS:
        raise ValueError(
            f"calibration needs at least {LEAST_TEXTS} different texts, got {different}; a few hundred "
            "like those to be embedded are best, or leave it out to use the package's own"
        )


def input_names(layer: int) -> tuple[str, str, str, str]:
    """Name the values that layer number `layer` feeds to its linears.

    :returns: input of query, key and value; of output; of up; and what the activation before down
        takes.
    """
    first = "embeddings.norm" if layer == 0 else f"layer{layer - 1}.norm"
    name = f"layer{layer}"
    return first, f"{name}.context", f"{name}.attention_norm", f"{name}.up"


def collect_activations(
    bert: Bert, token_ids: Sequence[npt.NDArray[np.int64]]
) -> dict[str, Activations]:
    """Run the float32 encoder over texts and keep what its linears see.

    :param bert: the encoder, float32.
    :param token_ids: int64 arrays (tokens,), one a text, special tokens included.
    :returns: for each name of `input_names`, of every layer.
    """
    names = [name for layer in range(len(bert.layers)) for name in input_names(layer)]
    model = build_encoder(bert, "run", expose=names)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    width = len(bert.layers) * (3 * bert.hidden + bert.layers[0].up.weight.shape[1])

    def run(ids: npt.NDArray[np.int64]) -> list[Float32]:
        values: list[Float32] = session.run(names, {"input_ids": ids})
        return values

    return observe(run, names, width, token_ids)


def observe(
    run: Callable[[npt.NDArray[np.int64]], Sequence[Float32]],
    names: Sequence[str],
    width: int,
    token_ids: Sequence[npt.NDArray[np.int64]],
) -> dict[str, Activations]:
    """Run an encoder over texts and keep what some of its values are.

    :param run: from input_ids (tokens, texts) to the values, each (tokens, texts, channels).
    :param names: of the values.
    :param width: channels of all values together.
    """
    counts = np.array([len(ids) for ids in token_ids], np.int64)
    rows = min(SAMPLE_ROWS, max(256, SAMPLE_BYTES // (4 * width)))
    # A vector is a mean over its text's tokens, so that a token weighs as much as its text is short;
    # the ends ([CLS], [SEP]) are of every text and unlike the rest.
    each = max(1.0, rows / len(token_ids))
    # Of very many texts, only some give rows; all give their ranges.
    share = min(1.0, rows / (3 * len(token_ids)))
    seen: dict[str, list[Activations]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    for batch in plan_batches(counts, CALIBRATION_TOKENS):
        ids = np.stack([token_ids[row] for row in batch], axis=1)
        values = run(ids)
        chosen = rng.random(ids.shape) < each / len(ids)
        chosen[0] = chosen[-1] = True
        if share < 1:
            chosen &= rng.random(len(batch)) < share
        picked = np.flatnonzero(chosen)
        for name, value in zip(names, values, strict=True):
            flat = value.reshape(ids.size, -1)
            seen[name].append(Activations(flat.min(axis=0), flat.max(axis=0), flat[picked]))
    return {
        name: Activations(
            np.min([part.low for part in parts], axis=0),
            np.max([part.high for part in parts], axis=0),
            np.concatenate([part.rows for part in parts]),
        )
        for name, parts in seen.items()
    }
