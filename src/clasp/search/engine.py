"""Image retrieval: embed images into a store, then search it with a text query, an image query, or both.

Input: a ``SearchModel``, a store, and pairs or the images of a folder. Output: an ``IndexReport``, and hits with
the source of their image. Note: an image is identified by the sha256 of its bytes. A stored image is not encoded again
when it is renamed, moved or copied, and a file of unchanged size and modification time is not even read. Each batch is
stored before the next is encoded, so an interrupted ``index`` resumes where it stopped. An entry records the folder,
table or tar it came from, and is dropped when that is indexed again without it. A long class: indexing and searching
share the model, the store and the meaning of an entry.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from clasp.data.decoding import ImageError
from clasp.data.file_fields import read_file_fields
from clasp.data.formats.rows import shorten
from clasp.data.formats.skipped_files import SkippedFiles, escape_name
from clasp.data.pairs import ParquetSource
from clasp.data.read_ahead import DECODE_THREADS, read_ahead
from clasp.errors import counted
from clasp.plain_types import (
    Hit,
    ImageSource,
    ProgressCallback,
    SearchModel,
    SkippedSample,
    Store,
    UserError,
    no_progress,
)
from clasp.search.entries import (
    IndexEntry,
    IndexItems,
    StoredEntries,
    build_entries,
    listed_origins,
    source_from_dict,
)
from clasp.search.query import SearchQuery, WeightedImage, WeightedText

_log = logging.getLogger(__name__)


@runtime_checkable
class UpdatableStore(Store, Protocol):
    """A ``Store`` that ``SearchEngine`` can update: it records the model, and returns stored metadata and vectors."""

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


@runtime_checkable
class ComputedVectors(Protocol):
    """Embeddings of images that were computed elsewhere with the same model, by the sha256 of the image's bytes."""

    def sha256_of(self, source: ImageSource) -> str:
        """The sha256 of this image, if its embedding is here and it has not changed since; else an empty string."""
        ...

    def vector(self, sha256: str) -> Float[np.ndarray, " E"] | None:
        """The unit vector of these bytes; ``None`` if it is not here."""
        ...

    def file_fields(self, sha256: str) -> Mapping[str, Any] | None:
        """What ``read_file_fields`` returned for these bytes; ``None`` if their embedding is not here."""
        ...


class _NothingComputed:
    """A ``ComputedVectors`` without any."""

    def sha256_of(self, source: ImageSource) -> str:
        return ""

    def vector(self, sha256: str) -> None:
        return None

    def file_fields(self, sha256: str) -> None:
        return None


@dataclass(frozen=True)
class IndexReport:
    """What ``SearchEngine.index`` did; one image is one entry, however many pairs it has."""

    added: int
    """Images that are new, or have changed since they were indexed."""
    unchanged: int
    """Images already stored, the same bytes under the same id."""
    skipped: list[SkippedSample]
    """Images that could not be read: id and reason."""
    seconds: float
    """Wall-clock time."""
    encoded: int
    """Images the model encoded: fewer than ``added`` where the same bytes were stored under another id."""
    removed: int = 0
    """Entries dropped because the source they came from no longer has their image."""
    renamed: int = 0
    """Entries dropped likewise, whose image is now stored under another id; these are not counted as ``added``."""
    skipped_files: SkippedFiles = field(default_factory=SkippedFiles)
    """Files the source skipped when it was opened."""

    def __str__(self) -> str:
        if not self.added:
            text = f"nothing to encode: {counted(self.unchanged, 'image')} unchanged"
        else:
            text = f"{counted(self.added, 'image')} added, {self.encoded} of them encoded; {self.unchanged} unchanged"
        if self.skipped:
            named = ", ".join(f"{escape_name(name)} ({reason})" for name, reason in self.skipped[:3])
            text += f"; {len(self.skipped)} skipped: {named}{', ...' if len(self.skipped) > 3 else ''}"
        if self.removed:
            text += f"; {self.removed} removed, which the source no longer has"
        if self.renamed:
            text += f"; {self.renamed} renamed"
        if self.skipped_files:
            text += f"; {self.skipped_files}"
        return f"{text}; {self.seconds:.1f} seconds"


