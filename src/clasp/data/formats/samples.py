"""Samples: files that share a name (``cat.jpg``, ``cat.txt``, ``cat.json``, ``cat.cls``) in a folder or a tar.

Goes in: a webdataset tar, or a folder, which is the same unpacked. Comes out: its samples as pairs.
``txt`` is one caption. ``json`` may hold captions (``captions``, else ``caption``, else ``text``) and meta (the rest).
``cls`` is a class number, ``meta["label"]``, named in ``meta["class"]`` where a ``classnames.txt`` lies beside the tar.
Unusual: a sample without caption whose class has a name is captioned by it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt64

from clasp.data.formats.base import SourceSpec
from clasp.data.formats.ids import hash64, require_unique_ids
from clasp.data.formats.index_cache import IndexArrays, load_or_build_index
from clasp.data.formats.name_table import NameTable
from clasp.data.formats.rows import CaptionCheck, ColumnNames, as_text, parse_captions, require_columns
from clasp.data.formats.tar import open_tar
from clasp.types import Caption, ImageSource, Pair, UserError

IMAGE_SUFFIXES = tuple("jpg jpeg jfif png webp gif bmp tif tiff avif jp2 ppm pgm".split())
IMAGE_COLUMN, TEXT_COLUMN, JSON_COLUMN, LABEL_COLUMN = range(4)  # the columns of ``SampleTable.parts``
_SUFFIX_COLUMNS = dict.fromkeys(IMAGE_SUFFIXES, IMAGE_COLUMN) | {
    "txt": TEXT_COLUMN,
    "json": JSON_COLUMN,
    "cls": LABEL_COLUMN,
}
_CAPTION_KEYS = ("captions", "caption", "text")
_CLASS_NAMES_FILE = "classnames.txt"


@runtime_checkable
class FileCollection(Protocol):
    """Files by number, in a folder or a tar."""

    @property
    def names(self) -> NameTable: ...

    def source(self, row: int) -> ImageSource: ...


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of an opened folder or tar; a ``Format``."""

    name: str
    members: FileCollection
    id_of: Callable[[str], str]
    """The id of a sample from the name of its image."""
    parts: Int32[np.ndarray, "pairs 4"]
    """Which member is the image, text, json and class number of a sample; -1 for none."""
    columns: ColumnNames
    """Keys of the json; none of them is asked for by default, and ``image`` means nothing here."""
    classes: tuple[str, ...]
    root: str
    hashes: UInt64[np.ndarray, " pairs"]
    id_prefix: str = ""

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, row: int, /) -> Pair:
        image, text, json_, label = self.parts[row].tolist()
        record, about = self._record(json_, image), self._class(label)
        key = self.columns.caption or next((key for key in _CAPTION_KEYS if key in record), "")
        language = self.columns.language or "language"
        captions = self._captions_from(record.get(key), as_text(record.get(language)), text, image)
        if not captions and "class" in about:
            captions = (Caption(about["class"]),)
        id = as_text(record.get(self.columns.id)) or self.id_prefix + self.id_of(self.members.names[image])
        group = as_text(record.get(self.columns.group)) or id
        spoken_for = (key, language, self.columns.id, self.columns.group)
        meta = about | {name: value for name, value in record.items() if name not in spoken_for}
        return Pair(id, self.members.source(image), captions, group, meta)

    def prefixed(self, id_prefix: str, path_prefix: str) -> "SampleTable":
        return replace(self, id_prefix=id_prefix)

    def _captions_from(self, said: Any, language: str, text: int, image: int) -> tuple[Caption, ...]:
        """Those of the json, then that of the txt unless it is among them."""
        captions = parse_captions(said, language, self._path(image))
        if text < 0:
            return captions
        more = Caption(self._text(text).strip(), language)
        return captions if any(more.text == caption.text for caption in captions) else (*captions, more)

    def _record(self, member: int, image: int) -> dict[str, Any]:
        asked = (self.columns.caption, self.columns.id, self.columns.language, self.columns.group)
        named = [name for name in asked if name]
        if member < 0:
            if named:
                raise UserError(f"{self._path(image)} has no .json beside it, which should give {', '.join(named)}")
            return {}
        try:
            record = json.loads(self._text(member))
        except json.JSONDecodeError as error:
            raise UserError(f"{self._path(member)} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{self._path(member)} must hold an object such as {{'captions': ['a dog']}}")
        require_columns(named, record, self._path(member))
        return record

    def _class(self, member: int) -> dict[str, Any]:
        if member < 0:
            return {}
        text = self._text(member).strip()
        if not text.isdecimal() or (self.classes and int(text) >= len(self.classes)):
            few = f" below {len(self.classes)}, as {_CLASS_NAMES_FILE} has so many lines" if self.classes else ""
            raise UserError(f"{self._path(member)} must hold a class number{few}, not {text!r}")
        return {"label": int(text)} | ({"class": self.classes[int(text)]} if self.classes else {})

    def _text(self, member: int) -> str:
        try:
            return self.members.source(member).read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path(member)} is not UTF-8 text: {error}") from None

    def _path(self, member: int) -> str:
        return self.members.source(member).name


