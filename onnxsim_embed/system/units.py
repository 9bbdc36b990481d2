"""Integer arguments; byte sizes and durations as people write them."""

from __future__ import annotations

import operator
import re


def check_integer(
    name: str, value: object, least: int = 1, most: int | None = None, why: str = ""
) -> int:
    """Return an integer argument, of Python or numpy, as int.

    :param most: the largest allowed value, which `why` explains; None for no limit.
    :raises ValueError: if it is none, too small or too large. A bool is none.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most:,} ({why})"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")
    return number


def format_bytes(number: float) -> str:
    """Return a byte size in decimal units, for example "12 MB" or "3.4 GB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}" if number < 999.5 else f"{number:,.0f} {units[0]}"


def parse_bytes(text: str) -> int:
    """Parse a byte size such as "4GB", "500 MB" or "1000000"; 1 kB is 1000 bytes, 1 KiB 1024."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", 1):
        units[letter] = units[f"{letter}b"] = 1000**power
        units[f"{letter}ib"] = 1024**power
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units:
        raise ValueError(f"invalid size {text!r}: expected a number with a unit, for example 4GB")
    return int(float(match[1]) * units[match[2].lower()])


def format_duration(seconds: float) -> str:
    """Return a duration, for example "0.4 s", "12 min" or "3.1 h"."""
    if seconds < 90:
        return f"{max(seconds, 0.01):.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.2g} h" if hours < 99.5 else f"{hours:,.0f} h"
