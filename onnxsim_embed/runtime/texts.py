"""Checks of what callers pass as texts; errors name the row and what to pass instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

DECODE = "decode it, for example with .decode('utf-8')"
BYTES = (bytes, bytearray, memoryview)


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
    elif isinstance(texts, BYTES):
        advice = DECODE
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
    """Raise TypeError naming the first row that is not a string; rows count from `first_row`."""
    for row, text in enumerate(texts, start=first_row):
        if isinstance(text, str):
            continue
        if isinstance(text, BYTES):
            advice = DECODE
        elif isinstance(text, Mapping):
            advice = "pass its text, for example row['text']"
        elif isinstance(text, Iterable):
            advice = "pass one flat list of texts"
        elif repr(text) in ("None", "nan", "<NA>", "NaT"):
            advice = "drop such rows or replace them by ''"
        else:
            advice = "convert it with str() if it is meant as a text"
        what = f"{type(text).__name__} ({text!r:.60})"
        raise TypeError(f"text {row} is {what}, not a string; {advice}")


def to_utf8(text: str, row: int) -> bytes:
    """Return a text in UTF-8; raise ValueError naming the row of one that is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {row} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at "
            f"character {error.start}; repair it with text.encode('utf-8', 'replace').decode()"
        ) from None
