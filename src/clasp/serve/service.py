"""The search service: one model and one index, asked by many threads at once.

Input: an ``IndexSource`` and limits. Output: answers, entries, thumbnails and embeddings; nothing here is HTTP. Note:
the index is read as of the moment it was opened; when it has changed on disk it is opened anew, at most every two
seconds, beside the one that running requests use, which stays where the new one is damaged. Images are served by the id
of their entry only, read through ``SearchEngine.read_image``, which checks their hash.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from clasp.data.decoding import ImageError
from clasp.data.formats.rows import is_blank, require_unicode, shorten
from clasp.data.image_header import read_image_header
from clasp.plain_types import Hit, SearchModel, UserError
from clasp.search.answer import RankingPart, SearchAnswer, answer_query
from clasp.search.background import Background
from clasp.search.engine import SearchEngine, UpdatableStore
from clasp.search.explanation import HitExplanation, explain_hit
from clasp.search.flat_store import FlatStore
from clasp.search.metadata_filter import (
    FilterFields,
    MetadataFilter,
    all_of,
    entry_fields,
    entry_values,
)
from clasp.search.query import SearchQuery
from clasp.serve.limits import ServeLimits
from clasp.serve.metrics import ServerMetrics
from clasp.serve.model_queue import ModelQueue
from clasp.serve.thumbnails import ThumbnailCache

_log = logging.getLogger(__name__)

_RECHECK_SECONDS = 2.0
_FREQUENT_VALUES = 50


class OpenedIndex(NamedTuple):
    """The engine of an index, and its background."""

    engine: SearchEngine
    background: Background


@runtime_checkable
class IndexSource(Protocol):
    """Opens the index of a run, as often as it changes."""

    @property
    def version(self) -> object:
        """Changes when the index does."""
        ...

    def open(self) -> OpenedIndex:
        """The index as it is now; ``UserError`` if it cannot be opened."""
        ...

    def writer(self, opened: UpdatableStore) -> AbstractContextManager[UpdatableStore]:
        """A store to change the index in, while ``opened``, the store of an earlier ``open``, is read.

        It is another object on the same index, or ``opened`` itself. ``UserError`` while another process writes.
        """
        ...

    def refreshed(self, opened: OpenedIndex, store: UpdatableStore) -> OpenedIndex:
        """The index after a change in ``store``, which ``writer`` gave."""
        ...


class EncodedImage(NamedTuple):
    """An image as bytes, with its media type."""

    data: bytes
    media_type: str


class NoSuchEntryError(UserError):
    """There is no entry of this id, or its image cannot be read any more."""


class _Catalogue:
    """Ids in the order of indexing, and the fields that filters can name; read once for an index, when asked for."""

    def __init__(self, engine: SearchEngine) -> None:
        self.ids: list[str] = []
        self.fields = FilterFields()
        counts: dict[str, Counter[str]] = {"folder": Counter(), "language": Counter()}
        for name, meta in engine.store.scan():
            self.ids.append(name)
            fields = entry_fields(meta)
            self.fields.add(meta)
            for field in {*fields, "folder", "language"} - {"bytes"}:  # nearly every file has a size of its own
                values = map(str, entry_values(meta, field))
                counts.setdefault(field, Counter()).update(value for value in values if len(value) <= 80)
        names = self.fields.names
        self.values = {name: dict(counts.get(name, Counter()).most_common(_FREQUENT_VALUES)) for name in names}


class SearchService:
    """One model, one index. Every method raises ``UserError`` for what a request has wrong, before any compute."""

    def __init__(self, source: IndexSource, thumbnails: Path, limits: ServeLimits, metrics: ServerMetrics) -> None:
        self.limits, self.metrics = limits, metrics
        self._source, self._version = source, source.version
        self._index = source.open()
        self._catalogue: _Catalogue | None = None
        self._checked, self._lock, self._changing = time.monotonic(), threading.Lock(), threading.Lock()
        self._thumbnails = ThumbnailCache(thumbnails, limits.pixels)
        self._queue = ModelQueue(
            self.model, waiting=limits.waiting, seconds=limits.seconds, on_call=metrics.count_model_call
        )
        metrics.gauge("clasp_model_queue_depth", lambda: self._queue.depth)
        metrics.gauge("clasp_index_entries", lambda: self._index.engine.store.count())

    @property
    def model(self) -> SearchModel:
        """The model in memory."""
        return self._index.engine.model

    def close(self) -> None:
        """Answer what waits for the model, then stop and release the index."""
        self._queue.close()
        self._index.engine.store.close()

    def count(self) -> int:
        """Number of entries."""
        return self._current().engine.store.count()

    def fields(self) -> dict[str, dict[str, int]]:
        """The fields that filters can name, with frequent values and their counts."""
        return self._entries().values

    # --- searching ---------------------------------------------------------------------------------------------------

    def search(self, query: SearchQuery, part: RankingPart) -> SearchAnswer:
        """The part of the ranking. Images of the query are encoded bytes."""
        index = self._current()
        self._check_filters(part.filters)
        for text, _ in query.texts:
            self._check_text(text)
        return answer_query(
            index.engine,
            index.background,
            query,
            part,
            encode_texts=self._queue.encode_texts,
            encode_images=self._embed_images,
        )

    def browse(self, part: RankingPart) -> tuple[list[Hit], int]:
        """Part of the collection in the order of indexing, and how many entries pass the filters."""
        self._check_filters(part.filters)
        index, ids = self._current(), self._entries().ids
        where = all_of(part.filters)
        if where is not None:
            ids = [name for name, meta in index.engine.store.scan() if where(meta)]
        wanted = ids[part.offset : part.offset + part.k]
        return [self.entry(name) for name in wanted], len(ids)

    def explain(self, name: str, query: SearchQuery | None, k: int) -> HitExplanation:
        """Why an entry is a hit of a query, or what it resembles. Raises ``NoSuchEntryError``."""
        index = self._current()
        self.entry(name, index.engine.store)
        for text, _ in query.texts if query is not None else ():
            self._check_text(text)
        vectors = index.engine.stored_vectors
        return explain_hit(
            vectors([name]), index.background, query, k, encode_texts=self._queue.encode_texts, stored_vectors=vectors
        )

    def classify(self, image: bytes, names: Sequence[str], template: str) -> list[tuple[str, float]]:
        """Class names with their cosines with the image, best first: zero-shot classification."""
        if "{}" not in template:
            raise UserError(f"the template {shorten(template)} has no {{}}, where the class name goes")
        for name in (*names, template):
            self._check_text(name)
        if len(names) > self.limits.texts:
            raise UserError(f"{len(names)} class names are too many; at most {self.limits.texts}")
        pixels = self._pixels(image)
        texts = self._queue.encode_texts([template.replace("{}", name) for name in names])
        cosines = (texts @ self._queue.encode_pixels(pixels)[0]).tolist()
        return sorted(zip(names, cosines, strict=True), key=lambda each: -each[1])

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Unit vectors of texts."""
        if len(texts) > self.limits.texts:
            raise UserError(f"{len(texts)} texts are too many; at most {self.limits.texts}")
        for text in texts:
            self._check_text(text)
        return self._queue.encode_texts(texts)

    def _embed_images(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        """All in one call of the model: one deadline, however many."""
        return self._queue.encode_pixels(np.concatenate([self._pixels(data) for data in images]))

    def embed_image(self, data: bytes) -> Float[np.ndarray, "1 E"]:
        """The unit vector of an encoded image."""
        return self._queue.encode_pixels(self._pixels(data))

    # --- images ------------------------------------------------------------------------------------------------------

    def thumbnail(self, name: str) -> EncodedImage:
        """The thumbnail of an entry. Raises ``NoSuchEntryError``."""
        hit = self.entry(name)
        try:
            data = self._thumbnails.get(hit.meta["sha256"], lambda: self._index.engine.read_image(hit))
        except (UserError, ImageError) as error:
            raise NoSuchEntryError(str(error)) from None
        return EncodedImage(data, "image/webp")

    def original(self, name: str) -> EncodedImage:
        """The indexed image as it is, with the media type of its decoder. Raises ``NoSuchEntryError``."""
        hit = self.entry(name)
        try:
            data = self._index.engine.read_image(hit)
            return EncodedImage(data, read_image_header(data, self.limits.pixels).media_type)
        except (UserError, ImageError) as error:
            raise NoSuchEntryError(str(error)) from None

    def media_type(self, data: bytes) -> str:
        """The media type of an uploaded image, by its decoder."""
        try:
            return read_image_header(data, self.limits.pixels).media_type
        except ImageError as error:
            raise UserError(f"the uploaded image cannot be read: {error}") from None

    def forget_thumbnail(self, sha256: str) -> None:
        """Delete the thumbnail of an image; it is made again if another entry has the same bytes."""
        self._thumbnails.discard(sha256)

    # --- changing the index ------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[UpdatableStore]:
        """A store to change the index in, one change at a time; the next request sees the change.

        ``UserError`` while another process writes to the index, or for too many changes at once.
        """
        if not self._changing.acquire(timeout=self.limits.seconds):
            raise UserError("other changes of the index take too long; try again")
        try:
            opened = self._current(max_age=0.0).engine.store
            with self._source.writer(opened) as store:
                yield store
                version = self._source.version  # while no other process can write
            with self._lock:
                self._index = self._source.refreshed(self._index, store)
                self._version = self._source.version if store is opened else version
                self._catalogue = None
        finally:
            self._changing.release()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _current(self, max_age: float | None = None) -> OpenedIndex:
        """The index, opened anew if it has changed; whether it has is looked up after ``max_age`` seconds."""
        with self._lock:
            now = time.monotonic()
            if max_age is None and self._changing.locked():
                return self._index  # a change of our own is not read from disk
            if now - self._checked >= (_RECHECK_SECONDS if max_age is None else max_age):
                self._checked = now
                self._open_again()
            return self._index

    def _open_again(self) -> None:
        """Open the index if it has changed; the lock is held."""
        version = self._source.version
        if version == self._version:
            return
        try:
            opened = self._source.open()
            if isinstance(opened.engine.store, FlatStore):
                opened.engine.store.verify()  # opening reads no vectors
            self._index, self._version, self._catalogue = opened, version, None
        except UserError as error:
            _log.warning("the index has changed and cannot be opened; the earlier one is used: %s", error)

    def _entries(self) -> _Catalogue:
        index = self._current()
        with self._lock:
            if self._catalogue is None:
                self._catalogue = _Catalogue(index.engine)
            return self._catalogue

    def entry(self, name: str, store: UpdatableStore | None = None) -> Hit:
        """The entry of an id, in the index or in ``store``. Raises ``NoSuchEntryError``."""
        try:
            meta: Mapping[str, Any] = (self._index.engine.store if store is None else store).metadata([name])[0]
        except KeyError:
            raise NoSuchEntryError(f"no image is indexed under the id {shorten(name)}") from None
        return Hit(name, 0.0, meta)

    def _check_filters(self, filters: Sequence[MetadataFilter]) -> None:
        if filters:
            self._entries().fields.check(filters)

    def _check_text(self, text: str) -> None:
        require_unicode(text, "a text of the request")
        if is_blank(text):
            raise UserError(f"a text of the request is {text[:20]!r}, which is blank")
        if len(text) > self.limits.text_chars:
            raise UserError(f"a text of {len(text)} characters is too long; at most {self.limits.text_chars}")

    def _pixels(self, data: bytes) -> Float[np.ndarray, "1 3 height width"]:
        try:
            read_image_header(data, self.limits.pixels)
            return np.asarray(self.model.transform(data))[None]
        except ImageError as error:
            raise UserError(f"the uploaded image cannot be read: {error}") from None
