"""An index made in parts, by several processes or machines: which image is of which part, and the parts' embeddings.

Input: images, a part such as ``2/8``, a folder that all processes see. Output: the images of the part, done-markers,
and the ``ComputedVectors`` of all parts, from which the index is merged without encoding. Note: the part of an image is
a hash of its name, so it is the same in every process, whatever else is in the collection.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clasp.data.pairs import FolderImages, Pairs
from clasp.plain_types import ImageSource, UserError
from clasp.search.flat_store import FlatStore

PARTS_FOLDER = "index-parts"
_DONE = "done.json"


@dataclass(frozen=True, slots=True)
class IndexPart:
    """Part ``number`` (from 1) of ``count``."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def folder(self, run: Path) -> Path:
        """Where the part of a run's index is kept."""
        return run / PARTS_FOLDER / f"part-{self.number}-of-{self.count}"

    def has(self, source: ImageSource) -> bool:
        """Whether an image is of this part."""
        digest = hashlib.sha256(source.name.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1


@dataclass(frozen=True, slots=True)
class DonePart:
    """The marker of a finished part: what it was made from, and the model."""

    source: str
    images: int
    model: str


def parse_part(text: str) -> IndexPart:
    """``2/8``; ``UserError`` if it is not a part."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--part {text} is not a part; write 1/8 to 8/8 for eight processes")
    return IndexPart(int(match[1]), int(match[2]))


def all_parts(count: int) -> list[IndexPart]:
    """The parts of an index that is made in ``count``."""
    return [IndexPart(number, count) for number in range(1, count + 1)]


def select_part(items: FolderImages | Pairs, part: IndexPart) -> FolderImages | Pairs:
    """The items whose image is of this part. Pairs of one image stay together."""
    if isinstance(items, FolderImages):
        return replace(items, images=tuple(image for image in items.images if part.has(image[1])))
    return items.subset(number for number, pair in enumerate(items) if part.has(pair.image))


def write_done(run: Path, part: IndexPart, done: DonePart) -> None:
    """Mark a part as finished, atomically."""
    folder = part.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_DONE}.part"
    temporary.write_text(json.dumps(asdict(done)) + "\n", encoding="utf-8")
    os.replace(temporary, folder / _DONE)


def unfinished_parts(run: Path, count: int, source: str) -> list[IndexPart]:
    """The parts that are not finished. ``UserError`` for one that was made from another source."""
    missing = []
    for part in all_parts(count):
        try:
            done = DonePart(**json.loads((part.folder(run) / _DONE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            missing.append(part)
            continue
        if done.source != source:
            raise UserError(f"part {part} was made from {done.source}, not {source}; delete {part.folder(run)}")
    return missing


class PartVectors:
    """The embeddings of finished parts; a ``ComputedVectors``. About 400 bytes of memory an image."""

    def __init__(self, run: Path, count: int, model: str) -> None:
        self._places: dict[str, tuple[FlatStore, str]] = {}  # sha256 -> store and id
        self._images: dict[str, tuple[str, str]] = {}  # name of the image -> its version and sha256
        for part in all_parts(count):
            if not (part.folder(run) / "store").is_dir():
                continue  # it had no images
            store = FlatStore(part.folder(run) / "store")
            if store.count() and store.model != model:
                raise UserError(
                    f"part {part} was encoded with another model, or in another precision, than the index: "
                    f"delete {part.folder(run)} and index it again"
                )
            for name, meta in store.scan():
                self._places[meta["sha256"]] = (store, name)
                self._images[meta["name"]] = (meta["version"], meta["sha256"])

    def sha256_of(self, source: ImageSource) -> str:
        """The sha256 of this image, if its embedding is here and it has not changed since; else an empty string."""
        version, sha256 = self._images.get(source.name, ("", ""))
        return sha256 if sha256 and version == source.version else ""

    def vector(self, sha256: str) -> Float[np.ndarray, " E"] | None:
        """The unit vector of these bytes; ``None`` if it is not here."""
        place = self._places.get(sha256)
        return None if place is None else place[0].vectors([place[1]])[0]

    def file_fields(self, sha256: str) -> Mapping[str, Any] | None:
        """What ``read_file_fields`` returned for these bytes; empty in parts that an earlier clasp made."""
        place = self._places.get(sha256)
        return None if place is None else place[0].metadata([place[1]])[0].get("file", {})
