"""What is to be in a store and what is: one entry for each image, and metadata that says where to find it again.

In: pairs or the images of a folder, and the metadata that a store holds. Out: entries, and what is known of them.
Note: an entry is an image, so pairs that show one image become one. A file that has the size and time it had when it
was encoded is taken to have the same bytes, unread. The metadata is JSON: ``name``, ``source``, ``version`` and
``sha256`` of the image, ``origins`` (the folders, tables and tars it was indexed from), ``captions``, their
``languages``, ``group``, and the pair's own ``meta``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from clasp.data.pairs import FileSource, FolderImages, Pairs, ParquetSource, TarSource
from clasp.types import ImageSource, Pair, UserError

_SOURCE_TYPES: dict[str, type[FileSource] | type[TarSource] | type[ParquetSource]] = {
    "file": FileSource,
    "tar": TarSource,
    "cell": ParquetSource,
}


def source_to_dict(source: ImageSource) -> dict[str, Any] | None:
    """A source as plain data; ``None`` for one of a foreign class, which cannot be read again from another process."""
    for kind, known in _SOURCE_TYPES.items():
        if isinstance(source, known):
            return {"kind": kind, **asdict(source)}
    return None


def source_from_dict(said: Mapping[str, Any]) -> ImageSource:
    """The reverse of ``source_to_dict``."""
    fields = dict(said)
    return _SOURCE_TYPES[fields.pop("kind")](**fields)


def entry_metadata(pair: Pair, version: str, sha256: str, origins: Iterable[str]) -> dict[str, Any]:
    """The metadata of an image whose bytes were read when it had this version."""
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
    }


class _StoredEntry(NamedTuple):
    """What the store says of one id; ``meta_hash`` is a hash of all of it."""

    name: str
    version: str
    sha256: str
    is_file: bool
    origins: frozenset[str]
    """Where it was indexed from; empty for plain lists, and for what an older clasp indexed."""
    meta_hash: int

    def still_there(self) -> bool:
        """Whether the image is where it was; of one in a tar or table, whether that is."""
        if self.is_file:
            return FileSource(self.name).version != "missing"
        return not self.origins or any(map(os.path.exists, self.origins))


class StoredEntries:
    """What a store holds: by id, by the bytes of the image, and by its place. Takes some 600 bytes an entry."""

    def __init__(self, scanned: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        self._held: dict[str, _StoredEntry] = {}
        self._encoded: dict[str, str] = {}  # sha256 -> an id
        self._places: dict[str, str] = {}  # source name -> id
        for name, meta in scanned:
            self.record(name, meta)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def record(self, name: str, meta: Mapping[str, Any]) -> None:
        """The store now says this of an id."""
        self.remove(name)
        is_file = (meta["source"] or {}).get("kind") == "file"
        origins = frozenset(map(sys.intern, meta.get("origins", ())))
        held = _StoredEntry(meta["name"], meta["version"], meta["sha256"], is_file, origins, _hash(meta))
        self._held[name] = held
        self._encoded[held.sha256] = name
        self._places[held.name] = name

    def remove(self, name: str) -> None:
        """The store no longer has this id."""
        held = self._held.pop(name, None)
        if held is not None and self._encoded.get(held.sha256) == name:
            del self._encoded[held.sha256]

    def unchanged_sha256(self, pair: Pair) -> str:
        """The sha256 of an image that is under this id, unmoved and of the same version; else nothing."""
        held = self._held.get(pair.id)
        same = held is not None and (held.name, held.version) == (pair.image.name, pair.image.version)
        return held.sha256 if held is not None and same else ""

    def is_unchanged(self, entry: IndexEntry) -> bool:
        """Whether there is nothing to do: the image is as it was, and so is all that is said of it."""
        pair, sha256 = entry.pair, self.unchanged_sha256(entry.pair)
        return bool(sha256) and _hash(self.metadata(entry, pair.image.version, sha256)) == self._held[pair.id].meta_hash

    def metadata(self, entry: IndexEntry, version: str, sha256: str) -> dict[str, Any]:
        """What the store is to say of an entry; an image that is where it was keeps its earlier origins."""
        held = self._held.get(self._places.get(entry.pair.image.name, ""))
        earlier = held.origins if held is not None and held.name == entry.pair.image.name else frozenset()
        return entry_metadata(entry.pair, version, sha256, entry.origins | earlier)

    def id_of_bytes(self, sha256: str, name: str) -> str | None:
        """An id that has the vector of these bytes: ``name`` itself where it can be."""
        held = self._held.get(name)
        return name if held is not None and held.sha256 == sha256 else self._encoded.get(sha256)

    def is_other_image(self, name: str, source: ImageSource, origins: frozenset[str]) -> bool:
        """Whether this id is that of another image, which is still where it was and not of one of these origins."""
        held = self._held.get(name)
        if held is None or held.name == source.name or held.origins & origins:
            return False
        return held.still_there()

    def superseded(self, entries: Iterable[IndexEntry]) -> dict[str, str]:
        """Ids no longer used, whose images are now under another: to that one."""
        ids = {entry.pair.id for entry in entries}
        places = {self._places.get(entry.pair.image.name): entry.pair.id for entry in entries}
        return {old: new for old, new in places.items() if old is not None and old not in ids}

    def departed(self, ids: frozenset[str], origins: frozenset[str]) -> Departed:
        """The ids that came from these origins, which now have only ``ids``.

        An image that another origin has as well stays, unless its file is gone.
        """
        gone, shared = [], []
        for name, held in self._held.items():
            if name in ids or (not held.origins & origins and not (not held.origins and self._lay_in(held, origins))):
                continue
            (shared if held.origins - origins and held.still_there() else gone).append(name)
        return Departed(gone, shared)

    def _lay_in(self, held: _StoredEntry, origins: frozenset[str]) -> bool:
        """Whether an entry without origins is a file that was in one of these folders and is gone."""
        lay_in = held.is_file and any(os.path.realpath(held.name).startswith(f"{origin}{os.sep}") for origin in origins)
        return lay_in and not held.still_there()

    def has_bytes_of(self, name: str, ids: frozenset[str]) -> bool:
        """Whether the bytes that an id had are now under one of ``ids``: whether its image was renamed."""
        return self._encoded.get(self._held[name].sha256) in ids


class Departed(NamedTuple):
    """Ids that an origin no longer has: those to drop, and those that stay because another origin has them."""

    gone: list[str]
    shared: list[str]


def _hash(meta: Mapping[str, Any]) -> int:
    return hash(json.dumps(meta, sort_keys=True))


class IndexEntry(NamedTuple):
    """One image to be in the store, and where it is indexed from."""

    pair: Pair
    origins: frozenset[str]


IndexItems = Sequence[Pair] | Sequence[tuple[str, ImageSource]]


def listed_origins(items: IndexItems) -> frozenset[str]:
    """The folders, tables and tars of which ``items`` are all images; none for a plain list or a choice of pairs."""
    if isinstance(items, FolderImages):
        return frozenset((items.origin,))
    return frozenset(items.origins) if isinstance(items, Pairs) else frozenset()


def build_entries(items: IndexItems, known: StoredEntries) -> list[IndexEntry]:
    """One entry for each image, in the order of their first; see ``SearchEngine.index`` for their ids."""
    listed = listed_origins(items)
    entries: dict[str, IndexEntry] = {}
    for number, item in enumerate(items):
        if isinstance(item, Pair):
            pair = item
            origins = frozenset((items.origin(number),)) if listed and isinstance(items, Pairs) else frozenset()
            distinct = bool(listed)  # of a plain list of pairs only the ids are known, and meant as they are
        else:
            pair, origins, distinct = Pair(item[0], item[1], (), item[0]), listed, True
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
