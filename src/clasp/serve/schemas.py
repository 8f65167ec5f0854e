"""The answers of the HTTP API, with the examples of its OpenAPI description.

Input: hits, entries and facts, as ``requests`` and the routes give them. Output: pydantic models.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EntryModel(BaseModel):
    """One indexed image."""

    id: str
    name: str = Field(description="Path of the file, or of the tar or table and the member in it.")
    folder: str
    captions: list[str]
    meta: dict[str, str] = Field(description="Further fields of the pair and of the file.")
    thumbnail: str = Field(description="Address of the thumbnail, relative to the server's.")
    image: str = Field(description="Address of the original, relative to the server's.")


class HitModel(EntryModel):
    """One hit."""

    score: float = Field(description="Cosine similarity.")
    z: float | None = Field(description="Calibrated score: deviations above what background captions score.")
    close: bool | None = Field(description="Whether z reaches the threshold.")
    duplicates: list[EntryModel] = Field(description="Near-duplicates of the hit, folded under it.")


class SearchResponse(BaseModel):
    """Part of a ranking."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "query": "a dog in the snow",
                    "hits": [],
                    "offset": 0,
                    "more": False,
                    "close_count": 0,
                    "p_value": 0.4,
                    "note": "nothing is close: the best hit scores like a random caption does (p = 0.4)",
                }
            ]
        }
    )
    query: str
    hits: list[HitModel]
    offset: int
    more: bool = Field(description="Whether there are hits after these.")
    close_count: int | None = Field(
        description="Hits above the line; beyond the hits of this answer a lower bound. Null without a text."
    )
    p_value: float | None = Field(description="Probability that a caption of something else finds a hit as good.")
    note: str = Field(description="One line: where nothing is close, or that no entry passes the filters; else empty.")


class CaptionModel(BaseModel):
    """A background caption near to an image."""

    text: str = Field(description="As it was encoded, in its language.")
    english: str
    score: float = Field(description="Cosine similarity with the image.")
    z: float = Field(description="Calibrated score, comparable with that of a query.")


class QueryPartModel(BaseModel):
    """A part of the query."""

    kind: Literal["text", "like", "unlike"]
    value: str = Field(description="The text, or the id of the entry.")
    weight: float = Field(description="Its weight in the query, negative for what is subtracted.")
    score: float = Field(description="Cosine similarity with the image.")
    z: float | None = Field(description="Calibrated score of a text.")


class ExplainResponse(BaseModel):
    """Why an image is a hit."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "captions": [{"text": "dogsled", "english": "dogsled", "score": 0.31, "z": 4.2}],
                    "parts": [{"kind": "text", "value": "a dog in the snow", "weight": 1.0, "score": 0.35, "z": 5.1}],
                }
            ]
        }
    )
    captions: list[CaptionModel] = Field(description="The nearest of some hundreds of captions, best first.")
    parts: list[QueryPartModel] = Field(description="The texts and ids of the query, each compared with the image.")


class BrowseResponse(BaseModel):
    """Part of the collection, in the order in which it was indexed."""

    entries: list[EntryModel]
    offset: int
    total: int
    more: bool


class ClassScore(BaseModel):
    """A class name and its cosine similarity with the image."""

    name: str
    score: float


class ClassifyResponse(BaseModel):
    """The classes, best first."""

    classes: list[ClassScore]


class EmbedResponse(BaseModel):
    """Unit vectors, one a row, and the fingerprint of the model that computed them."""

    model: str
    embeddings: list[list[float]]


class AddedResponse(BaseModel):
    """The entries of images that were added, in their order; the same image under the same name is one entry."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "entries": [
                        {
                            "id": "beach-1f3870be274f.jpg",
                            "name": "/home/me/uploads/beach-1f3870be274f.jpg",
                            "folder": "/home/me/uploads",
                            "captions": [],
                            "meta": {"width": "4032", "height": "3024", "bytes": "2048576", "date": "2024-07-31"},
                            "thumbnail": "api/thumbnail?id=beach-1f3870be274f.jpg&v=1f3870be274f",
                            "image": "api/image?id=beach-1f3870be274f.jpg&v=1f3870be274f",
                        }
                    ]
                }
            ]
        }
    )
    entries: list[EntryModel]


class DeletedResponse(BaseModel):
    """The entry that was deleted."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "beach-1f3870be274f.jpg", "file_deleted": True}]})
    id: str
    file_deleted: bool = Field(description="Whether the file was deleted as well: that of an image added by HTTP is.")


class FieldModel(BaseModel):
    """A field that filters can name, with its most frequent values and how many entries have each."""

    name: str
    values: dict[str, int]


class InfoResponse(BaseModel):
    """The collection and the model."""

    run: str
    model: str
    entries: int
    fields: list[FieldModel]
    limits: dict[str, float]
    changes: bool = Field(description="Whether images can be added and entries deleted.")


class ErrorResponse(BaseModel):
    """What was wrong, in one line."""

    error: str = Field(examples=["search was given the words ' ', which are blank"])