def open_webdataset(spec: SourceSpec) -> SampleTable:
    """A webdataset tar: all members whose names agree up to the first dot are one sample."""
    tar = open_tar(spec.path, spec.file, spec.cache)
    key = ("samples", str(spec.path.resolve()), tar.stamp)
    return open_samples(spec, tar, lambda: group_by_key(tar.names, split_member_name, spec.path), member_id, key)


def open_samples(
    spec: SourceSpec,
    members: FileCollection,
    group: Callable[[], Int32[np.ndarray, "pairs 4"]],
    id_of: Callable[[str], str],
    key: tuple[str, ...],
) -> SampleTable:
    """Samples whose captions have all been read once; ``group`` says which members make a sample."""
    name, beside = str(spec.path), spec.path if spec.path.is_dir() else spec.path.parent
    named = beside / _CLASS_NAMES_FILE
    classes = tuple(named.read_text("utf-8").splitlines()) if named.is_file() else ()

    def samples(parts: np.ndarray, hashes: np.ndarray) -> SampleTable:
        root = str(spec.path.absolute())
        return SampleTable(name, members, id_of, parts, spec.columns, classes, root, hashes)

    def build() -> IndexArrays:
        parts = group()
        draft = samples(parts, np.zeros(len(parts), np.uint64))
        check = CaptionCheck(name)
        ids = []
        for row in range(len(parts)):
            pair = draft[row]
            looked = f"{pair.image.name} (looked in its .txt, and for {', '.join(_CAPTION_KEYS)} in its .json)"
            check.add(looked, pair.captions)
            ids.append(hash64(pair.id))
        check.finish()
        return {"parts": parts, "hashes": np.array(ids, np.uint64)}

    opened = samples(**load_or_build_index(spec.cache, (*key, spec.format, repr(spec.columns), repr(classes)), build))
    require_unique_ids(name, opened)
    return opened


def group_by_key(
    names: NameTable, split_name: Callable[[str], tuple[str, str]], where: Path
) -> Int32[np.ndarray, "pairs 4"]:
    """The samples among files, in the order of their first file; files that are part of no sample are left out."""
    rows: dict[str, int] = {}
    parts: list[list[int]] = []
    for number, name in enumerate(names):
        key, suffix = split_name(name)
        part = _SUFFIX_COLUMNS.get(suffix.lower())
        if part is None or is_hidden(name):
            continue
        row = rows.setdefault(key, len(parts))
        if row == len(parts):
            parts.append([-1] * 4)
        if parts[row][part] >= 0:
            other = names[parts[row][part]]
            raise UserError(f"{where}: {other!r} and {name!r} claim one place in one sample; rename or remove one")
        parts[row][part] = number
    found = np.array([sample for sample in parts if sample[IMAGE_COLUMN] >= 0], np.int32).reshape(-1, 4)
    if not len(found):
        looked = f"images (.{', .'.join(IMAGE_SUFFIXES)}) with a .txt or .json of the same name"
        raise UserError(f"{where} has no pairs: looked for {looked}; found {count_suffixes(names)}")
    return found


def count_suffixes(names: Iterable[str]) -> str:
    """What files there are, by suffix, the commonest first."""
    counts = Counter(PurePosixPath(name).suffix or "files without suffix" for name in names if not is_hidden(name))
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common(6)) or "nothing"


def is_hidden(name: str) -> bool:
    """Files that systems leave behind: .DS_Store, ._cat.jpg, __MACOSX/..."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def split_member_name(name: str) -> tuple[str, str]:
    """Key and suffix as webdataset has them: the name is cut at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def member_id(name: str) -> str:
    """The id of a sample in a tar: its key."""
    return split_member_name(name)[0]
