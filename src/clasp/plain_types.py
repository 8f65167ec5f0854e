"""Shared data types and protocols without tensors: pairs, hits, models to search with, stores and callbacks.

Everything here is data or a protocol; there is no behaviour. Note: search and serving import these and no torch, since
an exported model is served where there is none. ``clasp.types``, which has the shape letters, has their names too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from clasp.errors import UserError as UserError

MessageCallback = Callable[[str], None]
"""Called with a line to show to the user"""
ProgressCallback = Callable[[int, int], None]
"""Called with the number of items done and the total"""
ProgressFactory = Callable[[str], AbstractContextManager[ProgressCallback]]
"""Opens a progress bar with the given title"""

MAX_COUNT = 1_000_000_000
"""Largest number of pairs, steps or epochs in a recipe"""

Precision = Literal["float32", "bfloat16"]
"""What a forward pass computes in"""
AttentionKernel = Literal["fused", "plain"]
"""PyTorch's attention, or plain matrix products and a softmax"""
StorageDtype = Literal["float32", "float16", "bfloat16", "int8"]
"""The dtype of cached features on disk"""


# --- pairs ---------------------------------------------------------------------------------------------------------


class Caption(NamedTuple):
    """One caption and the language it is in (a BCP 47 tag such as ``sw``; empty when unknown)."""

    text: str
    language: str = ""


@runtime_checkable
class ImageSource(Protocol):
    """Where the bytes of one image are: a file, a byte range of a tar, a cell of a table."""

    @property
    def name(self) -> str:
        """The name shown to the user: a path, or ``shard.tar::member.jpg``."""
        ...

    @property
    def version(self) -> str:
        """Changes when the bytes may have changed (size and modification time of the file, offset in the tar)."""
        ...

    def read(self) -> bytes:
        """The encoded image."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its captions.

    ``id`` is stable: it does not depend on the order of reading and is that of the search hit.
    Pairs of one ``group`` depict the same thing (by default a pair is its own group): they are never each
    other's negatives, and a validation split never separates them.
    """

    id: str
    image: ImageSource
    captions: tuple[Caption, ...]
    group: str
    meta: Mapping[str, Any] = field(default_factory=dict)


class SkippedSample(NamedTuple):
    """A sample that could not be read, and why."""

    id: str
    reason: str


# --- search ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class PixelTransform(Protocol):
    """The preprocessing of an image tower."""

    @property
    def size(self) -> int:
        """Side of the square output, pixels."""
        ...

    def __call__(self, image: bytes) -> Float[Any, "3 height width"]:
        """The normalised image. Raises ``clasp.data.decoding.ImageError``."""
        ...


@runtime_checkable
class SearchModel(Protocol):
    """A dual encoder with its preprocessing, as search uses it: ``EmbeddingModel`` of a run, or ``OnnxModel``.

    Pixels and embeddings are arrays that numpy reads: numpy's own, or torch's on the CPU. Embeddings have unit length.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that an embedding in a store depends on."""
        ...

    @property
    def transform(self) -> PixelTransform: ...

    def in_precision_of(self, fingerprint: str) -> SearchModel:
        """The same model in the precision of a store with this fingerprint, or this model if it has none such."""
        ...

    def encode_image(self, images: Sequence[Any]) -> Float[Any, "n E"]:
        """Paths, encoded bytes or PIL images to embeddings. ``UserError`` for one that cannot be read."""
        ...

    def encode_pixels(self, pixels: Float[np.ndarray, "n 3 height width"]) -> Float[Any, "n E"]:
        """Outputs of ``transform`` to embeddings."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Float[Any, "n E"]:
        """Strings to embeddings. ``UserError`` for one that is no text."""
        ...


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result; ``score`` is a cosine similarity."""

    id: str
    score: float
    meta: Mapping[str, Any]


@runtime_checkable
class Store(Protocol):
    """A vector store: vectors with ids and metadata, independent of any model."""

    def add(self, ids: Sequence[str], vectors: Float[np.ndarray, "n E"], meta: Sequence[Mapping[str, Any]]) -> None: ...

    def delete(self, ids: Iterable[str]) -> int: ...

    def search(
        self,
        queries: Float[np.ndarray, "q E"],
        k: int,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> list[list[Hit]]: ...

    def count(self) -> int: ...

    def close(self) -> None: ...


def no_progress(done: int, total: int) -> None:
    """A ``ProgressCallback`` that does nothing."""


def no_progress_bar(title: str) -> AbstractContextManager[ProgressCallback]:
    """A ``ProgressFactory`` that shows nothing."""
    return nullcontext(lambda done, total: None)
