"""The bodies of requests and answers of the HTTP API, with the examples of its OpenAPI description.

Input: query strings, forms and JSON. Output: pydantic models. Note: an unknown field is an error. Ids, names and
metadata may be file names that are no valid Unicode; ``public_id`` and ``readable`` make text of them that is.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from fastapi import File, Query, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from clasp.plain_types import UserError

_ENCODED = "base64:"
EntryId = Annotated[str, Query(max_length=8000, description="Id of an entry.", examples=["holidays/beach.jpg"])]


def public_id(name: str) -> str:
    """An id as the API gives and takes it: itself, or in base64 where it is no valid Unicode."""
    if name.isprintable() and not name.startswith(_ENCODED):
        return name
    return _ENCODED + base64.urlsafe_b64encode(name.encode("utf-8", "surrogatepass")).decode()


def stored_id(public: str) -> str:
    """Inverse of ``public_id``. ``UserError`` for damaged base64."""
    if not public.startswith(_ENCODED):
        return public
    try:
        return base64.b64decode(public.removeprefix(_ENCODED).encode(), b"-_", validate=True).decode(
            "utf-8", "surrogatepass"
        )
    except (binascii.Error, ValueError):
        raise UserError(f"the id {ascii(public)[:80]} is damaged; take it from the answer of a search") from None


def readable(text: object) -> str:
    """A text in which bytes that are no valid Unicode are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def form_data(model: str) -> dict[str, Any]:
    """That a form may, and with a file must, be sent as multipart."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RankingParameters(_Strict):
    """Which part of a list, and filters."""

    k: int = Field(24, ge=1, description="Entries in the answer.")
    offset: int = Field(0, ge=0, description="Entries to leave out at the start.")
    where: list[str] = Field(
        [],
        description="Filters, all of which must hold: FIELD, one of = != ~ > < >= <=, VALUE.",
        examples=[["folder=a"]],
    )


class QueryParameters(_Strict):
    """A query by words and by ids."""

    q: str = Field(
        "",
        description='Words; "-people" subtracts, "beach^2" and "beach^-2" weigh; in double quotes both are literal.',
        examples=["a dog in the snow -people"],
    )
    plus: list[str] = Field([], description="Further texts of weight 1, taken literally; weights are for q.")
    minus: list[str] = Field([], description="Texts to subtract, taken literally.")
    like: list[str] = Field([], description="Ids of entries that the hits should resemble.")
    unlike: list[str] = Field([], description="Ids of entries that the hits should not resemble.")


class SearchParameters(RankingParameters, QueryParameters):
    """A search by words and by ids."""

    only_close: bool = Field(
        False,
        description="Leave out the hits below the line, where nothing is close; for a query that has words.",
        examples=[True],
    )


class ExplainParameters(QueryParameters):
    """An entry, and the query of which it is a hit; without a query, what it resembles."""

    id: str = Field(description="Id of an entry.", examples=["holidays/beach.jpg"])
    k: int = Field(5, ge=1, le=100, description="Background captions in the answer.")


class ImageSearchParameters(SearchParameters):
    """A search by words, by ids and by images."""

    image_weight: list[float] = Field(
        [],
        description="Weights of the images, in their order; a negative one subtracts. Without, each counts 1.",
        examples=[[1.0, -0.5]],
    )


class SearchForm(ImageSearchParameters):
    """A search by words, ids and uploaded images."""

    image: Annotated[list[UploadFile], File(description="JPEG, PNG, WebP, GIF, BMP or TIFF; several are combined.")] = (
        Field([])
    )


class CommandSearchParameters(ImageSearchParameters):
    """A search of ``clasp search``; the images follow each other in the body."""

    image_bytes: list[int] = Field([], description="Length of each image.")


class SimilarParameters(RankingParameters):
    """More like one entry."""

    id: str = Field(description="Id of an entry.", examples=["holidays/beach.jpg"])


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
    note: str = Field(description="One line about where nothing is close; empty if all hits are.")


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


class ClassifyForm(_Strict):
    """An image and the names of classes."""

    image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")]
    names: list[str] = Field(min_length=1, description="Class names.", examples=[["cat", "dog"]])
    template: str = Field("{}", description="Caption of a class.", examples=["a photo of a {}."])


class ClassifyResponse(BaseModel):
    """The classes, best first."""

    classes: list[ClassScore]


class EmbedTexts(_Strict):
    """Texts to embed."""

    texts: list[str] = Field(min_length=1, examples=[["a dog in the snow", "ein Hund im Schnee"]])


class EmbedForm(_Strict):
    """An image to embed."""

    image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")]


class EmbedResponse(BaseModel):
    """Unit vectors, one a row, and the fingerprint of the model that computed them."""

    model: str
    embeddings: list[list[float]]


class AddForm(_Strict):
    """Images to add."""

    images: Annotated[list[UploadFile], File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")] = Field(min_length=1)


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

    error: str = Field(examples=["search was given the words ' ', which are none"])
