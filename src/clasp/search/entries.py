"""What is to be in a store and what is: one entry for each image, and metadata that says where to find it again.

In: pairs or the images of a folder, and the metadata that a store holds. Out: entries, and what is known of them.
Unusual: an entry is an image, so pairs that show one image become one. A file that has the size and time it had when it
was encoded is taken to have the same bytes, unread. The metadata is JSON: ``name``, ``source``, ``version`` and
``sha256`` of the image, ``captions``, their ``languages``, ``group``, and the pair's own ``meta``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from clasp.data.pairs import FileSource, ParquetSource, TarSource
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


def entry_metadata(pair: Pair, version: str, sha256: str) -> dict[str, Any]:
    """The metadata of an image whose bytes were read when it had this version."""
    return {
        "name": pair.image.name,
        "source": source_to_dict(pair.image),
        "version": version,
        "sha256": sha256,
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
    meta_hash: int


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
        held = _StoredEntry(meta["name"], meta["version"], meta["sha256"], is_file, _hash(meta))
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

    def is_unchanged(self, pair: Pair) -> bool:
        """Whether there is nothing to do: the image is as it was, and so is all that is said of it."""
        sha256 = self.unchanged_sha256(pair)
        return bool(sha256) and _hash(entry_metadata(pair, pair.image.version, sha256)) == self._held[pair.id].meta_hash

    def id_of_bytes(self, sha256: str, name: str) -> str | None:
        """An id that has the vector of these bytes: ``name`` itself where it can be."""
        held = self._held.get(name)
        return name if held is not None and held.sha256 == sha256 else self._encoded.get(sha256)

    def is_other_image(self, name: str, source: ImageSource) -> bool:
        """Whether this id is that of another image, which is still where it was."""
        held = self._held.get(name)
        if held is None or held.name == source.name:
            return False
        return not held.is_file or FileSource(held.name).version != "missing"

    def superseded(self, entries: Iterable[Pair]) -> dict[str, str]:
        """Ids no longer used, whose images are now under another: to that one."""
        ids = {entry.id for entry in entries}
        places = {self._places.get(entry.image.name): entry.id for entry in entries}
        return {old: new for old, new in places.items() if old is not None and old not in ids}


def _hash(meta: Mapping[str, Any]) -> int:
    return hash(json.dumps(meta, sort_keys=True))


def build_entries(items: Sequence[Pair] | Sequence[tuple[str, ImageSource]], known: StoredEntries) -> list[Pair]:
    """One pair for each image, in the order of their first; see ``Engine.index`` for their ids."""
    entries: dict[str, Pair] = {}
    for item in items:
        pair = item if isinstance(item, Pair) else _folder_image(*item, known)
        twin = entries.get(pair.image.name)
        entries[pair.image.name] = pair if twin is None else _merge_pairs(twin, pair)
    owners: dict[str, str] = {}
    for entry in entries.values():
        if owners.setdefault(entry.id, entry.image.name) != entry.image.name:
            raise UserError(f"the id {entry.id!r} is given twice, to {owners[entry.id]} and to {entry.image.name}")
    return list(entries.values())


def _folder_image(name: str, source: ImageSource, known: StoredEntries) -> Pair:
    name = source.name if known.is_other_image(name, source) else name
    return Pair(name, source, (), name)


def _merge_pairs(one: Pair, two: Pair) -> Pair:
    captions = tuple(dict.fromkeys((*one.captions, *two.captions)))
    return replace(min(one, two, key=lambda pair: pair.id), captions=captions)
