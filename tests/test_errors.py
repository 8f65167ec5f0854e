"""``UserError`` is one line, whatever a library or a file name puts into it."""

from __future__ import annotations

import pickle

import pytest

from clasp.errors import UserError, counted


@pytest.mark.parametrize("given", ["thrift: no data.\nDeserializing failed.\n", "a\r\n  b\x85c\u2028d", "", "plain"])
def test_a_message_is_one_line(given: str):
    error = UserError(given)
    assert len(str(error).splitlines()) <= 1 and str(error).replace(" ", "") == "".join(given.split())
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    "count, noun, text",
    [
        (1, "key", "1 key"),
        (0, "key", "0 keys"),
        (2000, "more language", "2,000 more languages"),
        (1, "query", "1 query"),
        (2, "query", "2 queries"),
        (3, "class", "3 classes"),
        (2, "batch", "2 batches"),
        (2, "epoch", "2 epochs"),
    ],
)
def test_a_count_and_its_noun(count: int, noun: str, text: str):
    assert counted(count, noun) == text
