"""A composed query: texts and images with weights, minus terms, and relevance feedback, as one unit vector.

Input: texts, images (path, bytes or Pillow image) and ids of stored entries. Output: a ``SearchQuery``, whose
``vector`` is their weighted sum, normalised. Note: ``parse_words`` reads a term after a minus sign as a text of weight
``MINUS_WEIGHT`` ("beach -people"), and one before ``^2`` as a text of weight 2, as Lucene does; unlike there, a weight
may be negative. A ``SearchQuery`` made otherwise takes its texts literally. Liked and unliked entries enter by
Rocchio's formula (Manning, Raghavan and Schütze 2008, Introduction to Information Retrieval, equation 9.3) with the
weights given there. Ours differs in that the initial query is normalised before feedback is added, and that negative
components stay, since embeddings are not term frequencies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from clasp.data.formats.rows import is_blank, shorten
from clasp.plain_types import UserError

ROCCHIO_QUERY, ROCCHIO_LIKE, ROCCHIO_UNLIKE = 1.0, 0.75, 0.15
"""alpha, beta and gamma of Rocchio's formula: weights of the query, of the mean liked and the mean unliked vector"""
MINUS_WEIGHT = -0.35
"""Weight of a minus term.

Chosen among seven weights on 64 pairs of 11 words in 800 photographs with captions (``clasp train photos``). Of 20 hits
for "A -B" captions named A and not B in 60 % with it, in 57 % with -1 (fewer hits show A) and in 57 % without the minus
term; no other collection was tried."""
_CANCELLED = 1e-3  # length of the weighted sum, over the sum of the absolute weights, below which it has no direction
_TERM = re.compile(
    r'(?P<minus>[-−](?=[^\s\-−]))?(?:"(?P<quoted>[^"]*)"|(?P<bare>\^\S*|[^\s^]+))(?P<weight>\^\S*)?'
)  # a word that begins with a caret is a word ("^_^"); every other caret outside double quotes begins a weight
_WEIGHT = re.compile(r"\^(?P<sign>[-+−]?)(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", re.IGNORECASE)
_WEIGHT_HINT = 'type dog^2, dog^0.5, -dog^2 or dog^-2, and a literal ^ in double quotes: "x^y"'


class WeightedText(NamedTuple):
    """A text and its weight, negative for a minus term."""

    text: str
    weight: float = 1.0


class WeightedImage(NamedTuple):
    """An image (path, encoded bytes or Pillow image) and its weight."""

    image: Any
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """Texts and images with weights, and ids of entries to be near to (``like``) and far from (``unlike``).

    ``like`` alone is more-like-this. ``UserError`` for a query that is empty or blank, and for a weight
    below 1e-6 or above 1e6, signs aside.
    """

    texts: tuple[WeightedText, ...] = ()
    images: tuple[WeightedImage, ...] = ()
    like: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.texts or self.images or self.like or self.unlike):
            raise UserError("search takes words, an image, or both; it was given neither")
        for text, _ in self.texts:
            if not isinstance(text, str):
                raise UserError(f"search takes words as one string, not {shorten(text)}")
            if is_blank(text):
                raise UserError(f"search was given the words {text!r}, which are blank")
        for _, weight in (*self.texts, *self.images):
            if not 1e-6 <= abs(weight) <= 1e6:  # float32 holds their squares
                raise UserError(f"a weight of a search is {weight}; it takes 0.000001 to 1,000,000, or minus these")
        both = sorted(set(self.like) & set(self.unlike))
        if both:
            raise UserError(f"search was given {both[0]!r} as liked and as unliked; choose one")

    def __str__(self) -> str:
        """The query in one line: texts, images and feedback, with their signs."""
        parts = [f"{'-' if weight < 0 else '+'} {text}" for text, weight in self.texts]
        parts += [
            f"{'-' if weight < 0 else '+'} {f'picture {image}' if isinstance(image, str | Path) else 'a picture'}"
            for image, weight in self.images
        ]
        parts += [f"+ like {name}" for name in self.like] + [f"- unlike {name}" for name in self.unlike]
        return " ".join(parts).removeprefix("+ ")

    def vector(
        self,
        encode_texts: Callable[[list[str]], Float[np.ndarray, "n E"]],
        encode_images: Callable[[list[Any]], Float[np.ndarray, "n E"]],
        stored: Callable[[Sequence[str]], Float[np.ndarray, "n E"]],
    ) -> Float[np.ndarray, "1 E"]:
        """The query as one unit vector; the functions return the embeddings of texts, of images and of stored ids.

        ``UserError`` for a query whose parts cancel each other out, such as "dog -dog".
        """
        weights = [weight for _, weight in (*self.texts, *self.images)]
        vectors = [encode_texts([text for text, _ in self.texts])] if self.texts else []
        if self.images:
            vectors.append(encode_images([image for image, _ in self.images]))
        parts = []
        if vectors:
            rows, signed = np.concatenate(vectors), np.array(weights, np.float32)
            self._check_minus(rows, signed)
            mixed = rows.mean(axis=0) if set(weights) == {1.0} else signed @ rows
            self._check(mixed, sum(map(abs, weights)))
            parts.append(ROCCHIO_QUERY * _unit(mixed))
        if self.like:
            parts.append(ROCCHIO_LIKE * stored(self.like).mean(axis=0))
        if self.unlike:
            parts.append(-ROCCHIO_UNLIKE * stored(self.unlike).mean(axis=0))
        if len(parts) == 1 and vectors:
            return parts[0][None]
        total = np.sum(parts, axis=0)
        self._check(total, 1.0)
        return _unit(total)[None]

    def words_only(self) -> SearchQuery | None:
        """The texts of positive weight alone, which a calibrated score is of; ``None`` if there are none."""
        texts = tuple(text for text in self.texts if text.weight > 0)
        return SearchQuery(texts) if texts else None

    def _check_minus(self, rows: Float[np.ndarray, "n E"], weights: Float[np.ndarray, " n"]) -> None:
        """``UserError`` if all that is added is subtracted again, with whatever weight."""
        if (weights > 0).any() and (weights < 0).any():
            added, subtracted = (_unit(np.maximum(weights * sign, 0) @ rows) for sign in (1, -1))
            self._check(added - subtracted, 1.0)

    def _check(self, mixed: Float[np.ndarray, " E"], scale: float) -> None:
        if float(np.linalg.norm(mixed)) < _CANCELLED * scale:
            raise UserError(f"the search {shorten(str(self))} cancels itself out: what it adds, it subtracts again")