class SearchEngine:
    """A model and the store of its image embeddings. ``UserError`` when the store holds another model's embeddings."""

    def __init__(
        self, model: SearchModel, store: UpdatableStore, *, batch: int = 64, threads: int | None = None
    ) -> None:
        self.model = model = model.in_precision_of(store.model)
        self.store = store
        self._batch = batch
        self._threads = threads or DECODE_THREADS
        self._table_lock = threading.Lock()
        self._computed: ComputedVectors = _NothingComputed()
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

    # --- indexing ----------------------------------------------------------------------------------------------------

    def index(
        self, items: IndexItems, progress: ProgressCallback = no_progress, computed: ComputedVectors | None = None
    ) -> IndexReport:
        """Embed images into the store: pairs, or the result of ``list_images``.

        Pairs of one image become one entry, under the first of their ids in alphabetical order, with all captions. An
        image whose id is already taken by an image of another source is stored under its full name; in a plain list of
        pairs the ids are used as given, and an entry of the same id is replaced. Entries that came from the folder,
        tables and tars of ``items`` and are no longer in them are dropped; those of other sources stay. Images that
        cannot be read are skipped and reported; ``UserError`` if none can be read. Images in ``computed`` are not read.
        """
        started = time.monotonic()
        self._computed = computed or _NothingComputed()
        known = StoredEntries(self.store.scan())
        entries = build_entries(items, known)
        if not entries:
            raise UserError("nothing to index: looked for pairs or images, and was given none")
        superseded = known.superseded(entries)
        work = [entry for entry in entries if not known.is_unchanged(entry)]
        fresh, encoded, done = list[str](), 0, len(entries) - len(work)
        skipped: list[SkippedSample] = []
        progress(done, len(entries))
        read = partial(self._read, known=known)
        with closing(read_ahead(work, read, batch=self._batch, threads=self._threads)) as batches:
            for batch in batches:
                reads = [read for read in batch if isinstance(read, _ReadImage)]
                failures = [read for read in batch if isinstance(read, _FailedImage)]
                fresh += [read.sha256 for read in reads if known.id_of_bytes(read.sha256, read.id) != read.id]
                encoded += self._store_batch(reads, known)
                self._skip(failures, known)
                skipped += [failed.skipped for failed in failures]
                done += len(batch)
                progress(done, len(entries))
        if len(skipped) == len(entries):
            first = f"{escape_name(skipped[0].id)}: {skipped[0].reason}"
            raise UserError(f"none of {counted(len(entries), 'image')} can be read; the first: {first}")
        lost = {name for name, _ in skipped}
        stale = [old for old, new in superseded.items() if new not in lost]
        ids = frozenset(entry.pair.id for entry in entries)
        replaced = sum(not known.has_bytes_of(old, ids) for old in stale)  # another image is at its path now
        if stale:
            self._drop(stale, known)
        gone = self._follow(ids, listed_origins(items), known, exempt=superseded)
        renamed = (Counter(gone) & Counter(fresh)).total()
        removed, added = replaced + len(gone) - renamed, len(fresh) - renamed
        unchanged = len(entries) - len(fresh) - len(skipped)
        return IndexReport(added, unchanged, skipped, time.monotonic() - started, encoded, removed, renamed)

    def _follow(
        self, ids: frozenset[str], origins: frozenset[str], known: StoredEntries, exempt: Collection[str]
    ) -> list[str]:
        """Drop the entries of these origins that are not among ``ids`` or ``exempt``; the sha256 of their images."""
        gone, shared = known.departed(ids | frozenset(exempt), origins)
        lost = known.sha256_of(gone)
        if gone:
            self._drop(gone, known)
        if shared:  # another origin still has them: only these origins are deleted from their metadata
            wanted = set(shared)
            meta = {name: dict(about) for name, about in self.store.scan() if name in wanted}
            for about in meta.values():
                about["origins"] = sorted(set(about["origins"]) - origins)
            self.store.add(list(meta), self.store.vectors(list(meta)), list(meta.values()))
        return lost

    def _drop(self, ids: Sequence[str], known: StoredEntries) -> None:
        self.store.delete(ids)
        for name in ids:
            known.remove(name)

    def _read(self, entry: IndexEntry, known: StoredEntries) -> _ReadImage | _FailedImage:
        """One image, in a thread: not read if its file is unchanged, not decoded if its bytes are already stored."""
        pair = entry.pair
        version = pair.image.version
        sha256 = known.unchanged_sha256(pair) or self._computed.sha256_of(pair.image)
        try:
            if sha256:
                return _ReadImage(entry, version, sha256, self._computed.file_fields(sha256), b"", None)
            # a table caches one row group at a time: threads that alternate would read it again and again
            with self._table_lock if isinstance(pair.image, ParquetSource) else nullcontext():
                data = pair.image.read()
            sha256 = hashlib.sha256(data).hexdigest()
            stored = known.id_of_bytes(sha256, pair.id) is not None or self._computed.vector(sha256) is not None
            pixels = None if stored else np.asarray(self.model.transform(data))
            file = read_file_fields(data)
            return _ReadImage(entry, version, sha256, file, data if pixels is None else b"", pixels)
        except (OSError, ValueError) as error:  # the disk; a tar or table that changed; an image that is not one
            reason = " ".join(str(error).split()) or type(error).__name__
            return _FailedImage(SkippedSample(pair.id, reason), isinstance(error, ImageError))

    def _store_batch(self, reads: Sequence[_ReadImage], known: StoredEntries) -> int:
        """Store a batch; returns how many images had to be encoded."""
        if not reads:
            return 0
        new: dict[str, np.ndarray] = {}
        stored: dict[str, str] = {}
        computed: dict[str, np.ndarray] = {}
        for read in reads:
            stored_id = known.id_of_bytes(read.sha256, read.id)
            if stored_id is not None:
                stored[read.sha256] = stored_id
            elif (vector := self._computed.vector(read.sha256)) is not None:
                computed[read.sha256] = vector
            elif read.sha256 not in new:
                # not decoded, yet no longer stored: the id of these bytes has been overwritten since
                new[read.sha256] = np.asarray(self.model.transform(read.data)) if read.pixels is None else read.pixels
        vectors = computed | dict(zip(stored, self.store.vectors(list(stored.values())), strict=True))
        if new:
            encoded = np.asarray(self.model.encode_pixels(np.stack(list(new.values()))))
            vectors.update(zip(new, encoded, strict=True))
        ids, files = [read.id for read in reads], self._file_fields(reads)
        meta = [known.metadata(read.entry, read.version, read.sha256, files[read.id]) for read in reads]
        self.store.add(ids, np.stack([vectors[read.sha256] for read in reads]), meta)
        for name, about in zip(ids, meta, strict=True):
            known.record(name, about)
        return len(new)

    def _file_fields(self, reads: Sequence[_ReadImage]) -> dict[str, Mapping[str, Any]]:
        """By id; those of images that were not read, since their file is unchanged, are taken from the store."""
        unread = [read.id for read in reads if read.file is None]
        stored = {name: about["file"] for name, about in zip(unread, self.store.metadata(unread), strict=True)}
        return stored | {read.id: read.file for read in reads if read.file is not None}

    def _skip(self, failures: Sequence[_FailedImage], known: StoredEntries) -> None:
        """Log them, and drop the stored entries of files that are no longer images."""
        for failed in failures:
            _log.warning("skipped %s: %s", escape_name(failed.skipped.id), failed.skipped.reason)
        damaged = [failed.skipped.id for failed in failures if failed.damaged and failed.skipped.id in known]
        if damaged:
            self._drop(damaged, known)

    # --- searching ---------------------------------------------------------------------------------------------------

    def search(
        self,
        text: str | Any = None,
        image: Any = None,
        k: int | Any = 10,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> list[Hit]:
        """The ``k`` images nearest by cosine to a text, to an image (path, bytes or Pillow image), or to both.

        With both, the query is the mean of the two embeddings, normalised; the text is taken literally. ``where``
        filters by metadata (see ``clasp.search.entries``). ``UserError`` as for ``find``.
        """
        texts = () if text is None else (WeightedText(text),)
        images = () if image is None else (WeightedImage(image),)
        return self.find(SearchQuery(texts, images), k, where)

    def find(
        self, query: SearchQuery, k: int | Any = 10, where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> list[Hit]:
        """The ``k`` images nearest by cosine to a composed query, best first.

        ``UserError`` for an image that cannot be read, an id that is not stored, ``k`` below 1, a query that cancels
        itself out, and an empty store.
        """
        self._check_search(k)
        return self.nearest(query.vector(self.encode_texts, self.encode_images, self.stored_vectors), k, where)

    def nearest(
        self,
        vector: Float[np.ndarray, "1 E"],
        k: int | Any,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> list[Hit]:
        """The ``k`` images nearest by cosine to a vector. ``UserError`` for ``k`` below 1 and an empty store."""
        self._check_search(k)
        return self.store.search(vector, k, where)[0]

    def _check_search(self, k: Any) -> None:
        if not isinstance(k, int) or k < 1:
            raise UserError(f"k = {k!r}: a search returns at least 1 image")
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


@dataclass(frozen=True, slots=True)
class _ReadImage:
    """An image to be stored, with its hash. ``file``: the fields of its file, ``None`` if they are in the store;
    ``data``: its bytes if read but not decoded; ``pixels``: if decoded."""

    entry: IndexEntry
    version: str
    sha256: str
    file: Mapping[str, Any] | None
    data: bytes
    pixels: Float[np.ndarray, "3 height width"] | None

    @property
    def id(self) -> str:
        """Id of the entry."""
        return self.entry.pair.id


@dataclass(frozen=True, slots=True)
class _FailedImage:
    """An image to be skipped; ``damaged`` if its bytes could be read but not decoded as an image."""

    skipped: SkippedSample
    damaged: bool
