"""Why an image is a hit: what each part of the query scores with it, and which background captions are nearest to it.

Input: the stored vector of the image, a ``Background``, and the query. Output: a ``HitExplanation``. Note: the parts
are compared with the image one by one, while the search compared their weighted sum, so they account for the order of
hits approximately. ``z`` is that of ``clasp.search.background``, the same scale for captions and texts: a query whose z
is below those of the nearest captions describes the image worse than these do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from clasp.search.background import Background, BackgroundCaption
from clasp.search.query import ROCCHIO_LIKE, ROCCHIO_UNLIKE, SearchQuery

_Feedback = Literal["like", "unlike"]


class CaptionScore(NamedTuple):
    """A background caption and its cosine with the image."""

    caption: BackgroundCaption
    score: float
    z: float


class PartScore(NamedTuple):
    """A part of a query, its weight in the query, and its cosine with the image; ``z`` for texts alone."""

    kind: Literal["text", "like", "unlike"]
    value: str
    """The text, or the id of the entry"""
    weight: float
    score: float
    z: float | None


class HitExplanation(NamedTuple):
    """Background captions, nearest first, and the parts of the query in their order."""

    captions: list[CaptionScore]
    parts: list[PartScore]


def explain_hit(
    image: Float[np.ndarray, "1 E"],
    background: Background,
    query: SearchQuery | None,
    k: int,
    *,
    encode_texts: Callable[[list[str]], Float[np.ndarray, "n E"]],
    stored_vectors: Callable[[Sequence[str]], Float[np.ndarray, "n E"]],
) -> HitExplanation:
    """The ``k`` nearest background captions, and the parts of the query; images of the query are left out."""
    cosines = (background.vectors @ image[0]).tolist()
    z_scores = background.z_scores(background.vectors, image)
    order = sorted(range(len(cosines)), key=lambda place: -cosines[place])[:k]
    captions = [CaptionScore(background.captions[place], cosines[place], z_scores[place][0]) for place in order]
    if query is None:
        return HitExplanation(captions, [])
    parts: list[PartScore] = []
    if query.texts:
        rows = encode_texts([text for text, _ in query.texts])
        scores = (rows @ image[0]).tolist()
        z_texts = background.z_scores(rows, image)
        parts += [
            PartScore("text", text, weight, score, z[0])
            for (text, weight), score, z in zip(query.texts, scores, z_texts, strict=True)
        ]
    feedback: list[tuple[_Feedback, tuple[str, ...], float]] = [
        ("like", query.like, ROCCHIO_LIKE),
        ("unlike", query.unlike, -ROCCHIO_UNLIKE),
    ]
    for kind, ids, weight in feedback:
        if ids:
            scores = (stored_vectors(ids) @ image[0]).tolist()
            parts += [
                PartScore(kind, name, weight / len(ids), score, None) for name, score in zip(ids, scores, strict=True)
            ]
    return HitExplanation(captions, parts)
