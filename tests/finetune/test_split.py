"""The split: complete, reproducible, and without a text in two parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsim_embed.finetune.pairs import TextPairs, normalize
from onnxsim_embed.finetune.split import MAX_EVALUATED, split_pairs

PAIRS = TextPairs([f"source {i}" for i in range(100)], [f"target {i}" for i in range(100)])


def texts(pairs):
    return {normalize(text) for text in (*pairs.sources, *pairs.targets)}


def test_sizes_up_to_a_number_of_evaluated_pairs():
    assert list(map(len, split_pairs(PAIRS, 0.2, 0)[0])) == [80, 10, 10]
    assert list(map(len, split_pairs(PAIRS, 0.5, 0)[0])) == [50, 25, 25]
    numbers = range(5 * MAX_EVALUATED)
    many = TextPairs([f"s{i}" for i in numbers], [f"t{i}" for i in numbers])
    assert len(split_pairs(many, 0.5, 0)[0].held_out) == MAX_EVALUATED


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(40, 100)), min_size=10, max_size=80, unique=True),
    st.integers(0, 3),
)  # fmt: skip
def test_no_text_is_in_two_parts_and_no_pair_is_lost(numbers, seed):
    given_ = TextPairs([f"Text {a} " for a, _ in numbers], [f"text  {b}" for _, b in numbers])
    try:
        split, _ = split_pairs(given_, 0.4, seed)
    except ValueError:  # nearly all are connected
        return
    sides = [texts(part) for part in split]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    rows = [row for part in split for row in zip(part.sources, part.targets, strict=True)]
    assert sorted(rows) == sorted(zip(given_.sources, given_.targets, strict=True))


def test_pairs_that_cannot_be_split():
    connected = TextPairs([f"s{i}" for i in range(50)], ["one target"] * 50)
    with pytest.raises(ValueError, match="validation"):
        split_pairs(connected, 0.2, 0)
    with pytest.raises(ValueError, match="only 5 pairs"):  # left to train on
        split_pairs(PAIRS, 0.2, 0, PAIRS.rows(range(95)))


def test_pairs_with_an_evaluated_source_are_skipped():
    evaluation = TextPairs(["SOURCE 7", "new"], ["target 8", "target 9"])
    split, skipped = split_pairs(PAIRS, 0.2, 0, evaluation)
    assert split.held_out == evaluation
    assert skipped == 1
    assert len(split.train) + len(split.validation) == 99
    assert len(split.validation) == 10
    assert "source 7" not in (*split.train.sources, *split.validation.sources)


def test_with_evaluation_pairs_only_sources_connect():
    star = TextPairs([f"s{i // 2}" for i in range(60)], [f"answer {i % 2}" for i in range(60)])
    split, _ = split_pairs(star, 0.2, 0, TextPairs(["new"], ["answer 1"]))
    assert len(split.validation) == 6
    assert not set(split.validation.sources) & set(split.train.sources)


def test_rows_keep_their_scores_and_negatives():
    scored = TextPairs(PAIRS.sources, PAIRS.targets, scores=list(range(100)))
    held_out = split_pairs(scored, 0.2, 0)[0].held_out
    assert held_out.scores == [int(text.split()[1]) for text in held_out.sources]
