"""A folder of pairs: images with caption files of the same name, or images in class folders (ImageFolder layout).

Input: a folder. Output: its pairs. If every image, at any depth, has a ``.txt`` or ``.json`` of its name beside it,
those are the captions; if none has, and every image is in a folder one level down, that folder is its class. Note:
anything in between is an error with an example, since either reading would drop or falsify captions. A
``classnames.txt`` in the folder (or above a split such as ``test``) has the names of the sorted class folders.
"""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt64

from clasp.data.formats.base import OpenedSource, SourceSpec
from clasp.data.formats.ids import hash64
from clasp.data.formats.layouts import open_published_layout
from clasp.data.formats.name_table import NameTable
from clasp.data.formats.rows import is_blank, require_unicode
from clasp.data.formats.samples import (
    IMAGE_COLUMN,
    JSON_COLUMN,
    LABEL_COLUMN,
    TEXT_COLUMN,
    group_by_key,
    is_hidden,
    open_samples,
)
from clasp.data.formats.shard_folders import CLASS_NAMES_FILE, read_class_folder_names
from clasp.data.formats.skipped_files import SkippedFiles
from clasp.data.formats.sources import FileSource
from clasp.plain_types import Caption, Pair, UserError


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """The files of a folder, recursively, sorted, without hidden ones; links to folders are not followed."""

    path: str
    names: NameTable
    skipped_files: SkippedFiles
    """Folders that were not read."""
    shard: None = None

    @classmethod
    def of(cls, path: Path) -> "FolderFiles":
        found: list[str] = []
        unread: list[tuple[str, str]] = []

        def cannot_read(error: OSError) -> None:
            unread.append(("folder that cannot be read", Path(error.filename).relative_to(path).as_posix()))

        for folder, inner, files in os.walk(path, onerror=cannot_read):
            at = Path(folder).relative_to(path)
            inner[:] = sorted(name for name in inner if not is_hidden(name))
            linked = [name for name in inner if os.path.islink(os.path.join(folder, name))]
            unread += [("link to a folder, which is not followed", (at / name).as_posix()) for name in linked]
            found += [name for file in sorted(files) if not is_hidden(name := (at / file).as_posix())]
        return cls(str(path.absolute()), NameTable.of(found), SkippedFiles.of(unread))

    def source(self, row: int) -> FileSource:
        return FileSource(os.path.join(self.path, self.names[row]))

    def stamp(self, rows: Iterable[int]) -> str:
        """A hash of all names, and of size and modification time of the files ``rows``."""
        digest = hashlib.sha256(self.names.letters.tobytes() + self.names.ends.tobytes())
        for row in rows:
            digest.update(f"{self.source(row).version}\0".encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ClassFolders:
    """Images in class folders; an ``OpenedSource``. The caption is the class name.

    Each image is a group of its own, so that a validation split is by image and can have all classes; ``meta`` has the
    ``class`` and its number ``label``.
    """

    folder: FolderFiles
    images: Int32[np.ndarray, " pairs"]
    classes: tuple[str, ...]
    captions: tuple[str, ...]
    """Of the classes: names of ``classnames.txt``, or those of the folders"""
    hashes: UInt64[np.ndarray, " pairs"]
    skipped_files: SkippedFiles
    id_prefix: str = ""
    path_prefix: str = ""

    @property
    def root(self) -> str:
        return self.folder.path

    @property
    def key(self) -> tuple[str, ...]:
        return ("classes", self.folder.path, self.folder.stamp([]), self.id_prefix, self.path_prefix, *self.captions)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int, /) -> Pair:
        member = int(self.images[row])
        name = self.folder.names[member]
        class_folder = name.partition("/")[0]
        label = bisect_left(self.classes, class_folder)
        caption = self.captions[label]
        meta = {"label": label, "class": caption}
        id, group = self.id_prefix + name, self.path_prefix + name
        return Pair(id, self.folder.source(member), (Caption(caption),), group, meta)

    def prefixed(self, id_prefix: str, path_prefix: str) -> "ClassFolders":
        return replace(self, id_prefix=id_prefix, path_prefix=path_prefix)


def open_folder(spec: SourceSpec) -> OpenedSource:
    """Open a folder in a layout of ``FOLDER_LAYOUTS``, else by the rule of the module; ``UserError`` if none
    applies."""
    if (published := open_published_layout(spec)) is not None:
        return published
    folder = FolderFiles.of(spec.path)
    parts, skipped = grouped = group_by_key(folder.names, split_file_name, spec.path, folder.skipped_files)
    captioned = (parts[:, [TEXT_COLUMN, JSON_COLUMN]] >= 0).any(axis=1)
    images = parts[:, IMAGE_COLUMN]
    if captioned.all():
        beside = parts[:, [TEXT_COLUMN, JSON_COLUMN, LABEL_COLUMN]]
        key = ("folder", str(spec.path.resolve()), folder.stamp(beside[beside >= 0].tolist()))
        return open_samples(spec, folder, lambda: grouped, str, key)
    bare = folder.names[int(images[~captioned][0])]
    missing = f"{(~captioned).sum()} of {len(images)} images have no .txt or .json of their name beside them"
    if captioned.any():
        raise UserError(
            f"{spec.path} mixes images with and without captions: {missing} ({bare}); either all have one, "
            "or none has and each lies in a folder named for its class"
        )
    depths = np.array([folder.names[int(image)].count("/") for image in images])
    if (depths != 1).any():
        odd = folder.names[int(images[depths != 1][0])]
        raise UserError(
            f"{spec.path} has no captions: {missing}, and not all lie one level down in a folder named for their "
            f"class ({odd})"
        )
    return _class_folders(folder, images, skipped)


def _class_folders(folder: FolderFiles, images: np.ndarray, skipped: SkippedFiles) -> ClassFolders:
    names = [folder.names[int(image)] for image in images]
    classes = tuple(sorted({name.partition("/")[0] for name in names}))
    captions = read_class_folder_names(Path(folder.path)) or tuple(map(caption_from_folder, classes))
    if len(captions) != len(classes):
        count = f"{len(classes)} class folders and {len(captions)} lines in {CLASS_NAMES_FILE}"
        raise UserError(f"{folder.path} has {count}; it must have a line for each folder, in the order of their names")
    for name, caption in zip(classes, captions, strict=True):
        require_unicode(caption, f"{folder.path}: the folder {name!r}, whose name is the caption of its images")
        if is_blank(caption):
            raise UserError(f"{folder.path}: the folder {name!r} names no class, so its images have an empty caption")
    hashes = np.array([hash64(name) for name in names], np.uint64)
    return ClassFolders(folder, images, classes, captions, hashes, skipped)


def caption_from_folder(folder: str) -> str:
    """The name of a folder as a caption."""
    return " ".join(folder.replace("_", " ").replace("-", " ").split())


def split_file_name(name: str) -> tuple[str, str]:
    """Key and suffix of a file in a folder: split at the last dot."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix.removeprefix(".")
