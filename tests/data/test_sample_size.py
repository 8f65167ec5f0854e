"""The warning about few queries: when, with which count, and which metrics cannot be less than 100 %."""

from __future__ import annotations

import pytest

from clasp.data.sample_size import MIN_QUERIES, few_validation_pairs, small_sample_warning


@pytest.mark.parametrize(("count", "points"), [(MIN_QUERIES - 1, 10), (49, 14), (16, 24), (4, 49), (1, 50)])
def test_the_count_and_the_widest_interval_are_named(count: int, points: int):
    (line,) = small_sample_warning(count, "queries")
    assert line == f"warning: few queries ({count}): 95 % intervals may be ±{points} points wide"


def test_enough_queries_are_not_mentioned():
    assert small_sample_warning(MIN_QUERIES, "queries") == few_validation_pairs(MIN_QUERIES) == []


def test_before_training_the_count_of_validation_pairs_is_named():
    (line,) = few_validation_pairs(5)
    assert line == small_sample_warning(5, "validation pairs")[0] + "; name more with data.val=PAIRS"


def test_enough_queries_are_not_called_few_where_a_metric_is_certain():
    (line,) = small_sample_warning(10_000, "queries", ["top5"])
    assert line == "warning: top5 cannot be less than 100 %"
