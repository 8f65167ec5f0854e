"""Composed queries as vectors worked by hand, words as typed, filters as data, and near-duplicates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from clasp.search.metadata_filter import FilterFields, all_of, check_filters, parse_filter
from clasp.search.near_duplicates import duplicate_threshold, fold_near_duplicates
from clasp.search.query import MINUS_WEIGHT, SearchQuery, WeightedImage, WeightedText, parse_words
from clasp.types import Hit, UserError

AXES = {"x": [1.0, 0, 0], "y": [0, 1.0, 0], "z": [0, 0, 1.0]}


def look_up(names: Sequence[str]) -> np.ndarray:
    return np.array([AXES[name] for name in names], np.float32)


def vector(query: SearchQuery) -> list[float]:
    return query.vector(look_up, look_up, look_up)[0].tolist()


WORDS = {
    "beach -people": [("beach", 1), ("people", MINUS_WEIGHT)],
    "beach −people -dogs": [("beach", 1), ("people", MINUS_WEIGHT), ("dogs", MINUS_WEIGHT)],
    "an e-mail": [("an e-mail", 1)],
    '"-40 degrees" outside': [("-40 degrees outside", 1)],
    'snow -"red car" now': [("snow now", 1), ("red car", MINUS_WEIGHT)],
    "rock - paper": [("rock - paper", 1)],
    '5" nails': [('5" nails', 1)],
    "-people": [("people", MINUS_WEIGHT)],
    "--help": [("--help", 1)],
    'beach "red umbrella"^0.5 -people^1': [("beach", 1), ("red umbrella", 0.5), ("people", -1)],
    'dog^2 "x^y" "a^2" ^_^': [("x^y a^2 ^_^", 1), ("dog", 2)],
    "cat dog^-1": [("cat", 1), ("dog", -1)],
    "cat dog^−1.5": [("cat", 1), ("dog", -1.5)],
    "-dog^2 cat^+3": [("dog", -2), ("cat", 3)],
    '-"red car"^.5 "a dog"^-2. "a cat"^1e3': [("red car", -0.5), ("a dog", -2), ("a cat", 1000)],
    'beach -"red umbrella", people': [("beach , people", 1), ("red umbrella", MINUS_WEIGHT)],
}


@pytest.mark.parametrize("typed", WORDS)
def test_words_as_typed(typed: str):
    assert [tuple(term) for term in parse_words(typed)] == WORDS[typed]


@pytest.mark.parametrize("typed", ["", " \t", '""', '-""', "\u200b"], ids=repr)
def test_words_that_are_none(typed: str):
    with pytest.raises(UserError, match="which are blank"):
        parse_words(typed)


NO_WEIGHTS = {
    "dog^x": "weight in 'dog^x' is not a number",
    "dog^": "weight in 'dog^' is not a number",
    "a dog^nan": "weight in 'dog^nan' is not a number",
    "dog^-inf": "is not a number",
    "dog^0,5": "is not a number",
    "dog^2^3": "is not a number",
    "dog^1_000": "is not a number",
    "dog^--1": "is not a number",
    '"red umbrella"^': "weight in '\"red umbrella\"^' is not a number",
    '-"red car"^2x': "is not a number",
    "-dog^-1": "'-dog^-1' has two signs",
    "a dog ^2": "weight '^2' has no term",
    "-^2": "weight '-^2' has no term",
    '""^2': "has no term",
}


@pytest.mark.parametrize("typed", NO_WEIGHTS)
def test_weights_that_are_none_name_the_syntax(typed: str):
    with pytest.raises(UserError) as raised:
        parse_words(typed)
    assert NO_WEIGHTS[typed] in str(raised.value) and "type dog^2, dog^0.5, -dog^2 or dog^-2" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_query_is_a_weighted_sum():
    half = math.sqrt(0.5)
    both = SearchQuery((WeightedText("x"),), (WeightedImage("y"),))
    assert vector(both) == pytest.approx([half, half, 0])
    length = math.sqrt(1 + MINUS_WEIGHT**2)
    assert vector(SearchQuery(parse_words("x -y"))) == pytest.approx([1 / length, MINUS_WEIGHT / length, 0])
    assert vector(SearchQuery(parse_words("-y"))) == pytest.approx([0, -1, 0])
    weighted = SearchQuery((WeightedText("x", 3.0), WeightedText("z", -4.0)))
    assert vector(weighted) == pytest.approx([0.6, 0, -0.8])
    assert vector(SearchQuery(parse_words("x^3 z^4"))) == pytest.approx([0.6, 0, 0.8])
    assert str(SearchQuery(parse_words("x -y"), (WeightedImage("z"),), ("a",), ("b",))) == (
        "x - y + picture z + like a - unlike b"
    )


def test_feedback_is_rocchios():
    moved = SearchQuery((WeightedText("x", 2.0),), like=("y",), unlike=("z",))
    length = math.sqrt(1 + 0.75**2 + 0.15**2)
    assert vector(moved) == pytest.approx([1 / length, 0.75 / length, -0.15 / length])
    assert vector(SearchQuery(like=("y",))) == pytest.approx([0, 1, 0])
    assert vector(SearchQuery(like=("x", "y"))) == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), 0])


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: SearchQuery(), "given neither"),
        (lambda: SearchQuery((WeightedText("x", 0.0),)), "a weight of a search is 0.0"),
        (lambda: SearchQuery((WeightedText("x", float("nan")),)), "a weight of a search is nan"),
        (lambda: SearchQuery(parse_words("x^-0")), "a weight of a search is -0.0"),
        (lambda: SearchQuery(parse_words("x^1e9")), "a weight of a search is 1000000000.0"),
        (lambda: SearchQuery(parse_words("x^0")), "a weight of a search is 0.0"),
        (lambda: SearchQuery(parse_words("x^" + "9" * 20)), r"a weight of a search is 1e\+20; it takes 0\.000001 to"),
        (lambda: SearchQuery(parse_words("x^" + "9" * 400)), "a weight of a search is inf"),
        (lambda: SearchQuery(like=("x",), unlike=("x",)), "'x' as liked and as unliked"),
        (lambda: vector(SearchQuery(parse_words("x -x"))), r"'x - x' cancels itself out"),
        (lambda: vector(SearchQuery((WeightedText("x"),), (WeightedImage("x", -1.0),))), "cancels itself out"),
    ],
    ids=[
        "empty",
        "weight 0",
        "weight nan",
        "typed -0",
        "typed 1e9",
        "typed 0",
        "typed 1e20",
        "typed inf",
        "both",
        "dog -dog",
        "image against text",
    ],
)
def test_queries_that_are_none(made, match: str):
    with pytest.raises(UserError, match=match):
        made()


# --- filters ---------------------------------------------------------------------------------------------------------

META = {
    "name": "/home/a/Pictures/Holidays/2020/b.jpg",
    "captions": [{"text": "A dog in the snow", "language": "en"}],
    "languages": ["en"],
    "group": "b",
    "meta": {"year": 2020, "camera": "Nikon D7", "tags": ["sun", "sea"], "taken": "2020-05-01"},
}
CONDITIONS = {
    "folder=holidays": True,
    "folder=holidays/2020": True,
    "folder=day": False,
    "folder~day": True,
    "folder!=work": True,
    "caption~SNOW": True,
    "caption=snow": False,
    "language=en": True,
    "language!=en": False,
    "year=2020.0": True,
    "year>=2020": True,
    "year<1999": False,
    "taken>2020-04-30": True,
    "tags=sea": True,
    "tags!=sea": False,
    "camera ~ nikon": True,
    "lens=50": False,
    "lens!=50": True,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition: str):
    assert parse_filter(condition)(META) is CONDITIONS[condition]


def test_filters_are_joined_by_and():
    both = all_of([parse_filter("year=2020"), parse_filter("tags=snow")])
    assert both is not None and not both(META) and all_of([]) is None


@pytest.mark.parametrize("condition", ["", "folder", "folder=", "=x", "a !x"], ids=repr)
def test_what_is_no_condition(condition: str):
    with pytest.raises(UserError, match="folder=holidays"):
        parse_filter(condition)


def test_an_unknown_field_names_those_there_are():
    fields = FilterFields([META])
    assert fields.names == ["folder", "caption", "language", "group", "name", "camera", "tags", "taken", "year"]
    with pytest.raises(UserError, match=r"no entry has the field 'yaer'; there are folder, .*, year"):
        fields.check([parse_filter("yaer=2020")])
    with pytest.raises(UserError, match="no entry has the field 'date', which is read from EXIF data; there"):
        fields.check([parse_filter("date>=2020")])


OF_A_KIND = [
    {"file": {"width": 640 + n, "bytes": n}, "meta": own}
    for n, own in enumerate(
        [
            {"day": "2020-01-31", "price": "12.50", "mixed": 1, "sold": True, "sizes": [1, 2], "group": 5},
            {"day": "2020-01-31T10:00", "price": None, "mixed": "b", "sold": False, "sizes": [], "empty": None},
            {"day": "2020-01-31 10:00:05", "scan": "2020-01-31_1.jpg", "title": "2020-01-31 at sea", "code": "9" * 99},
        ]
    )
]


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("width>abc", "'width>abc' has no number to compare with: width is a number .* such as 640"),
        ("width=wide", "has no number"),
        ("price<cheap", "such as 12.50"),
        ("sizes>=large", "has no number"),
        ("day>31.01.2020", "'day>31.01.2020' has no date to compare with: .* such as 2020-01-31"),
        ("day<=2020-1", "has no date"),
        ("code=x", "such as 9{80}$"),
        *((fits, "") for fits in ("width>1e3", "width~6", "price=12.5", "day>=2020", "day<2020-07", "day=2020-01-31")),
        *((fits, "") for fits in ("day>2020-01-31T09", "day~01", "mixed>a", "mixed=1", "sold=true", "empty=x")),
        *((fits, "") for fits in ("width!=wide", "day!=never", "scan=IMG1", "title>b")),
        *((fits, "") for fits in ("group=a", "folder=holidays", "name~jpg")),  # of every entry, and no field of a pair
    ],
)
def test_a_value_that_no_field_is_compared_with_is_refused(condition: str, reason: str):
    if not reason:
        return check_filters([parse_filter(condition)], OF_A_KIND)
    with pytest.raises(UserError, match=reason):
        check_filters([parse_filter(condition)], OF_A_KIND)


@pytest.mark.parametrize(
    ("conditions", "most"),
    [
        (["folder=holidays", "caption~snow"], 0),
        (["width>=640"], 1),
        (["width~6", "sold=true", "day>=2020"], 1),
        (["mixed=b"], 2),
        (["code>1"], 3),
    ],
)
def test_filters_are_checked_by_as_few_entries_as_it_takes(conditions: list[str], most: int):
    entries = iter(OF_A_KIND)
    check_filters(list(map(parse_filter, conditions)), entries)
    assert len(OF_A_KIND) - len(list(entries)) == most


# --- near-duplicates -------------------------------------------------------------------------------------------------


def hit(name: str, sha256: str) -> Hit:
    return Hit(name, 0.5, {"sha256": sha256})


def test_near_duplicates_join_the_best_of_them():
    hits = [hit("a", "1"), hit("b", "2"), hit("c", "1"), hit("d", "3")]
    vectors = np.array([[1.0, 0], [0, 1.0], [1.0, 0], [math.sin(0.1), math.cos(0.1)]])
    groups = fold_near_duplicates(hits, vectors, 0.99)
    assert [[each.id for each in (group.hit, *group.duplicates)] for group in groups] == [["a", "c"], ["b", "d"]]
    strict = fold_near_duplicates(hits, vectors, 1.0)
    assert [len(group.duplicates) for group in strict] == [1, 0, 0]
    assert fold_near_duplicates([], np.empty((0, 2)), 0.9) == []


def test_nine_copies_in_ten_reach_the_threshold():
    angles = np.linspace(0, 0.5, 11)
    originals = np.array([[1.0, 0]] * 11)
    copies = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    threshold = duplicate_threshold(originals, copies)
    assert threshold == pytest.approx(math.cos(0.45), abs=1e-6)
    assert duplicate_threshold(originals[:0], copies[:0]) == 1.0
