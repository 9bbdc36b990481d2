"""Texts -> ragged token ids. The only importer of `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as BackendTokenizer

from onnxsim_embed.errors import ArtifactError


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, one after the other.

    :param ids: int64 array (total,), the ids of all texts, special tokens included.
    :param offsets: int64 array (n + 1,); text i holds ids[offsets[i]:offsets[i + 1]].
    :param truncated: bool array (n,), whether text i was longer than the model takes.
    """

    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Tokens of each text, int64 array (n,)."""
        return np.diff(self.offsets)

    def stack(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the ids of rows of equal token count as an int64 array (rows, tokens)."""
        count = int(self.offsets[rows[0] + 1] - self.offsets[rows[0]])
        return self.ids[self.offsets[rows][:, None] + np.arange(count)]


def check_texts(texts: Sequence[object], first_row: int = 0) -> None:
    """Raise TypeError naming the first row that is not a string.

    :param texts: what should be strings.
    :param first_row: number of the first text in the caller's own count.
    """
    for row, text in enumerate(texts, start=first_row):
        if not isinstance(text, str):
            raise TypeError(
                f"text {row} is {type(text).__name__} ({text!r:.60}), not a string; "
                "drop such rows or replace them by ''"
            )


class Tokenizer:
    """A model's tokenizer with the model's own maximum length and no padding.

    What `tokenizer.json` has baked in for either is ignored: published files hold stale values.

    :param path: a `tokenizer.json`.
    :param max_seq_length: tokens kept of a text, special tokens included.
    :param do_lower_case: whether texts are lower-cased first (beyond what tokenizer.json does).
    :raises ArtifactError: if the file cannot be read as a tokenizer.
    """

    def __init__(self, path: Path, max_seq_length: int, do_lower_case: bool = False) -> None:
        try:
            self._backend = BackendTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path} is not a readable tokenizer: {error}") from error
        self._backend.no_padding()
        self._do_lower_case = do_lower_case
        self.max_seq_length = max_seq_length

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a text, special tokens included."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        special = self._backend.num_special_tokens_to_add(False)
        if not isinstance(value, Integral) or value <= special:
            raise ValueError(f"max_seq_length must be an integer above {special}, got {value!r}")
        self._max_seq_length: int = int(value)
        self._backend.enable_truncation(max_length=self._max_seq_length)

    def __call__(self, texts: Sequence[str], first_row: int = 0) -> Tokens:
        """Tokenize texts.

        :param texts: strings; an empty one is a text like any other.
        :param first_row: number of the first text in the caller's own count, for messages.
        :returns: the ids of all texts.
        :raises TypeError: naming the row, if one is not a string.
        :raises ValueError: naming the row, if one is not valid Unicode (a lone surrogate).
        """
        check_texts(texts, first_row)
        if self._do_lower_case:
            texts = [text.lower() for text in texts]
        try:
            encodings = self._backend.encode_batch_fast(list(texts))
        except TypeError:
            _name_invalid_text(texts, first_row)
            raise
        counts = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
        offsets = np.zeros(len(encodings) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, int(offsets[-1]))
        # Only a text that fills the model can have been cut.
        truncated = np.fromiter(
            (len(e) == self._max_seq_length and bool(e.overflowing) for e in encodings),
            np.bool_,
            len(encodings),
        )
        return Tokens(ids, offsets, truncated)


def _name_invalid_text(texts: Sequence[str], first_row: int) -> None:
    for row, text in enumerate(texts, start=first_row):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {row} is not valid Unicode: lone surrogate "
                f"U+{ord(text[error.start]):04X} at character {error.start}; "
                "repair it with text.encode('utf-8', 'replace').decode()"
            ) from None
