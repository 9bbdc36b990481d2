"""Texts -> ragged token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, normalizers
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.texts import check_texts, to_utf8
from onnxsim_embed.system.arrays import Int64
from onnxsim_embed.system.threads import limit_rayon_threads

# Characters per token that are read of a very long text at first; few languages need more.
CHARACTERS_PER_TOKEN = 16

# Characters of a long text that are tokenized together, of which each takes some 500 bytes of memory.
PIECE = 1 << 16

# A prefix of a text may end inside a special token such as [MASK], so that its last few tokens are
# wrong. It must have this number of tokens beyond those that are kept.
SPARE_TOKENS = 32

SPACE = re.compile(r"[ \n]")


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts in compressed rows.

    :param ids: int64 array (total,), the ids of all texts, special tokens included.
    :param offsets: int64 array (n + 1,); the ids of text i are ids[offsets[i]:offsets[i + 1]].
    :param lost: int64 array (n,), tokens of text i beyond the model's maximum length; estimated from
        the characters if only a prefix of the text was tokenized.
    """

    ids: Int64
    offsets: Int64
    lost: Int64

    @property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Whether each text exceeds the model's maximum length, bool array (n,)."""
        return self.lost > 0

    @property
    def counts(self) -> Int64:
        """Tokens of each text, int64 array (n,)."""
        return np.diff(self.offsets)

    def stack(self, rows: Int64) -> Int64:
        """Return the ids of rows of equal token count as an int64 array (rows, tokens)."""
        count = int(self.offsets[rows[0] + 1] - self.offsets[rows[0]])
        return self.ids[self.offsets[rows][:, None] + np.arange(count)]

    def pad(self, rows: Int64, pad_token_id: int) -> tuple[Int64, Int64]:
        """Return ids and attention mask of rows, int64 (rows, tokens), padded on the right.

        The number of columns is that of the longest row, rounded up to a multiple of 8.
        """
        counts = self.counts[rows]
        columns = np.arange(-(-int(counts.max()) // 8) * 8)
        real = columns < counts[:, None]
        ids = np.full(real.shape, pad_token_id, np.int64)
        ids[real] = self.ids[(self.offsets[rows][:, None] + columns)[real]]
        return ids, real.astype(np.int64)


class Tokenizer:
    """A model's tokenizer with the model's own maximum length and no padding.

    The length and padding that `tokenizer.json` holds are ignored: published files hold stale values.

    :param path: a `tokenizer.json`; its truncation direction applies.
    :param max_seq_length: maximum number of tokens per text, special tokens included.
    :param do_lower_case: whether to lowercase texts, except special tokens, before its own normalizer.
    :raises ArtifactError: if the file cannot be read as a tokenizer.
    """

    def __init__(
        self, path: Path, max_seq_length: int, do_lower_case: bool = False, pad_token_id: int = 0
    ) -> None:
        limit_rayon_threads()
        try:
            backend = BackendTokenizer.from_file(str(path))
        except BaseException as error:
            raise _artifact_error(error, f"{path} is not a readable tokenizer") from error
        backend.no_padding()
        self.direction = (backend.truncation or {}).get("direction", "right")
        self._boundary = _word_boundary(backend) if self.direction == "right" else None
        if do_lower_case:
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        self._path = path
        self._backend = backend
        # None in vocabularies that know every byte; a Unigram model does not name its unknown token.
        self._unknown = backend.token_to_id(getattr(backend.model, "unk_token", None) or "<unk>")
        special = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
        self._no_content = [*special, self._unknown, backend.token_to_id("\u2581")]  # a mere space
        self.pad_token_id = pad_token_id
        self.max_seq_length = max_seq_length

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens per text, special tokens included."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        special = self._backend.num_special_tokens_to_add(False)
        if not isinstance(value, Integral) or value <= special:
            raise ValueError(f"max_seq_length must be an integer above {special}, got {value!r}")
        self._max_seq_length: int = int(value)
        self._backend.enable_truncation(self._max_seq_length, direction=self.direction)

    def __call__(self, texts: Sequence[str], first_row: int = 0) -> Tokens:
        """Tokenize texts, of which messages count rows from `first_row`.

        :raises TypeError: naming the row, if one is not a string.
        :raises ValueError: naming the row, if one is not valid Unicode (a lone surrogate).
        """
        check_texts(texts, first_row)
        encodings, ends = self._encode_prefixes(texts, first_row)
        counts = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
        offsets = np.zeros(len(encodings) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, int(offsets[-1]))
        lost = np.zeros(len(encodings), np.int64)
        special = self._backend.num_special_tokens_to_add(False)
        for row, encoding in enumerate(encodings):
            if overflowing := encoding.overflowing:
                kept = len(encoding) - special
                read = kept + sum(len(part) - special for part in overflowing)
                characters = len(texts[row])
                lost[row] = round(read * characters / ends.get(row, characters)) - kept
        return Tokens(ids, offsets, lost)

    def content(self, text: str) -> tuple[Int64, Int64]:
        """Return all tokens of a text of any length, without special tokens.

        :returns: their ids and the character at which each ends, int64 arrays (tokens,).
        """
        ids, ends, start = [], [], 0
        while start < len(text):
            space = SPACE.search(text, start + PIECE) if self._boundary else None
            stop = len(text) if space is None else space.start()
            encoding = self._encode([text[start:stop]], [text], 0)[0]
            parts = [encoding, *encoding.overflowing]
            for part in parts if self.direction == "right" else reversed(parts):
                own = np.array(part.special_tokens_mask) == 0
                ids.append(np.array(part.ids)[own])
                ends.append(np.array(part.offsets)[own, 1] + start)
            start = stop
        return np.concatenate(ids), np.concatenate(ends)

    def special_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids of the special tokens before and after every text."""
        encoding = self._encode(["a"], ["a"], 0)[0]
        mask = encoding.special_tokens_mask
        return encoding.ids[: mask.index(0)], encoding.ids[len(mask) - mask[::-1].index(0) :]

    def from_ids(self, rows: Iterable[Sequence[int]]) -> Tokens:
        """Return tokens of ids that were tokenized elsewhere; see `Embedder.encode_tokens`."""
        before, after = self.special_ids()
        vocabulary, found = self._backend.get_vocab_size(), []
        for row, ids in enumerate(rows):
            array = np.array(ids)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                problem = "is not a list of token ids"
            elif array.min(initial=0) < 0 or array.max(initial=0) >= vocabulary:
                problem = (
                    f"has ids that are not from 0 to {vocabulary - 1}, this model's vocabulary"
                )
            elif len(array) > self._max_seq_length:
                problem = f"has {len(array)} token ids, the model takes {self._max_seq_length}"
            elif [*array[: len(before)], *array[len(array) - len(after) :]] != [*before, *after]:
                problem = (
                    f"lacks this model's special tokens, {before} before and {after} after the text"
                )
            else:
                found.append(array.astype(np.int64))
                continue
            raise ValueError(
                f"input {row} {problem}; pass token ids of this model (not those of another tokenizer), "
                "or the text"
            )
        offsets = np.cumsum([0, *map(len, found)])
        flat = np.concatenate(found) if found else np.zeros(0, np.int64)
        return Tokens(flat, offsets, np.zeros(len(found), np.int64))

    def prompt_tokens(self, prompt: str) -> int:
        """Return the number of tokens at the beginning of each text that are the prompt's.

        As in sentence-transformers: those of the prompt alone, without the special token at its end.
        """
        encoding = self._encode([prompt], [prompt], 0)[0]
        return len(encoding) - sum(encoding.special_tokens_mask[-1:])

    def unknown_only(self, tokens: Tokens, prompt: str = "", owners: Int64 | None = None) -> Int64:
        """Return the texts whose tokens after the prompt are all unknown to the vocabulary.

        :param owners: int64 array (n,), the text of each row; None if each row is a text.
        """
        unknown = tokens.ids == self._unknown
        if self._unknown is None or not unknown.any():
            return np.zeros(0, np.int64)
        ignored = [token for token in self._no_content if token is not None]
        known = ~np.isin(tokens.ids, ignored)
        owners = np.arange(len(tokens.lost)) if owners is None else owners
        of_prompt = np.count_nonzero(~np.isin(self([prompt]).ids, ignored)) if prompt else 0
        of_prompts = of_prompt * np.bincount(owners)
        texts = np.repeat(owners, tokens.counts)
        numbers = [
            np.bincount(texts[which], minlength=len(of_prompts)) for which in (unknown, known)
        ]
        return np.flatnonzero((numbers[0] > 0) & (numbers[1] <= of_prompts))

    def _encode_prefixes(
        self, texts: Sequence[str], first_row: int
    ) -> tuple[list[Encoding], dict[int, int]]:
        """Encode a prefix of each text that is long enough to fill the model.

        The library tokenizes a whole text before it truncates the tokens, with some 500 bytes of
        memory per character. If words are split before anything else, a prefix that ends at a word
        boundary has the first tokens of the whole text; if those are more than enough, the rest of
        the text changes nothing.

        :returns: an encoding of each text, and the ends of prefixes by row.
        """
        most = CHARACTERS_PER_TOKEN * self._max_seq_length
        ends = {
            row: self._word_end(text, most)
            for row, text in enumerate(texts)
            if self._boundary is not None and len(text) > 2 * most
        }
        prefixes = [text[: ends.get(row)] for row, text in enumerate(texts)] if ends else texts
        encodings = self._encode(prefixes, texts, first_row)
        while longer := {
            row: self._word_end(texts[row], 4 * end)
            for row, end in ends.items()
            if end < len(texts[row]) and sum(map(len, encodings[row].overflowing)) < SPARE_TOKENS
        }:
            again = self._encode(
                [texts[row][:end] for row, end in longer.items()], texts, first_row
            )
            for row, encoding in zip(longer, again, strict=True):
                encodings[row] = encoding
            ends |= longer
        return encodings, ends

    def _word_end(self, text: str, start: int) -> int:
        """Return the position of the first word boundary from `start` on, or the text's length."""
        match = self._boundary.search(text, start) if self._boundary else None
        return len(text) if match is None else match.start()

    def _encode(
        self, prefixes: Sequence[str], texts: Sequence[str], first_row: int
    ) -> list[Encoding]:
        try:
            if len(prefixes) == 1:  # a batch would wake the library's threads
                return [self._backend.encode(prefixes[0])]
            return list(self._backend.encode_batch_fast(list(prefixes)))
        except TypeError:
            for row, text in enumerate(texts, start=first_row):
                to_utf8(text, row)
            raise
        except BaseException as error:
            message = f"{self._path} is damaged: it cannot encode a text"
            raise _artifact_error(error, message) from error


def _artifact_error(error: BaseException, message: str) -> BaseException:
    """Return an ArtifactError for an error of the library: Exception itself, or a panic of Rust."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ArtifactError(f"{message}: {error}")
    return error


def _word_boundary(backend: BackendTokenizer) -> re.Pattern[str] | None:
    """Return what ends a word whatever follows, or None if that is not known.

    BERT's tokenizers change characters one by one, split at white space, and separate every
    punctuation character (and, with `handle_chinese_chars`, every Chinese one).
    """
    normalizer = backend.normalizer
    if not isinstance(backend.pre_tokenizer, BertPreTokenizer) or not isinstance(
        normalizer, normalizers.BertNormalizer
    ):
        return None
    chinese = "\u3400-\u4dbf\u4e00-\u9fff" if normalizer.handle_chinese_chars else ""
    return re.compile(rf"[ \n!-/:-@\[-`{{-~{chinese}]")
