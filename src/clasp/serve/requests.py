"""From the bodies of requests to queries, and from hits to the bodies of answers.

Input: the models of ``parameters`` and limits. Output: a ``SearchQuery``, a ``RankingPart``, or models to answer with;
``UserError`` for what exceeds a limit. Note: ids are public ones on this side (see ``public_text``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any
from urllib.parse import urlencode

from clasp.plain_types import Hit, UserError
from clasp.search.answer import RankedHit, RankingPart, SearchAnswer
from clasp.search.explanation import HitExplanation
from clasp.search.image_weights import weigh_images
from clasp.search.metadata_filter import entry_fields, entry_folder, parse_filter
from clasp.search.query import MINUS_WEIGHT, SearchQuery, WeightedImage, WeightedText, parse_words
from clasp.serve.limits import ServeLimits
from clasp.serve.parameters import (
    CommandSearchParameters,
    ExplainParameters,
    ImageSearchParameters,
    QueryParameters,
    RankingParameters,
)
from clasp.serve.public_text import public_id, readable, stored_id
from clasp.serve.schemas import CaptionModel, EntryModel, ExplainResponse, HitModel, QueryPartModel, SearchResponse


def query_of(given: QueryParameters, images: Sequence[WeightedImage], limits: ServeLimits) -> SearchQuery:
    """The query of a request. ``UserError`` for one that is empty, too long or too large."""
    parts = (*given.plus, *given.minus, *given.like, *given.unlike)
    if len(images) > limits.images:
        raise UserError(f"a search by {len(images)} images is too large; at most {limits.images}")
    if len(parts) + len(images) > limits.parts:
        count = len(parts) + len(images)
        raise UserError(f"a search of {count} texts, images and ids is too large; at most {limits.parts}")
    _check_lengths((given.q, *parts), limits)
    words = parse_words(given.q) if given.q else ()
    plus = (WeightedText(text) for text in given.plus)
    minus = (WeightedText(text, MINUS_WEIGHT) for text in given.minus)
    return SearchQuery(
        (*words, *plus, *minus),
        tuple(images),
        tuple(map(stored_id, given.like)),
        tuple(map(stored_id, given.unlike)),
    )


def weighted_images(given: ImageSearchParameters, images: Sequence[bytes]) -> list[WeightedImage]:
    """The images of a request with their weights. ``UserError`` for another number of weights than images."""
    return [WeightedImage(*each) for each in weigh_images(images, given.image_weight, "image_weight")]


def split_images(given: CommandSearchParameters, body: bytes) -> list[bytes]:
    """The images in the body of a command's search; without their lengths the body is one, as an earlier command sends
    it. ``UserError`` where the lengths are not those of the body."""
    if body and not given.image_bytes:
        return [body]
    if min(given.image_bytes, default=1) < 1 or sum(given.image_bytes) != len(body):
        raise UserError(f"image_bytes adds up to {sum(given.image_bytes)}, and {len(body)} bytes were sent")
    ends = list(accumulate(given.image_bytes))
    return [body[end - size : end] for size, end in zip(given.image_bytes, ends, strict=True)]


def part_of(given: RankingParameters, limits: ServeLimits, only_close: bool = False) -> RankingPart:
    """Which entries a request wants. ``UserError`` for too many, and for filters that are none."""
    if given.k > limits.k:
        raise UserError(f"k = {given.k} is too many; at most {limits.k} in one answer")
    if given.offset > limits.depth:
        raise UserError(f"offset = {given.offset} is too far down; at most {limits.depth}")
    if len(given.where) > limits.parts:
        raise UserError(f"{len(given.where)} filters are too many; at most {limits.parts}")
    _check_lengths(given.where, limits)
    return RankingPart(given.k, given.offset, [parse_filter(condition) for condition in given.where], only_close)


def explained_query(given: ExplainParameters, limits: ServeLimits) -> SearchQuery | None:
    """The query of an explanation; ``None`` if the request has none."""
    has_query = given.q or given.plus or given.minus or given.like or given.unlike
    return query_of(given, (), limits) if has_query else None


def explain_response(why: HitExplanation) -> ExplainResponse:
    """An explanation, as the API gives it."""
    return ExplainResponse(
        captions=[
            CaptionModel(text=caption.text, english=caption.english, score=score, z=z)
            for caption, score, z in why.captions
        ],
        parts=[
            QueryPartModel(
                kind=part.kind,
                value=readable(part.value) if part.kind == "text" else public_id(part.value),
                weight=part.weight,
                score=part.score,
                z=part.z,
            )
            for part in why.parts
        ],
    )


def search_response(title: str, offset: int, answer: SearchAnswer) -> SearchResponse:
    """The answer to a search, as the API gives it."""
    return SearchResponse(
        query=readable(title),
        hits=[_hit_model(ranked) for ranked in answer.hits],
        offset=offset,
        more=answer.more,
        close_count=answer.close_count,
        p_value=answer.p_value,
        note=answer.line_note if offset == 0 else "",
    )


def query_title(query: SearchQuery) -> str:
    """The query in one line, with images unnamed and ids as they are stored."""
    return str(
        SearchQuery(query.texts, tuple(WeightedImage(b"", w) for _, w in query.images), query.like, query.unlike)
    )


def entry_model(hit: Hit) -> EntryModel:
    """An entry, as the API gives it."""
    return EntryModel(**_entry_fields(hit))


def _hit_model(ranked: RankedHit) -> HitModel:
    return HitModel(
        **_entry_fields(ranked.hit),
        score=ranked.hit.score,
        z=ranked.z,
        close=ranked.close,
        duplicates=[entry_model(hit) for hit in ranked.group.duplicates],
    )


def _entry_fields(hit: Hit) -> dict[str, Any]:
    meta: Mapping[str, Any] = hit.meta
    address = urlencode({"id": public_id(hit.id), "v": str(meta["sha256"])[:12]})
    return {
        "id": public_id(hit.id),
        "name": readable(meta["name"]),
        "folder": readable(entry_folder(meta)),
        "captions": [readable(caption["text"]) for caption in meta["captions"]],
        "meta": {readable(key): _value_text(value) for key, value in entry_fields(meta).items()},
        "thumbnail": f"api/thumbnail?{address}",
        "image": f"api/image?{address}",
    }


def _check_lengths(texts: Iterable[str], limits: ServeLimits) -> None:
    for text in texts:
        if len(text) > limits.text_chars:
            raise UserError(f"a text of {len(text)} characters is too long; at most {limits.text_chars}")


def _value_text(value: Any) -> str:
    return readable(value if isinstance(value, str) else json.dumps(value))
