"""What no model can tell apart is said, or refused where it is all there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from clasp.evaluation.equal_items import equal_caption_lines, like_class_name_lines, require_different_images
from clasp.types import Caption, Pair, UserError
from toyembeddings import Unread


def pairs_of(*captions: tuple[str, str, str]) -> list[Pair]:
    """Group, caption and language of each."""
    return [
        Pair(str(number), Unread(str(number)), (Caption(text, language),), group, {})
        for number, (group, text, language) in enumerate(captions)
    ]


@pytest.mark.parametrize(
    ("captions", "languages", "said"),
    [
        ([("a", "a cat", ""), ("b", "a dog", "")], None, []),
        ([("a", "a cat", ""), ("a", "a cat", "")], None, []),
        ([("a", "taxi", "en"), ("b", "taxi", "de"), ("b", "cab", "en")], {"en", "de"}, []),
        ([("a", "cat", "en"), ("b", "dog", "en"), ("a", "x", "de"), ("b", "x", "de")], {"en"}, []),
        (
            [("a", "taxi", "en"), ("b", "taxi", "de"), ("b", "cab", "en")],
            None,
            ["warning: 1 of the 2 different captions of zoo are those of several images, such as 'taxi' (2)"],
        ),
        (
            [("a", "a cat", ""), ("b", "a cat", ""), ("c", "a cat", ""), ("d", "a dog", "")],
            None,
            ["warning: 1 of the 2 different captions of zoo are those of several images, such as 'a cat' (3)"],
        ),
    ],
)
def test_captions_of_several_images_are_said(
    captions: list[tuple[str, str, str]], languages: set[str] | None, said: list[str]
):
    lines = list(equal_caption_lines(pairs_of(*captions), "zoo", languages))
    assert [line.partition(";")[0] for line in lines] == said


@pytest.mark.parametrize(
    ("others", "languages", "which"),
    [([], None, "of zoo"), ([("a", "cat", "en"), ("b", "dog", "en")], ["en", "de"], "of zoo in de")],
)
def test_captions_that_are_all_equal_are_refused(
    others: list[tuple[str, str, str]], languages: list[str] | None, which: str
):
    pairs = pairs_of(("a", "x", "de"), ("b", "x", "de"), *others)
    with pytest.raises(UserError, match=rf"^every caption {which} is 'x', so nothing tells .*; caption="):
        list(equal_caption_lines(pairs, "zoo", languages))


def test_what_has_no_columns_is_given_no_hint_of_one(tmp_path: Path):
    pairs = pairs_of(("a", "x", ""), ("b", "x", ""))
    for source in (str(tmp_path), f"{tmp_path / 'shard.tar'}"):
        with pytest.raises(UserError, match=r"so nothing tells the images apart$"):
            list(equal_caption_lines(pairs, source))


ONE_PIXEL = b"P6 1 1 255\n\0\0\0"


class Stored(Unread):
    """An image that counts how often images are read."""

    count = 0

    def __init__(self, name: str, content: bytes):
        super().__init__(name)
        self.content = content

    def read(self) -> bytes:
        Stored.count += 1
        return self.content


def test_images_are_compared_until_one_differs():
    same = ONE_PIXEL

    def pairs(*groups: str) -> list[Pair]:
        images = [Stored(str(number), b"other" if number == 2 else same) for number in range(len(groups))]
        return [Pair(each.name, each, (), group, {}) for each, group in zip(images, groups, strict=True)]

    Stored.count = 0
    require_different_images(pairs("a", "b", "c", "d", "e"), "zoo")
    assert Stored.count == 3, "nothing is read after the first that differs"
    require_different_images(pairs("a", "a"), "zoo")
    with pytest.raises(UserError, match=r"^every image of zoo is the same.*apart; image= names"):
        require_different_images(pairs("a", "b"), "zoo")
    same = b"text in a file named .jpg"
    require_different_images(pairs("a", "b"), "zoo")  # said where images are decoded


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
