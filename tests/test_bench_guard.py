"""What fell is named; times are never compared."""

from __future__ import annotations

from onnxsim_embed.benchmark.guard import falls

BEFORE = {"ratios": {"a": 4.0, "b": 2.0, "c": 1.0, "gone": 3.0, "none": 0.0}, "seconds": 1.0}


def test_only_what_fell_by_more_than_the_tolerance_is_named():
    now = {"ratios": {"a": 1.0, "b": 1.71, "c": 0.84, "new": 0.1, "none": 0.0}, "seconds": 99.0}
    found, compared = falls(BEFORE, now)
    assert [fall.name for fall in found] == ["a", "c"]
    assert compared == 3
    assert str(found[0]) == "a: 4.00 -> 1.00, 75% less"


def test_more_is_better():
    assert falls(BEFORE, {"ratios": {"a": 9.0}}) == ([], 1)


def test_the_tolerance_can_be_another():
    assert len(falls(BEFORE, {"ratios": {"b": 1.9}}, 0.01)[0]) == 1


def test_nothing_in_common():
    assert falls(BEFORE, {}) == ([], 0)
