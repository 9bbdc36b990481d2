"""Batches: each row once, equal counts, within the budget, longest first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from onnxsim_embed.runtime.batching import TOKEN_BUDGET, plan_batches

# No deadline and no database: machines differ, and a test run leaves nothing behind.
quietly = settings(deadline=None, database=None)

COUNTS = np.array([3, 7, 3, 600, 7, 7, 3, 1, 600, 2], np.int64)


def some_counts(**kwargs):
    return npst.arrays(np.int64, st.integers(0, 60), elements=st.integers(0, 40), **kwargs)


@quietly
@given(some_counts(), st.integers(1, 100), st.none() | st.integers(1, 9), st.booleans())
def test_every_row_once_within_the_budget_longest_first(counts, budget, max_rows, padded):
    batches = list(plan_batches(counts, budget, max_rows, padded=padded))
    rows = [row for batch in batches for row in batch.tolist()]
    assert sorted(rows) == list(range(len(counts)))
    longest = [int(counts[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch in batches:
        assert padded or len(set(counts[batch])) == 1
        assert len(batch) == 1 or len(batch) * counts[batch].max() <= budget
        assert max_rows is None or len(batch) <= max_rows


def test_rows_of_equal_count_keep_their_order():
    batches = [batch.tolist() for batch in plan_batches(COUNTS)]
    assert batches == [[3], [8], [1, 4, 5], [0, 2, 6], [9], [7]]


def test_a_batch_is_filled_up_to_the_budget_or_max_rows():
    sizes = [len(batch) for batch in plan_batches(np.full(1000, 4, np.int64))]
    assert sizes[:-1] == [TOKEN_BUDGET // 4] * (len(sizes) - 1)
    assert [len(batch) for batch in plan_batches(np.full(7, 2), 100, 3)] == [3, 3, 1]


def test_padded_batches_mix_counts():
    batches = [batch.tolist() for batch in plan_batches(COUNTS, 60, padded=True)]
    assert batches == [[3], [8], [1, 4, 5, 0, 2, 6, 9, 7]]
