"""Changes of a served index by HTTP: images that are added, and entries that are deleted.

Input: a ``SearchService`` and an ``UploadFolder``. Output: the stored entries. Note: a change returns when the store
has flushed it, and the next request sees it; other writers of the index (``clasp index``, ``clasp watch``) are locked
out meanwhile, and it is refused while one of them writes. An image is checked and encoded before anything is written; a
file whose entry cannot be stored is deleted again. An entry is deleted before its file, so that a kill between the two
leaves a file without an entry, never an entry without a file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clasp.data.file_fields import read_file_fields
from clasp.data.pairs import FileSource
from clasp.errors import counted
from clasp.plain_types import Hit, Pair, UserError
from clasp.search.engine import UpdatableStore
from clasp.search.entries import entry_metadata
from clasp.serve.service import NoSuchEntryError, SearchService
from clasp.serve.upload_folder import SavedUpload, UploadedImage, UploadFolder

_log = logging.getLogger(__name__)


class ClientFile(NamedTuple):
    """An uploaded file: its bytes, and the name that the client gave it."""

    data: bytes
    name: str


class IndexUnchangedError(UserError):
    """A change could not be stored, for a reason that is not the request's: another writer, or the disk."""


class IndexEditor:
    """Adds to and deletes from the index of a service. ``UserError`` for what a request has wrong."""

    def __init__(self, service: SearchService, folder: UploadFolder) -> None:
        self._service, self._folder = service, folder

    def add(self, files: Sequence[ClientFile]) -> list[Hit]:
        """Save the images and store their entries: all or, for an error, none. Returns the entries.

        Raises ``IndexUnchangedError``, and what ``SearchService.embed_image`` raises.
        """
        limit = self._service.limits.parts
        if len(files) > limit:
            raise UserError(f"{len(files)} images are too many for one request; at most {limit}")
        kinds = [self._service.media_type(file.data) for file in files]
        vectors = np.concatenate([self._service.embed_image(file.data) for file in files])
        uploads = [
            UploadedImage(file.data, file.name, kind, hashlib.sha256(file.data).hexdigest())
            for file, kind in zip(files, kinds, strict=True)
        ]
        saved: list[SavedUpload] = []
        with _told(f"{counted(len(files), 'image')} not added"), self._service.changing() as store:
            try:
                for upload in uploads:
                    saved.append(self._folder.save(upload))
                entries = [self._entry(store, *each) for each in zip(uploads, saved, strict=True)]
                store.add([hit.id for hit in entries], vectors, [hit.meta for hit in entries])
            except BaseException:
                _undo(store, [(file, self._entry_id(store, file.path)) for file in saved if file.is_new])
                raise
        return entries

    def delete(self, name: str) -> bool:
        """Delete an entry, and its file if it was added by HTTP; returns whether the file was deleted.

        Raises ``NoSuchEntryError`` and ``IndexUnchangedError``.
        """
        with _told("the entry is not deleted"), self._service.changing() as store:
            meta = self._service.entry(name, store).meta
            store.delete([name])
        self._service.forget_thumbnail(meta["sha256"])
        if (meta["source"] or {}).get("kind") != "file":
            return False
        with _told("the entry is deleted, its file is not"):
            return self._folder.delete(meta["name"], meta["sha256"])

    @staticmethod
    def _entry_id(store: UpdatableStore, path: Path) -> str:
        """The name in the folder, or where another image has that id, the path."""
        return str(path) if _is_taken(store, path.name, path) else path.name

    def _entry(self, store: UpdatableStore, upload: UploadedImage, saved: SavedUpload) -> Hit:
        """As ``clasp index RUN FOLDER`` would store it."""
        source, name = FileSource(str(saved.path)), self._entry_id(store, saved.path)
        pair = Pair(name, source, (), name)
        origins = (str(self._folder.path),)
        meta: dict[str, Any] = entry_metadata(
            pair, source.version, upload.sha256, origins, read_file_fields(upload.data)
        )
        return Hit(name, 0.0, meta)


def _undo(store: UpdatableStore, added: Sequence[tuple[SavedUpload, str]]) -> None:
    """Delete the files and the entries of an addition that failed, of which the store may have kept some; where it
    cannot delete them, the files stay."""
    try:
        known = {name for name, _ in store.scan()}
        if stored := [name for _, name in added if name in known]:
            store.delete(stored)
    except (UserError, OSError) as error:
        return _log.warning("images that were added stay, since their entries cannot be deleted: %s", error)
    for file, _ in added:
        file.path.unlink(missing_ok=True)


def _is_taken(store: UpdatableStore, name: str, path: Path) -> bool:
    try:
        return store.metadata([name])[0]["name"] != str(path)
    except KeyError:
        return False


@contextmanager
def _told(outcome: str) -> Iterator[None]:
    """Errors of the store and of the disk are the server's, not the request's."""
    try:
        yield
    except (NoSuchEntryError, IndexUnchangedError):
        raise
    except UserError as error:
        raise IndexUnchangedError(f"{outcome}: {error}") from error
    except OSError as error:
        raise IndexUnchangedError(f"{outcome}: {error.strerror or error}") from error
