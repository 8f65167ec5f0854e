"""Image retrieval: search a store of image embeddings with a text query, an image query, or both.

Input: a ``SearchModel``, a store that ``clasp.search.indexer`` filled, and a ``SearchQuery`` or its vector. Output:
hits, nearest first, with the source of their image. Note: a store records the model of its vectors, so a query cannot
be another model's.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from clasp.data.formats.rows import shorten
from clasp.plain_types import Hit, SearchModel, Store, UserError
from clasp.search.entries import source_from_dict
from clasp.search.query import SearchQuery

_log = logging.getLogger(__name__)


@runtime_checkable
class UpdatableStore(Store, Protocol):
    """A ``Store`` that an ``Indexer`` can update: it records the model, and returns stored metadata and vectors."""

    @property
    def model(self) -> str:
        """Fingerprint of the model that computed the vectors; empty if none is recorded."""
        ...

    @property
    def model_name(self) -> str:
        """Its name, for messages."""
        ...

    def claim(self, model: str, name: str) -> None:
        """Record the model of the vectors; ``UserError`` if the stored ones are another model's."""
        ...

    def clear(self) -> None:
        """Delete all entries, and the recorded model."""
        ...

    def scan(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every id with its metadata."""
        ...

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """The unit vectors stored under these ids; ``KeyError`` for an id that is not stored."""
        ...

    def metadata(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        """The metadata stored under these ids; ``KeyError`` for an id that is not stored."""
        ...


class SearchEngine:
    """A model and the store of its image embeddings. ``UserError`` when the store holds another model's embeddings."""

    def __init__(self, model: SearchModel, store: UpdatableStore) -> None:
        self.model = model = model.in_precision_of(store.model)
        self.store = store
        store.claim(model.fingerprint, model.name)

    @classmethod
    def for_indexing(cls, model: SearchModel, store: UpdatableStore) -> SearchEngine:
        """An engine for indexing: embeddings of another model are dropped first, with a warning in the log."""
        model = model.in_precision_of(store.model)
        if store.count() and store.model != model.fingerprint:
            _log.warning("%d embeddings were made with another model and are dropped", store.count())
            store.clear()
        return cls(model, store)

    def over(self, store: UpdatableStore) -> SearchEngine:
        """The same engine over another state of its store."""
        made = copy.copy(self)
        made.store = store
        return made

    def search(
        self, query: SearchQuery, k: int = 10, where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> list[Hit]:
        """The ``k`` images nearest by cosine to a query, best first.

        ``where`` filters by metadata (see ``clasp.search.entries``). ``UserError`` for an image that cannot be read, an
        id that is not stored, ``k`` below 1, a query that cancels itself out, and an empty store.
        """
        self._check_search(k)
        vector = query.vector(self.encode_texts, self.encode_images, self.stored_vectors)
        return self.store.search(vector, k, where)[0]

    def search_vector(
        self, vector: Float[np.ndarray, "1 E"], k: int, where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> list[Hit]:
        """The ``k`` images nearest by cosine to a vector. ``UserError`` for ``k`` below 1 and an empty store."""
        self._check_search(k)
        return self.store.search(vector, k, where)[0]

    def _check_search(self, k: int) -> None:
        if k < 1:
            raise UserError(f"k = {k}: a search returns at least 1 image")
        if not self.store.count():
            raise UserError("nothing has been indexed yet; type: clasp index RUN FOLDER")

    def stored_vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """The unit vectors stored under these ids; ``UserError`` for an id that is not stored."""
        try:
            return self.store.vectors(ids)
        except KeyError as error:
            raise UserError(f"no image is indexed under the id {shorten(error.args[0])}") from None

    def encode_images(self, images: list[Any]) -> Float[np.ndarray, "n E"]:
        """Embeddings of images: paths, encoded bytes or Pillow images. ``UserError`` for one that cannot be read."""
        return np.asarray(
            self.model.encode_image([str(image) if isinstance(image, Path) else image for image in images])
        )

    def encode_texts(self, texts: list[str]) -> Float[np.ndarray, "n E"]:
        """Embeddings of texts. ``UserError`` for one that is no text."""
        return np.asarray(self.model.encode_text(texts))

    @staticmethod
    def read_image(hit: Hit) -> bytes:
        """The encoded image of a hit, read from its source; ``UserError`` when it is gone or has changed since."""
        name, source = hit.meta["name"], hit.meta["source"]
        if source is None:
            raise UserError(f"{name} cannot be read again: its source was of a class clasp does not know")
        try:
            data = source_from_dict(source).read()
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: {error}") from None
        if hashlib.sha256(data).hexdigest() != hit.meta["sha256"]:
            raise UserError(f"{name} has changed since it was indexed; type: clasp index RUN FOLDER")
        return data
