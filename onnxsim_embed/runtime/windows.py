"""Texts longer than the model: windows of their tokens, and the mean of the windows' vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onnxsim_embed.runtime.pooling import normalize
from onnxsim_embed.runtime.tokenization import Tokenizer, Tokens
from onnxsim_embed.system.arrays import Float32, Int64

# Where a window ends if its second half has such a place: after a sentence or line, else after a word.
SENTENCE = "[.!?\u2026]+[\"'\u201d\u2019)\\]]*(?=\\s)|[\u3002\uff01\uff1f]|\\n"
BOUNDARIES = (re.compile(SENTENCE), re.compile(r"\S(?=\s)"))


class Windows(NamedTuple):
    """Which rows of tokens are the windows of which text.

    :param starts: int64 array (texts + 1,); the windows of text i are rows starts[i] to starts[i + 1].
    :param weights: int64 array (windows,), the weight of each in the mean of its text.
    """

    starts: Int64
    weights: Int64

    def mean(self, vectors: Float32, normalizes: bool) -> Float32:
        """Return the weighted mean of each text's windows, float32 (texts, dim).

        The vector of a text of one window is that of the window, bit for bit.

        :param vectors: float32 array (windows, dim).
        """
        means = vectors[self.starts[:-1]]
        several = np.flatnonzero(np.diff(self.starts) > 1)
        for text in several:  # one by one: a mean must not depend on the other texts
            rows = slice(self.starts[text], self.starts[text + 1])
            means[text] = np.average(vectors[rows], axis=0, weights=self.weights[rows])
        if normalizes:
            means[several] = normalize(means[several])
        return means


class WindowSplitter:
    """Splits the tokens of texts that exceed the model's maximum length into windows that share `stride` tokens.

    Each window has the model's special tokens and those of the prompt.

    :raises ValueError: if the prompt leaves no room for texts, or the stride exceeds half a window.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, stride: int) -> None:
        self._tokenizer, self._stride = tokenizer, stride
        self._before, self._after = tokenizer.special_ids()
        prompt_tokens = tokenizer.prompt_tokens(prompt) - len(self._before) if prompt else 0
        self._prompt_tokens = prompt_tokens
        special = len(self._before) + len(self._after)
        self._size = tokenizer.max_seq_length - special - prompt_tokens
        if self._size < 1:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens, and max_seq_length is "
                f"{tokenizer.max_seq_length}: none is left for the text; pass a shorter prompt"
            )
        if stride > self._size // 2:
            raise ValueError(
                f"stride must be from 0 to {self._size // 2}, half of the tokens of a window, "
                f"got {stride}"
            )

    def __call__(self, texts: Sequence[str], tokens: Tokens) -> tuple[Tokens, Windows | None]:
        """Return truncated tokens with a row for each window; no Windows if no text was truncated."""
        if not tokens.truncated.any():
            return tokens, None
        rows: list[Sequence[int]] = []
        counts, weights = [], []
        for row, ids in enumerate(np.split(tokens.ids, tokens.offsets[1:-1])):
            spans = [(0, 0)]
            if tokens.truncated[row]:
                content, ends = self._tokenizer.content(texts[row])
                prompt, content = np.split(content, [self._prompt_tokens])
                spans = cut_windows(texts[row], ends[len(prompt) :], self._size, self._stride)
                before = [*self._before, *prompt]
                rows += [[*before, *content[a:b], *self._after] for a, b in spans]
            else:
                rows.append(ids.tolist())
            counts.append(len(spans))
            weights += [stop - start for start, stop in spans]
        offsets = np.cumsum([0, *map(len, rows)])
        windows = Tokens(np.concatenate(rows).astype(np.int64), offsets, np.zeros(len(rows), int))
        return windows, Windows(np.cumsum([0, *counts]), np.array(weights))


def cut_windows(text: str, ends: Int64, size: int, stride: int) -> list[tuple[int, int]]:
    """Return the first and last token (exclusive) of each window of a text.

    :param ends: int64 array (tokens,), where each token ends in the text.
    :param size: maximum number of tokens of a window.
    """
    ends = np.maximum.accumulate(ends)
    levels = []
    for pattern in BOUNDARIES:
        places = [match.end() for match in pattern.finditer(text)]
        levels.append(np.unique(np.concatenate([[0], np.searchsorted(ends, places, "right")])))
    spans, start = [], 0
    while len(ends) - start > size:
        stop = start + size
        for cuts in levels:
            last = int(cuts[np.searchsorted(cuts, stop, "right") - 1])
            if last > start + size // 2:
                stop = last
                break
        spans.append((start, stop))
        start = stop - stride
    return [*spans, (start, len(ends))]
