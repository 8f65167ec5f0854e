"""Samples: files that share a name (``cat.jpg``, ``cat.txt``, ``cat.json``, ``cat.cls``) in a folder or a tar.

Input: a webdataset tar, or a folder of the same files. Output: its samples as pairs. ``txt`` is one caption, or one a
line in a data set for retrieval (``shard_folders``). ``json`` may have captions (``captions``, else ``caption``, else
``text``) and metadata (all other keys). ``cls`` is a class number, ``meta["label"]``; with a ``classnames.txt`` beside
the tar, or above a split, ``meta["class"]`` is its name. Note: the class name is the caption of a sample without one.
Files that belong to no sample are counted by reason. Names that differ only in Unicode normalisation (NFC, NFD) belong
to one sample.
"""

import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt64

from clasp.data.formats.base import SourceSpec
from clasp.data.formats.ids import hash64, require_unique_ids
from clasp.data.formats.index_cache import IndexArrays, load_or_build_index
from clasp.data.formats.name_table import NameTable
from clasp.data.formats.rows import (
    CaptionCheck,
    ColumnNames,
    as_text,
    load_json,
    parse_captions,
    require_columns,
)
from clasp.data.formats.shard_folders import CLASS_NAMES_FILE, captions_by_line, read_class_folder_names
from clasp.data.formats.skipped_files import SkippedFiles
from clasp.data.formats.tar import open_tar
from clasp.data.shard_stage import StagedShard
from clasp.plain_types import Caption, ImageSource, Pair, UserError

IMAGE_SUFFIXES = tuple("jpg jpeg jfif png webp gif bmp tif tiff avif jp2 ppm pgm".split())
UNREAD_IMAGE_SUFFIXES = frozenset(
    "heic heif hif avifs jxl jxr ico cur icns svg eps ps ai psd psb xcf tga dds exr hdr pfm pbm pnm jpe j2k jpx jpf "
    "raw dng cr2 cr3 nef arw orf rw2 raf dcm dicom nii".split()
)
IMAGE_COLUMN, TEXT_COLUMN, JSON_COLUMN, LABEL_COLUMN = range(4)  # the columns of ``SampleTable.parts``
_SUFFIX_COLUMNS = dict.fromkeys(IMAGE_SUFFIXES, IMAGE_COLUMN) | {
    "txt": TEXT_COLUMN,
    "json": JSON_COLUMN,
    "cls": LABEL_COLUMN,
}
CAPTION_SUFFIXES = ("txt", "json", "cls")
_CAPTION_KEYS = ("captions", "caption", "text")
_SYSTEM_FILES = ("__MACOSX", "Thumbs.db", "desktop.ini")


