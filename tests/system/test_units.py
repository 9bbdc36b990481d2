"""Byte sizes and durations are formatted and parsed."""

import pytest

from onnxsim_embed.system.units import format_bytes, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (12_345_678, "12.3 MB"),
     (999_499, "999 kB"), (999_999, "1 MB"), (3.4e9, "3.4 GB"), (1e12, "1 TB"),
     (1.5e15, "1,500 TB")]
)  # fmt: skip
def test_format_bytes(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.01 s"), (1e-6, "0.01 s"), (0.4321, "0.43 s"), (12.3, "12 s"), (89.9, "90 s"),
     (91, "2 min"), (5300, "88 min"), (5400, "1.5 h"), (180_000, "50 h"), (3_600_000, "1,000 h")]
)  # fmt: skip
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GB", 4 * 10**9), ("4 gb", 4 * 10**9), ("500 M", 5 * 10**8), ("1.5k", 1500),
     (" 2 TB ", 2 * 10**12), ("1KiB", 1024), ("0.5MiB", 1 << 19), ("1000000", 10**6), ("12b", 12),
     ("0", 0), ("123456789012345 TiB", 123456789012345 << 40)]
)  # fmt: skip
def test_parse_bytes(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "GB", "4 GBs", "4xb", "-4GB", "+4GB", "1e9", "4,5GB", "4.GB", ".5GB", "4 G B", "0x10",
     "nan", "inf", "four", "4GB 5MB", "4bi", "4bib", "9" * 400]
)  # fmt: skip
def test_an_invalid_size_is_rejected(text):
    with pytest.raises(ValueError, match="4GB"):
        parse_bytes(text)
