"""Index entries, new and stored: one for each image, with the metadata that locates the image.

Input: pairs or the images of a folder, and the metadata in a store. Output: the entries to index, and a lookup of the
stored ones. Note: an entry is an image, so pairs of one image are merged. A file with the size and modification time it
had when it was encoded is taken to have the same bytes, without reading it. The metadata is JSON: ``name``,
``source``, ``version`` and ``sha256`` of the image, ``origins`` (the folders, tables and tars it was indexed from),
``captions``, their ``languages``, ``group``, the ``meta`` of the pair, and ``file`` (``clasp.data.file_fields``).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from clasp.data.formats.hugging_face import ArrowSource
from clasp.data.formats.remote_tar import RemoteTarSource
from clasp.data.formats.zip_members import ZipSource
from clasp.data.pairs import FileSource, FolderImages, Pairs, ParquetSource, TarSource
from clasp.plain_types import ImageSource, Pair, UserError

_StoredSource = FileSource | TarSource | ParquetSource | ZipSource | ArrowSource
_SOURCE_TYPES: dict[str, type[_StoredSource]] = {
    "file": FileSource,
    "tar": TarSource,
    "cell": ParquetSource,
    "zip": ZipSource,
    "arrow": ArrowSource,
}


def source_to_dict(source: ImageSource) -> dict[str, Any] | None:
    """A source as plain data; ``None`` for one of a class that is not ours, which another process cannot read again."""
    for kind, known in _SOURCE_TYPES.items():
        if isinstance(source, known):
            return {"kind": kind, **asdict(source)}
    return None


def source_from_dict(data: Mapping[str, Any]) -> ImageSource:
    """Inverse of ``source_to_dict``."""
    fields = dict(data)
    return _SOURCE_TYPES[fields.pop("kind")](**fields)


def entry_metadata(
    pair: Pair, version: str, sha256: str, origins: Iterable[str], file: Mapping[str, Any]
) -> dict[str, Any]:
    """The metadata of an image; ``version`` is that of the source when the bytes of ``sha256`` were read, ``file`` what
    ``read_file_fields`` returns for them."""
    return {
        "name": pair.image.name,
        "source": source_to_dict(pair.image),
        "version": version,
        "sha256": sha256,
        "origins": sorted(origins),
        "captions": [caption._asdict() for caption in pair.captions],
        "languages": list(dict.fromkeys(caption.language for caption in pair.captions if caption.language)),
        "group": pair.group,
        "meta": json.loads(json.dumps(dict(pair.meta), default=str)),  # dates, decimals
        "file": dict(file),
    }


class _StoredEntry(NamedTuple):
    """The stored metadata of one id, abridged; ``meta_hash`` is a hash of all of it but the fields of the file."""

    name: str
    version: str
    sha256: str
    is_file: bool
    origins: frozenset[str]
    """The sources it was indexed from; empty for plain lists, and for entries of older versions of clasp."""
    meta_hash: int
    has_file_fields: bool
    """Whether it has the fields of its file; entries of older versions of clasp have none"""

    def still_there(self) -> bool:
        """Whether the file of the image still exists; for an image in a tar or table, whether that does."""
        if self.is_file:
            return FileSource(self.name).version != "missing"
        return not self.origins or any(map(os.path.exists, self.origins))


class StoredEntries:
    """The entries of a store by id, by sha256 of the image, and by source name. About 600 bytes of memory an entry."""

    def __init__(self, scanned: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        self._by_id: dict[str, _StoredEntry] = {}
        self._by_sha256: dict[str, str] = {}  # sha256 -> an id
        self._by_source: dict[str, str] = {}  # source name -> id
        for name, meta in scanned:
            try:
                self.record(name, meta)
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"the stored metadata of {name!r} is damaged; index into a new store") from None

    def __contains__(self, name: str) -> bool:
        return name in self._by_id

    def record(self, name: str, meta: Mapping[str, Any]) -> None:
        """The metadata of an id has been written to the store."""
        self.remove(name)
        is_file = (meta["source"] or {}).get("kind") == "file"
        origins = frozenset(map(sys.intern, meta.get("origins", ())))
        has_file_fields = bool(meta.get("file"))
        stored = _StoredEntry(
            meta["name"], meta["version"], meta["sha256"], is_file, origins, _hash(meta), has_file_fields
        )
        self._by_id[name] = stored
        self._by_sha256[stored.sha256] = name
        self._by_source[stored.name] = name

    def remove(self, name: str) -> None:
        """An id has been deleted from the store."""
        stored = self._by_id.pop(name, None)
        if stored is not None and self._by_sha256.get(stored.sha256) == name:
            del self._by_sha256[stored.sha256]

    def unchanged_sha256(self, pair: Pair) -> str:
        """The sha256 stored under this id if source name and version are the same; else an empty string, as for an
        entry without the fields of its file, which is read again."""
        stored = self._by_id.get(pair.id)
        if stored is None or not stored.has_file_fields:
            return ""
        return stored.sha256 if (stored.name, stored.version) == (pair.image.name, pair.image.version) else ""

    def is_unchanged(self, entry: IndexEntry) -> bool:
        """Whether the image and all its metadata are as stored, so that there is nothing to do."""
        pair, sha256 = entry.pair, self.unchanged_sha256(entry.pair)
        return (
            bool(sha256)
            and _hash(self.metadata(entry, pair.image.version, sha256, {})) == self._by_id[pair.id].meta_hash
        )

    def metadata(self, entry: IndexEntry, version: str, sha256: str, file: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata to store for an entry; an image whose source is stored already retains its origins."""
        stored = self._by_id.get(self._by_source.get(entry.pair.image.name, ""))
        earlier = stored.origins if stored is not None and stored.name == entry.pair.image.name else frozenset()
        return entry_metadata(entry.pair, version, sha256, entry.origins | earlier, file)

    def id_of_bytes(self, sha256: str, name: str) -> str | None:
        """An id under which the vector of these bytes is stored, ``name`` itself if possible; else ``None``."""
        stored = self._by_id.get(name)
        return name if stored is not None and stored.sha256 == sha256 else self._by_sha256.get(sha256)

    def is_other_image(self, name: str, source: ImageSource, origins: frozenset[str]) -> bool:
        """Whether this id is taken by another image that still exists and comes from none of these origins."""
        stored = self._by_id.get(name)
        if stored is None or stored.name == source.name or stored.origins & origins:
            return False
        return stored.still_there()

    def superseded(self, entries: Iterable[IndexEntry]) -> dict[str, str]:
        """Old id -> new id, for stored images that ``entries`` list under another id."""
        ids = {entry.pair.id for entry in entries}
        places = {self._by_source.get(entry.pair.image.name): entry.pair.id for entry in entries}
        return {old: new for old, new in places.items() if old is not None and old not in ids}

    def departed(self, ids: frozenset[str], origins: frozenset[str]) -> Departed:
        """The stored ids that came from these origins and are not among ``ids``.

        An image that another origin has as well is retained, unless its file is gone.
        """
        gone, shared = [], []
        for name, stored in self._by_id.items():
            if name in ids or (
                not stored.origins & origins and not (not stored.origins and self._is_lost_file(stored, origins))
            ):
                continue
            (shared if stored.origins - origins and stored.still_there() else gone).append(name)
        return Departed(gone, shared)

    def _is_lost_file(self, stored: _StoredEntry, origins: frozenset[str]) -> bool:
        """Whether an entry is a file that was in one of these folders and no longer exists."""
        was_inside = stored.is_file and any(
            os.path.realpath(stored.name).startswith(f"{origin}{os.sep}") for origin in origins
        )
        return was_inside and not stored.still_there()

    def sha256_of(self, names: Iterable[str]) -> list[str]:
        """The sha256 of the images stored under these ids."""
        return [self._by_id[name].sha256 for name in names]

    def has_bytes_of(self, name: str, ids: frozenset[str]) -> bool:
        """Whether the bytes stored under an id are now under one of ``ids``: whether its image was renamed."""
        return self._by_sha256.get(self._by_id[name].sha256) in ids


