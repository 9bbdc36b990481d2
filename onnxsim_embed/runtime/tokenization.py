"""Texts -> ragged token ids. The only importer of `tokenizers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.system.threads import limit_rayon_threads

# Of a very long text so many characters a token are read at first; few languages need more.
CHARACTERS_PER_TOKEN = 16

# The end of a beginning may cut a special token such as [MASK] in two, so that its last few tokens
# are not the text's own; so many must be left over.
SPARE_TOKENS = 32


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

    def pad(
        self, rows: npt.NDArray[np.int64], pad_token_id: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return ids and attention mask of rows, int64 (rows, tokens), padded on the right.

        The width is that of the longest row, rounded up to a multiple of 8.
        """
        counts = self.counts[rows]
        places = np.arange(-(-int(counts.max()) // 8) * 8)
        real = places < counts[:, None]
        ids = np.full(real.shape, pad_token_id, np.int64)
        ids[real] = self.ids[(self.offsets[rows][:, None] + places)[real]]
        return ids, real.astype(np.int64)


def as_list(texts: str | Iterable[str]) -> list[str]:
    """Return one text or an iterable of texts as a list; raises as `check_iterable`."""
    if isinstance(texts, str):
        return [texts]
    check_iterable(texts)
    return list(texts)


def check_iterable(texts: object) -> None:
    """Raise TypeError unless the argument is an ordered iterable of texts, naming what to pass."""
    shape = getattr(texts, "shape", None)
    if isinstance(texts, str):
        advice = "pass a list of texts"
    elif isinstance(texts, (bytes, bytearray, memoryview)):
        advice = "decode it, for example with .decode('utf-8')"
    elif isinstance(texts, Mapping):
        advice = "pass its texts, for example list(mapping.values())"
    elif isinstance(texts, (set, frozenset)):
        advice = "a set has no order; pass a list, for example sorted(texts)"
    elif isinstance(shape, tuple) and len(shape) != 1:
        advice = f"its shape is {tuple(shape)}; pass one column of texts, for example table['text']"
    elif not isinstance(texts, Iterable):
        advice = "pass a text or a list of texts"
    else:
        return
    raise TypeError(f"expected an iterable of texts, got {type(texts).__name__}: {advice}")


def check_texts(texts: Sequence[object], first_row: int = 0) -> None:
    """Raise TypeError naming the first row that is not a string.

    :param texts: the texts to check.
    :param first_row: row number of the first text, for the message.
    """
    for row, text in enumerate(texts, start=first_row):
        if not isinstance(text, str):
            if isinstance(text, (bytes, bytearray)):
                advice = "decode it, for example with .decode('utf-8')"
            elif isinstance(text, Mapping):
                advice = "pass its text, for example row['text']"
            elif isinstance(text, Iterable):
                advice = "pass one flat list of texts"
            elif repr(text) in ("None", "nan", "<NA>", "NaT"):
                advice = "drop such rows or replace them by ''"
            else:
                advice = "convert it with str() if it is meant as a text"
            raise TypeError(
                f"text {row} is {type(text).__name__} ({text!r:.60}), not a string; {advice}"
            )


class Tokenizer:
    """A model's tokenizer with the model's own maximum length and no padding.

    What `tokenizer.json` has baked in for either is ignored: published files hold stale values.

    :param path: a `tokenizer.json`.
    :param max_seq_length: tokens kept of a text, special tokens included.
    :param do_lower_case: whether texts are lower-cased first (beyond what tokenizer.json does).
    :param pad_token_id: id for places beyond a text's end.
    :raises ArtifactError: if the file cannot be read as a tokenizer.
    """

    def __init__(
        self,
        path: Path,
        max_seq_length: int,
        do_lower_case: bool = False,
        pad_token_id: int = 0,
    ) -> None:
        limit_rayon_threads()
        try:
            self._backend = BackendTokenizer.from_file(str(path))
        except BaseException as error:
            raise _named(error, f"{path} is not a readable tokenizer") from error
        self._path = path
        self._backend.no_padding()
        self._do_lower_case = do_lower_case
        self._boundary = _boundary(self._backend)
        self.pad_token_id = pad_token_id
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
        encodings = self._encode_beginnings(texts, first_row)
        counts = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
        offsets = np.zeros(len(encodings) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, int(offsets[-1]))
        truncated = np.fromiter((_is_cut(e) for e in encodings), np.bool_, len(encodings))
        return Tokens(ids, offsets, truncated)

    def _encode_beginnings(self, texts: Sequence[str], first_row: int) -> list[Encoding]:
        """Encode as much of each text as fills the model.

        The library tokenizes a whole text before it cuts the tokens, at some 500 bytes of memory for
        each character. Where words are split before anything else, the beginning of a text up to the
        end of a word has the tokens of the whole text's beginning; if those are more than enough, the
        rest changes nothing.
        """
        most = CHARACTERS_PER_TOKEN * self._max_seq_length
        ends = {
            row: self._word_end(text, most)
            for row, text in enumerate(texts)
            if self._boundary is not None and len(text) > 2 * most
        }
        encodings = self._encode(
            [text[: ends[row]] if row in ends else text for row, text in enumerate(texts)]
            if ends
            else texts,
            texts,
            first_row,
        )
        while left := {
            row: self._word_end(texts[row], 4 * end)
            for row, end in ends.items()
            if end < len(texts[row]) and _tokens_beyond(encodings[row]) < SPARE_TOKENS
        }:
            again = self._encode([texts[row][:end] for row, end in left.items()], texts, first_row)
            for row, encoding in zip(left, again, strict=True):
                encodings[row] = encoding
            ends = left
        return encodings

    def _word_end(self, text: str, start: int) -> int:
        """Return where the first word boundary at or after `start` is, or the text's length."""
        found = self._boundary.search(text, start) if self._boundary else None
        return len(text) if found is None else found.start()

    def _encode(
        self, beginnings: Sequence[str], texts: Sequence[str], first_row: int
    ) -> list[Encoding]:
        if self._do_lower_case:
            beginnings = [text.lower() for text in beginnings]
        try:
            if len(beginnings) == 1:  # a batch would wake the library's threads
                return [self._backend.encode(beginnings[0])]
            return list(self._backend.encode_batch_fast(list(beginnings)))
        except TypeError:
            name_invalid_text(texts, first_row)
            raise
        except BaseException as error:
            raise _named(error, f"{self._path} is damaged: it cannot encode a text") from error


def _named(error: BaseException, what: str) -> BaseException:
    """Return what to raise in place of an error of the library: bare Exception, or a panic, which is none."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ArtifactError(f"{what}: {error}")
    return error


def _is_cut(encoding: Encoding) -> bool:
    return bool(encoding.overflowing)


def _tokens_beyond(encoding: Encoding) -> int:
    return sum(map(len, encoding.overflowing))


def _boundary(backend: BackendTokenizer) -> re.Pattern[str] | None:
    """Return what ends a word whatever comes after it, or None where that is not known.

    BERT's tokenizers change characters one by one, then split at white space, and set every
    punctuation character (and, where they are told to, every Chinese one) apart.
    """
    normalizer = backend.normalizer
    if not isinstance(backend.pre_tokenizer, BertPreTokenizer) or not isinstance(
        normalizer, BertNormalizer
    ):
        return None
    chinese = "\u3400-\u4dbf\u4e00-\u9fff" if normalizer.handle_chinese_chars else ""
    return re.compile(rf"[ \n!-/:-@\[-`{{-~{chinese}]")


def name_invalid_text(texts: Sequence[str], first_row: int) -> None:
    """Raise ValueError naming the first text that is not valid Unicode; for arguments see `check_texts`."""
    for row, text in enumerate(texts, start=first_row):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {row} is not valid Unicode: lone surrogate "
                f"U+{ord(text[error.start]):04X} at character {error.start}; "
                "repair it with text.encode('utf-8', 'replace').decode()"
            ) from None
