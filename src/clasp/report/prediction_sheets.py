"""Contact sheets of single predictions: the classes that are confused most, and captions with the image found first.

Input: pairs and the scores of the queries of an evaluation on them. Output: a PNG beside the results, which ``clasp
report`` shows. Note: what is drawn is chosen by rule: the most frequent confusions, and queries by a hash of their id.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clasp.errors import counted
from clasp.evaluation.query_scores import QueryScores
from clasp.report.contact_sheet import SheetRow, SheetSection, Thumbnail, sectioned_sheet
from clasp.types import Pair, UserError

_CONFUSIONS, _OF_EACH = 8, 6  # rows, and images in each
_QUERIES = 18
_TEXT_TO_IMAGE = "text_to_image"


@dataclass(frozen=True, slots=True)
class Confusion:
    """Images of one class that were predicted as another: ``count`` of the ``asked`` images of the class."""

    expected: str
    predicted: str
    count: int
    asked: int


def most_confused(expected: Sequence[str], predicted: Sequence[str], most: int = _CONFUSIONS) -> list[Confusion]:
    """The pairs of classes that were confused most often; of equally many, by name."""
    asked = Counter(expected)
    wrong = Counter(pair for pair in zip(expected, predicted, strict=True) if pair[0] != pair[1])
    ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    return [Confusion(*pair, count, asked[pair[0]]) for pair, count in ordered[:most]]


def draw_confusions(pairs: Sequence[Pair], scores: Sequence[QueryScores], path: Path) -> None:
    """A row for each of the most confused pairs of classes, with some of the images."""
    (one,) = scores
    assert one.predict is not None
    predicted, images = one.predict(), {pair.id: pair for pair in pairs}
    rows = []
    for confusion in most_confused(one.expected, predicted):
        answers = zip(one.ids, one.expected, predicted, strict=True)
        ids = [id for id, *answer in answers if answer == [confusion.expected, confusion.predicted]]
        tiles = [(_read(images[id]), "", None) for id in _by_hash(ids, _OF_EACH)]
        title = f"{confusion.expected}, predicted {confusion.predicted}"
        rows.append(SheetRow(title, tiles, f"{confusion.count} of {counted(confusion.asked, 'image')} of the class"))
    errors = sum(right != answer for right, answer in zip(one.expected, predicted, strict=True))
    lines = [f"The most frequent confusions; wrong: {errors} of {counted(len(one.ids), 'image')}"]
    section = SheetSection("Most confused classes", lines, rows, side=96, abreast=2)
    sectioned_sheet("Confusions", [counted(len(one.ids), "image")], [section], path)


def draw_retrievals(pairs: Sequence[Pair], scores: Sequence[QueryScores], path: Path) -> None:
    """Some captions with the image that is found first and, where that is wrong, its caption, and the caption's own
    image with its rank."""
    one = next(each for each in scores if each.direction == _TEXT_TO_IMAGE)
    assert one.predict is not None and one.ranks is not None
    found = dict(zip(one.ids, one.predict(), strict=True))
    ranks = dict(zip(one.ids, one.ranks.tolist(), strict=True))
    images = {pair.id: pair for pair in pairs}
    own = {f"{pair.id}#{number}": (pair, text) for pair in pairs for number, (text, _) in enumerate(pair.captions)}
    rows = []
    for id in _by_hash([id for id in one.ids if id in own], _QUERIES):
        pair, text = own[id]
        first = images[found[id]]
        right = first.group == pair.group
        tiles = [Thumbnail(_read(first), "found first", right), Thumbnail(_read(pair), f"its own: rank {ranks[id]:g}")]
        note = "" if right else f"found: {first.captions[0].text}"
        rows.append(SheetRow(text, tiles[:1] if right else tiles, note))
    count = sum(images[found[id]].group == own[id][0].group for id in one.ids if id in own)
    lines = [
        f"{len(rows)} of {counted(len(one.ids), 'caption')}, chosen by a hash; an image of its own is first for {count}"
    ]
    section = SheetSection("Images by caption", lines, rows, side=112, abreast=3)
    sectioned_sheet("Retrieval", [counted(len(images), "image")], [section], path)


PREDICTION_SHEETS: dict[str, Callable[[Sequence[Pair], Sequence[QueryScores], Path], None]] = {
    "zeroshot": draw_confusions,
    "retrieval": draw_retrievals,
}
"""Task to the sheet of its predictions, ``RUN/TASK-DATA-ID.png``"""


def _by_hash(ids: Sequence[str], most: int) -> list[str]:
    return sorted(ids, key=lambda id: hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest())[:most]


def _read(pair: Pair) -> bytes | None:
    try:
        return pair.image.read()
    except UserError:
        return None
