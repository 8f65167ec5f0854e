"""What requests of the HTTP API hold, with the examples of its OpenAPI description: query strings, forms and JSON.

Input: a request. Output: pydantic models, which ``requests`` makes queries of. Note: an unknown field is an error.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import File, Query, UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator

EntryId = Annotated[str, Query(max_length=8000, description="Id of an entry.", examples=["holidays/beach.jpg"])]


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
        description="Leave out the hits below the line, where nothing is close to the words of the query.",
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

    @field_validator("image", "image_weight", mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        """An empty field of a form is none."""
        return [each for each in given if each != ""] if isinstance(given, list) else given


class CommandSearchParameters(ImageSearchParameters):
    """A search of ``clasp search``; the images follow each other in the body."""

    image_bytes: list[int] = Field([], description="Length of each image.")


class SimilarParameters(RankingParameters):
    """More like one entry."""

    id: str = Field(description="Id of an entry.", examples=["holidays/beach.jpg"])


class ClassifyForm(_Strict):
    """An image and the names of classes."""

    image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")]
    names: list[str] = Field(min_length=1, description="Class names.", examples=[["cat", "dog"]])
    template: str = Field("{}", description="Caption of a class.", examples=["a photo of a {}."])


class EmbedTexts(_Strict):
    """Texts to embed."""

    texts: list[str] = Field(min_length=1, examples=[["a dog in the snow", "ein Hund im Schnee"]])


class EmbedForm(_Strict):
    """An image to embed."""

    image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")]


class AddForm(_Strict):
    """Images to add."""

    images: Annotated[list[UploadFile], File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")] = Field(min_length=1)