@runtime_checkable
class FileCollection(Protocol):
    """Files by number, in a folder or a tar."""

    @property
    def shard(self) -> StagedShard | None: ...

    @property
    def names(self) -> NameTable: ...

    def source(self, row: int) -> ImageSource: ...


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of an opened folder or tar; an ``OpenedSource``."""

    name: str
    opened_as: tuple[str, ...]
    """The key of its index."""
    members: FileCollection
    id_of: Callable[[str], str]
    """Maps the file name of an image to the id of its sample."""
    parts: Int32[np.ndarray, "pairs 4"]
    """Members of each sample: image, txt, json, cls; -1 for none."""
    columns: ColumnNames
    """Keys of the json; none is required by default, and ``image`` is not used."""
    classes: tuple[str, ...]
    by_line: bool
    """Whether each line of a txt is a caption."""
    root: str
    hashes: UInt64[np.ndarray, " pairs"]
    skipped_files: SkippedFiles
    id_prefix: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.opened_as, self.id_prefix)

    @property
    def shard(self) -> StagedShard | None:
        return self.members.shard

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, row: int, /) -> Pair:
        image, text, json_, label = self.parts[row].tolist()
        record, about = self._record(json_, image), self._class(label)
        key = self.columns.caption or next((key for key in _CAPTION_KEYS if key in record), "")
        language = self.columns.language or "language"
        captions = self._captions_from(record.get(key), record.get(language), text, image)
        if not captions and "class" in about:
            captions = (Caption(about["class"]),)
        where, columns = self._path(image), self.columns
        id = as_text(record.get(columns.id), where, columns.id)
        id = id or self.id_prefix + self.id_of(self.members.names[image])
        group = as_text(record.get(columns.group), where, columns.group) or id
        used_keys = (key, language, self.columns.id, self.columns.group)
        meta = about | {name: value for name, value in record.items() if name not in used_keys}
        return Pair(id, self.members.source(image), captions, group, meta)

    def prefixed(self, id_prefix: str, path_prefix: str) -> "SampleTable":
        return replace(self, id_prefix=id_prefix)

    def _captions_from(self, value: Any, language: Any, text: int, image: int) -> tuple[Caption, ...]:
        """The captions of the json, then that of the txt unless it is a duplicate."""
        where = self._path(image)
        captions = parse_captions(value, language, where)
        if text < 0:
            return captions
        # a list of languages belongs to the captions of the json
        lines = self._text(text)
        given = [line for line in lines.splitlines() if line.strip()] if self.by_line else lines
        more = parse_captions(given, None if isinstance(language, list) and captions else language, where)
        known = {caption.text for caption in captions}
        return (*captions, *(caption for caption in more if caption.text not in known))

    def _record(self, member: int, image: int) -> dict[str, Any]:
        keys = (self.columns.caption, self.columns.id, self.columns.language, self.columns.group)
        named = [name for name in keys if name]
        if member < 0:
            if named:
                raise UserError(f"{self._path(image)} has no .json beside it, which should give {', '.join(named)}")
            return {}
        try:
            record = load_json(self._text(member))
        except UserError:
            raise
        except ValueError as error:
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
            few = f" below {len(self.classes)}, as {CLASS_NAMES_FILE} has so many lines" if self.classes else ""
            raise UserError(f"{self._path(member)} must hold a class number{few}, not {text!r}")
        return {"label": int(text)} | ({"class": self.classes[int(text)]} if self.classes else {})

    def _text(self, member: int) -> str:
        try:
            return self.members.source(member).read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path(member)} is not UTF-8 text: {error}") from None

    def _path(self, member: int) -> str:
        return self.members.source(member).name


class GroupedFiles(NamedTuple):
    """Files grouped into samples, and the skipped files."""

    parts: Int32[np.ndarray, "pairs 4"]
    skipped: SkippedFiles


def open_webdataset(spec: SourceSpec) -> SampleTable:
    """Open a webdataset tar: members whose names are equal up to the first dot are one sample."""
    tar = open_tar(spec.path, spec.file, spec.cache)
    key = ("samples", str(spec.path.resolve()), tar.stamp)
    return open_samples(
        spec, tar, lambda: group_by_key(tar.names, split_member_name, spec.path, tar.skipped_files), member_id, key
    )


def open_samples(
    spec: SourceSpec,
    members: FileCollection,
    group: Callable[[], GroupedFiles],
    id_of: Callable[[str], str],
    key: tuple[str, ...],
) -> SampleTable:
    """Open samples and check all captions; ``group`` groups the members, ``key`` is the cache key of the index."""
    name, classes, by_line = spec.name, read_class_folder_names(spec.path), captions_by_line(spec.path)
    key = (*key, spec.format, repr(spec.columns), repr((classes, by_line)))

    def samples(parts: np.ndarray, hashes: np.ndarray, skipped: np.ndarray) -> SampleTable:
        root = str(spec.path.absolute())
        skipped_files = SkippedFiles.from_array(skipped)
        return SampleTable(
            name, key, members, id_of, parts, spec.columns, classes, by_line, root, hashes, skipped_files
        )

    def build() -> IndexArrays:
        parts, skipped_files = group()
        skipped = skipped_files.to_array()
        draft = samples(parts, np.zeros(len(parts), np.uint64), skipped)
        check = CaptionCheck(name)
        ids = array("Q")
        for row in range(len(parts)):
            pair = draft[row]
            looked = f"{pair.image.name} (looked in its .txt, and for {', '.join(_CAPTION_KEYS)} in its .json)"
            check.add(looked, pair.captions)
            ids.append(hash64(pair.id))
        check.finish()
        arrays = {"parts": parts, "hashes": np.array(ids, np.uint64), "skipped": skipped}
        require_unique_ids(name, samples(**arrays))
        return arrays

    return samples(**load_or_build_index(spec.cache, key, build))


def group_by_key(
    names: NameTable, split_name: Callable[[str], tuple[str, str]], where: Path | str, skipped: SkippedFiles
) -> GroupedFiles:
    """Group files into samples, in the order of their first file; other files are skipped.

    ``skipped``: files already skipped when the files were listed. ``UserError`` when there is no sample, or two files
    have the same role in one sample.
    """
    samples: dict[str, list[int]] = {}
    others: list[tuple[str, str]] = []
    for number, name in enumerate(names):
        if is_hidden(name) or name == CLASS_NAMES_FILE:
            continue
        key, suffix = split_name(name)
        part = _SUFFIX_COLUMNS.get(suffix.lower())
        if part is None:
            others.append((key, name))
            continue
        sample = samples.setdefault(key, [-1] * 4)
        if sample[part] >= 0:
            other = names[sample[part]]
            raise UserError(f"{where}: {other!r} and {name!r} claim one place in one sample; rename or remove one")
        sample[part] = number
    _join_encodings(samples)
    unread = {key for key, name in others if is_unread_image(name)}
    found = [(_skip_reason(name, split_name), name) for _, name in others]
    for key, sample in samples.items():
        if (
            sample[IMAGE_COLUMN] < 0 and key not in unread
        ):  # the caption of an image that is not read is counted with its image
            found.append(("caption or label without an image of its name", names[max(sample)]))
    skipped += SkippedFiles.of(found)
    parts = [sample for sample in samples.values() if sample[IMAGE_COLUMN] >= 0]
    if not parts:
        looked = f"images (.{', .'.join(IMAGE_SUFFIXES)}) with a .txt or .json of the same name"
        why = f"; {skipped}" if skipped else ""
        raise UserError(f"{where} has no pairs: looked for {looked}; found {count_suffixes(names)}{why}")
    return GroupedFiles(np.array(parts, np.int32).reshape(-1, 4), skipped)


def _join_encodings(samples: dict[str, list[int]]) -> None:
    """Merge captions with the image whose name differs only in Unicode normalisation."""
    homes: dict[str, str] = {}
    for key, sample in samples.items():
        if sample[IMAGE_COLUMN] >= 0 and not key.isascii():
            homes[unicodedata.normalize("NFC", key)] = key
    orphans = [key for key, sample in samples.items() if sample[IMAGE_COLUMN] < 0 and not key.isascii()]
    for key in orphans:
        home = samples.get(homes.get(unicodedata.normalize("NFC", key), ""))
        if home is not None and all(mine < 0 or theirs < 0 for mine, theirs in zip(samples[key], home, strict=True)):
            home[:] = map(max, home, samples.pop(key))


def is_unread_image(name: str) -> bool:
    """Whether the suffix of a file is that of an image format that is not supported."""
    return PurePosixPath(name).suffix.lower().removeprefix(".") in UNREAD_IMAGE_SUFFIXES


def _skip_reason(name: str, split_name: Callable[[str], tuple[str, str]]) -> str:
    """The reason a file belongs to no sample."""
    last = PurePosixPath(name).suffix.lower()
    if is_unread_image(name):
        return f"image of a format that is not read ({last})"
    if "." in split_name(name)[1] and last.removeprefix(".") in _SUFFIX_COLUMNS:
        return "name with several dots, which in a tar ends at the first"
    return f"file that is neither image nor caption ({last or 'no suffix'})"


def count_suffixes(names: Iterable[str]) -> str:
    """Counts of files by suffix, the most frequent first, as text."""
    counts = Counter(PurePosixPath(name).suffix or "files without suffix" for name in names if not is_hidden(name))
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common(6)) or "nothing"


def is_hidden(name: str) -> bool:
    """Whether a file is hidden or made by the system: .DS_Store, ._cat.jpg, __MACOSX/..., Thumbs.db."""
    return any(part.startswith(".") or part in _SYSTEM_FILES for part in name.split("/"))


def split_member_name(name: str) -> tuple[str, str]:
    """Key and suffix as in webdataset: split at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def member_id(name: str) -> str:
    """The id of a sample in a tar: its key."""
    return split_member_name(name)[0]
