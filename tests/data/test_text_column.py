"""Columns of texts: every ``str`` as it was, sorted and found as Python sorts and finds."""

import json
import pickle

import numpy as np
import pytest

from clasp.data.text_column import TextColumn

TEXTS = ["b", "a", "", "é", "\ud83d", "\udc80 of a file name", "a", "🐕 dog", "\uffff", "zebra" * 50, "b"]


@pytest.fixture(params=["in memory", "of arrays", "a selection"])
def column(request: pytest.FixtureRequest) -> TextColumn:
    made = TextColumn.of(TEXTS)
    if request.param == "of arrays":
        arrays = made.select(np.arange(1, len(TEXTS))).to_arrays("x") | {}
        assert TextColumn.from_arrays(arrays, "x")[:] == TEXTS[1:]
        return TextColumn.from_arrays(made.to_arrays("x"), "x")
    if request.param == "a selection":
        return TextColumn.of(["no", *reversed(TEXTS)]).select(np.arange(len(TEXTS), 0, -1))
    return made


def test_it_is_the_list_of_its_texts(column: TextColumn):
    assert list(column) == TEXTS and column[:] == TEXTS and column[2:9:3] == TEXTS[2:9:3]
    assert [column[number] for number in range(-len(TEXTS), len(TEXTS))] == TEXTS * 2
    assert column.take(np.array([4, 4, 0])) == [TEXTS[4], TEXTS[4], TEXTS[0]]
    assert list(pickle.loads(pickle.dumps(column))) == TEXTS and TextColumn.of(column) is column
    assert b"".join(column.json_pieces()).decode() == json.dumps(TEXTS)
    with pytest.raises(IndexError):
        column[len(TEXTS)]


def test_it_sorts_and_finds_as_python_does(column: TextColumn):
    distinct, entry = column.sort_distinct()
    assert list(distinct) == sorted(set(TEXTS)) and distinct.take(entry) == TEXTS
    found = distinct.find(["nowhere", *TEXTS])
    assert found.tolist() == [-1, *entry.tolist()]


@pytest.mark.parametrize(
    "texts",
    [['say "no"', "a\n", "u0000"], ["a\\u0000b", "c"], ["a\0b", "c"], ["", ""], ["\ud83d", "\ude00"], ["ü", ""]],
)
def test_its_json_is_that_of_the_list(texts: list[str]):
    assert b"".join(TextColumn.of(texts).json_pieces()).decode() == json.dumps(texts)


def test_an_empty_one():
    none = TextColumn.of([])
    assert list(none) == [] == list(none.sort_distinct()[0]) and b"".join(none.json_pieces()) == b"[]"
    assert list(TextColumn.from_arrays(none.to_arrays("x"), "x")) == [] and none.find(["a"]).tolist() == [-1]
