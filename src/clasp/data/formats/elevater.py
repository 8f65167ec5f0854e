"""ELEVATER's layout: an index file of images and class numbers, a file of class names, images in zips or folders.

Input: a folder with ``labels.txt`` and ``test.txt``. Output: its pairs. A line of the index is ``IMAGE NUMBER`` or, of
several classes, ``IMAGE NUMBER,NUMBER``; ``test.zip@0/1.png`` is a member of a zip. The caption is the class name.
Note: ``meta`` has ``label`` and ``class``; where an image has other than one class, ``classes``, a list, for
``multilabel``, and each image is its own group.
"""

import os
from pathlib import Path
from typing import Any

from clasp.data.formats.base import OpenedSource, SourceSpec
from clasp.data.formats.index_cache import file_stamp
from clasp.data.formats.listed_pairs import check_listed_pairs
from clasp.data.formats.sources import FileSource, require_inside
from clasp.data.formats.zip_members import ZipSource, open_zip
from clasp.plain_types import Caption, ImageSource, Pair, UserError

LABELS_FILE, INDEX_FILE = "labels.txt", "test.txt"


def open_elevater(spec: SourceSpec) -> OpenedSource:
    """Open a folder of ELEVATER. Raises ``UserError`` for a line that is no such, and for a zip that is not there."""
    names = (spec.path / LABELS_FILE).read_text("utf-8-sig").splitlines()
    names = [name.strip() for name in names if name.strip()]
    index = spec.path / INDEX_FILE
    rows = [_parse(line, f"{index} line {number}", names) for number, line in enumerate(_lines(index), 1)]
    several = any(len(labels) != 1 for _, labels in rows)
    stamps: dict[str, str] = {}
    pairs = []
    for image, labels in rows:
        classes = [names[label] for label in labels]
        meta: dict[str, Any] = {"classes": classes} if several else {"label": labels[0], "class": classes[0]}
        captions = tuple(Caption(name) for name in classes)
        pairs.append(Pair(image, _source(image, spec, stamps), captions, image, meta))
    return check_listed_pairs(str(spec.path), pairs, str(spec.path.absolute()))


def _lines(index: Path) -> list[str]:
    return [line for line in index.read_text("utf-8-sig").splitlines() if line.strip()]


def _parse(line: str, where: str, names: list[str]) -> tuple[str, list[int]]:
    image, _, numbers = line.strip().rpartition(" ")
    labels = numbers.split(",")
    if not image or not all(label.isdecimal() and int(label) < len(names) for label in labels):
        raise UserError(
            f"{where} is {line.strip()!r}; IMAGE NUMBER is wanted, a number below {len(names)}, which {LABELS_FILE} has"
        )
    return image.strip(), [int(label) for label in labels]


def _source(image: str, spec: SourceSpec, stamps: dict[str, str]) -> ImageSource:
    folder = str(spec.path.absolute())
    archive, at, member = image.partition("@")
    require_inside(archive, folder, f"{spec.path / INDEX_FILE}")
    path = os.path.join(folder, archive)
    if not at:
        return FileSource(path)
    if path not in stamps:
        if not os.path.isfile(path):
            raise UserError(f"{spec.path / INDEX_FILE} names images in {archive}, which is not in {spec.path}")
        stamps[path] = file_stamp(path)
        open_zip(path, stamps[path], os.getpid())
    return ZipSource(path, stamps[path], member)
