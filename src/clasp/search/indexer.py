"""Indexing: embed images into the store of a search engine.

Input: a ``SearchEngine``, and pairs or the images of a folder. Output: their entries in its store, and an
``IndexReport``. Note: an image is identified by the sha256 of its bytes. A stored image is not encoded again when it is
renamed, moved or copied, and a file of unchanged size and modification time is not even read. Each batch is stored
before the next is encoded, so an interrupted ``index`` resumes where it stopped. An entry records the folder, table or
tar it came from, and is dropped when that is indexed again without it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from clasp.data.decoding import ImageError
from clasp.data.file_fields import read_file_fields
from clasp.data.formats.skipped_files import SkippedFiles, escape_name
from clasp.data.pairs import ParquetSource
from clasp.data.read_ahead import DECODE_THREADS, read_ahead
from clasp.errors import counted
from clasp.plain_types import ImageSource, ProgressCallback, SkippedSample, UserError, no_progress
from clasp.search.engine import SearchEngine
from clasp.search.entries import IndexEntry, IndexItems, StoredEntries, build_entries, listed_origins

_log = logging.getLogger(__name__)


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


NOTHING_COMPUTED = _NothingComputed()


@dataclass(frozen=True)
class IndexReport:
    """What ``Indexer.index`` did; one image is one entry, however many pairs it has."""

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


class Indexer:
    """Embeds images into the store of an engine with its model, ``batch`` at once."""

    def __init__(self, engine: SearchEngine, *, batch: int = 64, threads: int | None = None) -> None:
        self.model, self.store = engine.model, engine.store
        self._batch = batch
        self._threads = threads or DECODE_THREADS
        self._table_lock = threading.Lock()

    def index(
        self, items: IndexItems, progress: ProgressCallback = no_progress, computed: ComputedVectors = NOTHING_COMPUTED
    ) -> IndexReport:
        """Embed images into the store: pairs, or the result of ``list_images``.

        Pairs of one image become one entry, under the first of their ids in alphabetical order, with all captions. An
        image whose id is already taken by an image of another source is stored under its full name; in a plain list of
        pairs the ids are used as given, and an entry of the same id is replaced. Entries that came from the folder,
        tables and tars of ``items`` and are no longer in them are dropped; those of other sources stay. Images that
        cannot be read are skipped and reported; ``UserError`` if none can be read. Images in ``computed`` are not read.
        """
        started = time.monotonic()
        known = StoredEntries(self.store.scan())
        entries = build_entries(items, known)
        if not entries:
            raise UserError("nothing to index: looked for pairs or images, and was given none")
        superseded = known.superseded(entries)
        work = [entry for entry in entries if not known.is_unchanged(entry)]
        fresh, encoded, done = list[str](), 0, len(entries) - len(work)
        skipped: list[SkippedSample] = []
        progress(done, len(entries))
        read = partial(self._read, known=known, computed=computed)
        with closing(read_ahead(work, read, batch=self._batch, threads=self._threads)) as batches:
            for batch in batches:
                reads = [read for read in batch if isinstance(read, _ReadImage)]
                failures = [read for read in batch if isinstance(read, _FailedImage)]
                fresh += [read.sha256 for read in reads if known.id_of_bytes(read.sha256, read.id) != read.id]
                encoded += self._store_batch(reads, known, computed)
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

    def _read(self, entry: IndexEntry, known: StoredEntries, computed: ComputedVectors) -> _ReadImage | _FailedImage:
        """One image, in a thread: not read if its file is unchanged, not decoded if its bytes are already stored."""
        pair = entry.pair
        version = pair.image.version
        sha256 = known.unchanged_sha256(pair) or computed.sha256_of(pair.image)
        try:
            if sha256:
                return _ReadImage(entry, version, sha256, computed.file_fields(sha256), b"", None)
            # a table caches one row group at a time: threads that alternate would read it again and again
            with self._table_lock if isinstance(pair.image, ParquetSource) else nullcontext():
                data = pair.image.read()
            sha256 = hashlib.sha256(data).hexdigest()
            stored = known.id_of_bytes(sha256, pair.id) is not None or computed.vector(sha256) is not None
            pixels = None if stored else np.asarray(self.model.transform(data))
            file = read_file_fields(data)
            return _ReadImage(entry, version, sha256, file, data if pixels is None else b"", pixels)
        except (OSError, ValueError) as error:  # the disk; a tar or table that changed; an image that is not one
            reason = " ".join(str(error).split()) or type(error).__name__
            return _FailedImage(SkippedSample(pair.id, reason), isinstance(error, ImageError))

    def _store_batch(self, reads: Sequence[_ReadImage], known: StoredEntries, computed: ComputedVectors) -> int:
        """Store a batch; returns how many images had to be encoded."""
        if not reads:
            return 0
        new: dict[str, np.ndarray] = {}
        stored: dict[str, str] = {}
        ready: dict[str, np.ndarray] = {}
        for read in reads:
            stored_id = known.id_of_bytes(read.sha256, read.id)
            if stored_id is not None:
                stored[read.sha256] = stored_id
            elif (vector := computed.vector(read.sha256)) is not None:
                ready[read.sha256] = vector
            elif read.sha256 not in new:
                # not decoded, yet no longer stored: the id of these bytes has been overwritten since
                new[read.sha256] = np.asarray(self.model.transform(read.data)) if read.pixels is None else read.pixels
        vectors = ready | dict(zip(stored, self.store.vectors(list(stored.values())), strict=True))
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