class Departed(NamedTuple):
    """Ids that an origin no longer has: those to drop, and those retained because another origin has them."""

    gone: list[str]
    shared: list[str]


def _hash(meta: Mapping[str, Any]) -> int:
    return hash(json.dumps({name: value for name, value in meta.items() if name != "file"}, sort_keys=True))


class IndexEntry(NamedTuple):
    """One image to be indexed, and the sources it is indexed from."""

    pair: Pair
    origins: frozenset[str]


IndexItems = Sequence[Pair] | Sequence[tuple[str, ImageSource]]


def listed_origins(items: IndexItems) -> frozenset[str]:
    """The folders, tables and tars whose images ``items`` are; none for a plain list or a subset of pairs."""
    if isinstance(items, FolderImages):
        return frozenset((items.origin,))
    return frozenset(items.origins) if isinstance(items, Pairs) else frozenset()


def build_entries(items: IndexItems, known: StoredEntries) -> list[IndexEntry]:
    """One entry for each image, in order of first appearance; see ``Indexer.index`` for the ids."""
    listed = listed_origins(items)
    entries: dict[str, IndexEntry] = {}
    for number, item in enumerate(items):
        if isinstance(item, Pair):
            pair = item
            origins = frozenset((items.origin(number),)) if listed and isinstance(items, Pairs) else frozenset()
            distinct = bool(listed)  # in a plain list of pairs the ids are used as given
        else:
            pair, origins, distinct = Pair(item[0], item[1], (), item[0]), listed, True
        if isinstance(pair.image, RemoteTarSource):
            raise UserError(
                f"{pair.image.name} is on object storage, and only files here are indexed; download the shard"
            )
        if distinct and known.is_other_image(pair.id, pair.image, listed):
            group = pair.image.name if pair.group == pair.id else pair.group
            pair = replace(pair, id=pair.image.name, group=group)
        twin = entries.get(pair.image.name)
        entry = IndexEntry(pair, origins)
        entries[pair.image.name] = entry if twin is None else _merge_entries(twin, entry)
    owners: dict[str, str] = {}
    for pair, _ in entries.values():
        if owners.setdefault(pair.id, pair.image.name) != pair.image.name:
            raise UserError(f"the id {pair.id!r} is given twice, to {owners[pair.id]} and to {pair.image.name}")
    return list(entries.values())


def _merge_entries(one: IndexEntry, two: IndexEntry) -> IndexEntry:
    captions = tuple(dict.fromkeys((*one.pair.captions, *two.pair.captions)))
    pair = replace(min(one.pair, two.pair, key=lambda pair: pair.id), captions=captions)
    return IndexEntry(pair, one.origins | two.origins)
