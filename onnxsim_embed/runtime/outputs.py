"""What becomes of hidden states: one vector a text in the form asked for, or the tokens' own states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxsim_embed.runtime.pooling import Head
from onnxsim_embed.runtime.postprocess import SPREAD, OutputPrecision, finish_vectors

OutputValue = Literal["sentence_embedding", "token_embeddings"]
Hidden = npt.NDArray[np.float32]
Mask = npt.NDArray[np.int64] | None


class Output(NamedTuple):
    """What becomes of hidden states.

    :param finish: maps hidden, float32 (batch, tokens, hidden), and its mask to one result a row.
    :param shape: shape of one text's result.
    :param dtype: number format of the results.
    """

    finish: Callable[[Hidden, Mask], npt.NDArray[Any]]
    shape: tuple[int, ...]
    dtype: npt.DTypeLike


def make_output(
    head: Head,
    width: int,
    value: OutputValue,
    precision: OutputPrecision,
    ranges: npt.ArrayLike | None,
    normalizes: bool | None,
    truncate_dim: int | None,
) -> Output:
    """Say what becomes of hidden states, after checking the arguments; for them see `Embedder.encode`.

    :param head: the model's own pooling.
    :param width: width of its vectors.
    :raises ValueError: for a value, precision, width or ranges that cannot be.
    """
    if truncate_dim is not None and not 0 < truncate_dim <= width:
        raise ValueError(f"truncate_dim must be from 1 to {width}, got {truncate_dim}")
    if value == "token_embeddings":
        return Output(_token_vectors, (), object)
    if value != "sentence_embedding":
        raise ValueError(
            f"output_value {value!r} is not one of sentence_embedding, token_embeddings"
        )
    width = truncate_dim or width
    limits = None if ranges is None else np.asarray(ranges, np.float32)
    if precision in SPREAD and limits is None:
        raise ValueError(
            f"a stream of {precision} needs ranges, an array (2, {width}) of the smallest and largest "
            "value of each component in a representative set"
        )

    def finish(hidden: Hidden, mask: Mask) -> npt.NDArray[Any]:
        return finish_vectors(
            head(hidden, mask), precision, limits, truncate_dim=truncate_dim, normalizes=normalizes
        )

    # Formatting no rows says the shape and type of a row, and checks precision and ranges.
    sample = finish_vectors(np.zeros((0, width), np.float32), precision, limits)
    return Output(finish, sample.shape[1:], sample.dtype)


def _token_vectors(hidden: Hidden, mask: Mask) -> npt.NDArray[Any]:
    """Return an object array (batch,) of float32 arrays (tokens, hidden), without padding."""
    rows = np.empty(len(hidden), object)
    for row, states in enumerate(hidden):
        rows[row] = np.array(states if mask is None else states[mask[row] == 1])
    return rows
