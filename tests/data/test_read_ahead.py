"""Reading ahead: order, how far ahead, errors at their place, and an early end."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from clasp.data.read_ahead import read_ahead


def test_batches_are_in_order_and_one_is_read_while_another_is_used():
    begun = [threading.Event() for _ in range(9)]

    def read(number: int) -> int:
        begun[number].set()
        return -number

    batches = read_ahead(range(9), read, batch=2, threads=2)
    assert next(batches) == [0, -1]
    assert begun[3].wait(5), "the next batch is read meanwhile"
    assert not begun[4].is_set(), "and no other"
    assert list(batches) == [[-2, -3], [-4, -5], [-6, -7], [-8]]
    assert list(read_ahead([], read, batch=2)) == []


def test_with_none_ahead_nothing_is_read_while_a_batch_is_used():
    begun: list[int] = []
    batches = read_ahead(range(5), lambda number: begun.append(number) or number, batch=2, threads=2, ahead=0)
    assert next(batches) == [0, 1] and sorted(begun) == [0, 1]
    assert list(batches) == [[2, 3], [4]]


def test_an_error_is_raised_at_its_batch():
    def read(number: int) -> int:
        if number == 3:
            raise ValueError("3 cannot be read")
        return number

    batches = read_ahead(range(6), read, batch=2, threads=1)
    assert next(batches) == [0, 1]
    with pytest.raises(ValueError, match="3 cannot be read"):
        next(batches)


def test_an_early_end_leaves_no_thread():
    before = threading.active_count()
    with closing(read_ahead(range(100), lambda number: number, batch=3, threads=2)) as batches:
        assert next(batches) == [0, 1, 2]
    assert threading.active_count() == before