def _unit(vector: Float[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
    """The vector at unit length; zero stays zero."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def parse_words(words: str) -> tuple[WeightedText, ...]:
    """Words as typed: the text without its weighted and minus terms, weight 1; then these, each a text of its own.

    A weighted term is a word, or words in double quotes, directly before ``^`` and a number ('beach "red
    umbrella"^0.5', "dog^-1"). A minus term is a word, or words in double quotes, directly after a minus sign at the
    start of a word; its weight is ``MINUS_WEIGHT``, or minus the number ("-people^1"). Inside a word ("e-mail"), in
    quotes ('"-40 degrees"') and alone ("rock - paper") a minus sign is literal; a caret is in quotes ('"x^y"') and at
    the start of a word ("^_^"). Quotes around words are not part of the text; a quote without a partner is.
    ``UserError`` for words that are none, and for a weight that is no number, has no term, or is of a minus term and
    signed.
    """
    if is_blank(words):
        raise UserError(f"search was given the words {words!r}, which are blank")
    wanted, weighted = [], []
    for match in _TERM.finditer(words):
        term = match["bare"] if match["quoted"] is None else match["quoted"]
        if _WEIGHT.fullmatch(term if match["quoted"] is None else "") or (match["weight"] and is_blank(term)):
            raise UserError(f"the weight {shorten(match[0])} has no term directly before it; {_WEIGHT_HINT}")
        if match["weight"]:
            weighted.append(WeightedText(term, _typed_weight(match)))
        elif is_blank(term):
            continue
        elif match["minus"]:
            weighted.append(WeightedText(term, MINUS_WEIGHT))
        else:
            wanted.append(term)
    text = " ".join(wanted)
    terms = (*((WeightedText(text),) if text else ()), *weighted)
    if not terms:
        raise UserError(f"search was given the words {words!r}, which are blank")
    return terms


def _typed_weight(match: re.Match[str]) -> float:
    """The weight of a term of ``_TERM``. ``UserError`` for one that is no number, and for a second minus sign."""
    weight = _WEIGHT.fullmatch(match["weight"])
    if weight is None:
        raise UserError(f"the weight in {shorten(match[0])} is not a number; {_WEIGHT_HINT}")
    if match["minus"] and weight["sign"]:
        raise UserError(f"the term {shorten(match[0])} has two signs; {_WEIGHT_HINT}")
    return float(weight["number"]) * (-1 if match["minus"] or weight["sign"] in ("-", "−") else 1)
