"""What no model can tell apart is said, or refused where it is all there is."""

from __future__ import annotations

import pytest

from clasp.evaluation.equal_items import equal_caption_lines, like_class_name_lines
from clasp.types import Caption, Pair, UserError
from toyembeddings import Unread


def pairs_of(*captions: tuple[str, str, str]) -> list[Pair]:
    """Group, caption and language of each."""
    return [
        Pair(str(number), Unread(str(number)), (Caption(text, language),), group, {})
        for number, (group, text, language) in enumerate(captions)
    ]


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        ([("a", "a cat", ""), ("b", "a dog", "")], []),
        ([("a", "a cat", ""), ("a", "a cat", "")], []),
        ([("a", "taxi", "en"), ("b", "taxi", "de"), ("b", "cab", "en")], []),
        (
            [("a", "a cat", ""), ("b", "a cat", ""), ("c", "a cat", ""), ("d", "a dog", "")],
            ["warning: 1 of the 2 different captions of zoo are those of several images, such as 'a cat' (3)"],
        ),
    ],
)
def test_captions_of_several_images_are_said(captions: list[tuple[str, str, str]], said: list[str]):
    lines = list(equal_caption_lines(pairs_of(*captions), "zoo"))
    assert [line.partition(";")[0] for line in lines] == said


def test_captions_that_are_all_equal_are_refused():
    with pytest.raises(UserError, match=r"^every caption of zoo is 'a cat', so nothing tells .*; caption="):
        list(equal_caption_lines(pairs_of(("a", "a cat", ""), ("b", "a cat", "")), "zoo"))


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["cat", "dog"], []),
        (
            ["Cat", "dog", "cat", "hot dog", "hotdog"],
            ["warning: class names that differ in case or spaces alone: 'Cat', 'cat', 'hot dog', 'hotdog'"],
        ),
    ],
)
def test_class_names_that_a_text_tower_may_not_see_as_different_are_said(classes: list[str], said: list[str]):
    assert list(like_class_name_lines(classes)) == said
