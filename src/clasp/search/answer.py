"""The answer to a search: hits in groups of near-duplicates, each with a calibrated score, and where nothing is close.

Input: an engine, a composed query, filters and which part of the ranking is wanted. Output: a ``SearchAnswer``. Note:
hits below the line are returned like the others, unless the request wants close ones only. The calibrated score is
that of the texts of positive weight; a query without any (an image, more-like-this) has none, since captions are no
background for images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from clasp.data.formats.rows import shorten
from clasp.plain_types import Hit, UserError
from clasp.search.background import BEST_HITS, Background, nothing_close_line
from clasp.search.engine import SearchEngine
from clasp.search.metadata_filter import MetadataFilter, all_of
from clasp.search.near_duplicates import HitGroup, fold_near_duplicates
from clasp.search.query import SearchQuery

TextEncoder = Callable[[list[str]], Float[np.ndarray, "n E"]]


@dataclass(frozen=True, slots=True)
class RankedHit:
    """A group of near-duplicate hits; ``z`` and ``close`` are ``None`` where the query has no calibrated score."""

    group: HitGroup
    z: float | None = None
    """Standard deviations of the background captions by which the hit exceeds their mean."""
    close: bool | None = None
    """Whether ``z`` reaches the threshold of the background."""

    @property
    def hit(self) -> Hit:
        """The best hit of the group."""
        return self.group.hit


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """Part of a ranking. ``more``: whether there are hits beyond it."""

    hits: list[RankedHit]
    p_value: float | None
    """Probability that a caption of something else finds a best hit as good; ``None`` if there is no text."""
    close_count: int | None
    """Groups of the ranking above the line, below which nothing is close; beyond the part it is a lower bound."""
    more: bool
    only_close: bool = False
    """Whether hits below the line were left out."""
    none_passes: bool = False
    """Whether no entry passes the filters"""

    @property
    def line_note(self) -> str:
        """One line about where nothing is close any more, for a reader of the first hits, or that no entry passes the
        filters; empty if all hits are close."""
        if self.none_passes:
            return "no picture passes these filters"
        if self.p_value is None or self.close_count is None:
            return ""
        if self.close_count == 0 and (self.hits or self.only_close):
            return nothing_close_line(self.p_value)
        if self.close_count >= len(self.hits):
            return ""
        return f"below hit {self.close_count} nothing is close: those hits score like hits of a random caption do"

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain data for JSON, with all metadata."""
        hits = [
            {
                **asdict(ranked.hit),
                "z": ranked.z,
                "close": ranked.close,
                "duplicates": [hit.id for hit in ranked.group.duplicates],
            }
            for ranked in self.hits
        ]
        return {"hits": hits, "p_value": self.p_value, "close_count": self.close_count, "note": self.line_note}


@dataclass(frozen=True, slots=True)
class RankingPart:
    """Which groups of the ranking are wanted, and of which entries."""

    k: int = 10
    offset: int = 0
    filters: Sequence[MetadataFilter] = ()
    only_close: bool = False
    """Leave out hits below the line, which the words of the query draw, whatever else it has"""


def answer_query(
    engine: SearchEngine,
    background: Background,
    query: SearchQuery,
    part: RankingPart,
    *,
    encode_texts: TextEncoder,
    encode_images: Callable[[list[Any]], Float[np.ndarray, "n E"]],
) -> SearchAnswer:
    """Search, fold near-duplicates, calibrate. ``UserError`` as for ``SearchEngine.search`` and ``check_part``."""
    check_part(part, query)
    words = query.words_only()
    vector = query.vector(encode_texts, encode_images, engine.stored_vectors)
    groups, more = _groups(engine, background, vector, part)
    best = groups[: part.offset + part.k + BEST_HITS]
    wanted = slice(part.offset, part.offset + part.k)
    if words is None or not best:
        none_passes = not groups and bool(part.filters)
        return SearchAnswer([RankedHit(group) for group in groups[wanted]], None, None, more, none_passes=none_passes)
    text = vector if words == query else words.vector(encode_texts, encode_images, engine.stored_vectors)
    (z_scores,) = background.z_scores(text, engine.stored_vectors([group.hit.id for group in best]))
    close = [z >= background.threshold for z in z_scores]
    count = _count_above_line(close)
    ranked = [RankedHit(*each) for each in zip(best, z_scores, close, strict=True)]
    p_value = background.p_value(max(z_scores[:BEST_HITS]))
    if part.only_close:
        return SearchAnswer(ranked[:count][wanted], p_value, count, count > wanted.stop, only_close=True)
    return SearchAnswer(ranked[wanted], p_value, count, more)


def check_part(part: RankingPart, query: SearchQuery) -> None:
    """``UserError`` where only close hits are wanted of a query that has no calibrated score."""
    if part.only_close and query.words_only() is None:
        raise UserError(
            f"the search {shorten(str(query))} has no words to find, and words alone tell which hits are close; "
            "add words, or ask for all hits"
        )


def _count_above_line(close: Sequence[bool]) -> int:
    """The number of hits before the first ``BEST_HITS`` in a row of which none is close."""
    count = 0
    for place, is_close in enumerate(close):
        if is_close:
            count = place + 1
        elif place + 1 - count >= BEST_HITS:
            break
    return count


def _groups(
    engine: SearchEngine, background: Background, vector: Float[np.ndarray, "1 E"], part: RankingPart
) -> tuple[list[HitGroup], bool]:
    """Groups of the ranking from its start, enough for the part, and whether there are more."""
    needed = part.offset + part.k + BEST_HITS  # so many beyond the part tell whether the line is in it
    count = needed
    while True:
        hits = engine.search_vector(vector, count, all_of(part.filters))
        groups = fold_near_duplicates(
            hits, engine.stored_vectors([hit.id for hit in hits]), background.facts.near_duplicate
        )
        if len(groups) >= needed or len(hits) < count:
            return groups, len(groups) > part.offset + part.k
        count *= 2
