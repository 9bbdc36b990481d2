"""Figures of an encode call, and its progress."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import length_hint

from onnxsim_embed.system.progress import progress_bar


@dataclass
class EncodeReport:
    """Figures of one encode call.

    :param distinct: texts run through the model: repeated ones within a few thousand run once.
    :param tokens: tokens of the distinct texts, special tokens included.
    :param truncated: texts that exceed the model's maximum length and were truncated to it.
    :param lost_tokens: tokens cut off in all; estimated from the characters for texts of tens of times
        the maximum length, of which only the beginning is tokenized.
    :param split: texts that exceed the maximum length and were encoded as windows.
    :param truncated_rows: their rows, at most LISTED_ROWS.
    :param unknown_rows: rows of texts whose tokens are all unknown to the model, at most LISTED_ROWS.
    :param row_tokens: tokens of each text, of at most LISTED_ROWS.
    :param seconds_tokenize: wall time of tokenization.
    :param seconds_run: time inside the ONNX session, summed over threads.
    :param seconds_pool: time in pooling, dense layers and normalization, summed over threads.
    """

    texts: int = 0
    distinct: int = 0
    tokens: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    split: int = 0
    truncated_rows: list[int] = field(default_factory=list)
    unknown_rows: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    seconds_tokenize: float = 0.0
    seconds_run: float = 0.0
    seconds_pool: float = 0.0
    threads: int = 1
    provider: str = ""

    @property
    def texts_per_second(self) -> float:
        """Texts per second over the whole call."""
        return self.texts / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over the whole call; those of repeated texts count once."""
        return self.tokens / self.seconds if self.seconds else 0.0


class TokenBar:
    """A progress bar of tokens; the total is estimated from the texts that are tokenized."""

    def __init__(self, texts: Iterable[str], start: int) -> None:
        self._bar = progress_bar(desc="Encoding", unit=" tokens", unit_scale=True, smoothing=0.1)
        self._texts = length_hint(texts)
        self._done = start
        self.close = self._bar.close

    def expect(self, report: EncodeReport) -> None:
        """Estimate the total number of tokens, after some texts were tokenized."""
        if self._texts:
            self._bar.total = round(report.tokens * max(1.0, self._texts / report.texts))

    def update(self, tokens: int) -> None:
        """Count the tokens of a batch."""
        self._bar.update(tokens)

    def finish(self, texts: int) -> None:
        """Count the texts of a window."""
        self._done += texts
        self._bar.set_postfix_str(f"{self._done:,} texts")
