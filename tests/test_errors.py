"""``UserError`` is one line, whatever a library or a file name puts into it."""

from __future__ import annotations

import pickle

import pytest

from clasp.errors import UserError


@pytest.mark.parametrize("given", ["thrift: no data.\nDeserializing failed.\n", "a\r\n  b\x85c\u2028d", "", "plain"])
def test_a_message_is_one_line(given: str):
    error = UserError(given)
    assert len(str(error).splitlines()) <= 1 and str(error).replace(" ", "") == "".join(given.split())
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
