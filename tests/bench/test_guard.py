"""What fell is named; times are never compared, nor ratios of other texts."""

from __future__ import annotations

from lab.guard import Comparison, compare


def result(**ratios):
    return {"ratios": {name: {"value": value, "of": "texts"} for name, value in ratios.items()}}


BEFORE = result(a=4.0, b=2.0, c=1.0, gone=3.0, none=0.0) | {"seconds": 1.0}


def test_only_what_fell_by_more_than_the_tolerance_is_named():
    now = result(a=1.0, b=1.71, c=0.84, new=0.1, none=0.0) | {"seconds": 99.0}
    found = compare(BEFORE, now)
    assert [fall.name for fall in found.falls] == ["a", "c"]
    assert found.compared == 3
    assert str(found.falls[0]) == "a: 4.00 -> 1.00, 75% less"


def test_ratios_of_other_texts_are_not_compared():
    now = result(a=1.0, b=2.0)
    now["ratios"]["a"]["of"] = "other texts"
    assert compare(BEFORE, now) == Comparison((), 1, ("a",))
