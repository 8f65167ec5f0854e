"""ELEVATER's layout: lists of images and class numbers, a file of class names, images in zips or folders.

Input: a folder with ``labels.txt`` and ``test.txt``, or one of its lists, ``FOLDER/train.txt``. Output: the pairs of
the list. A line is ``IMAGE NUMBER`` or, of several classes, ``IMAGE NUMBER,NUMBER``; ``test.zip@0/1.png`` is a member
of a zip. The caption is the class name. Note: ``meta`` has ``label`` and ``class``; where an image has other than one
class, ``classes``, a list, for ``multilabel``, and each image is its own group.
"""

import os
from dataclasses import replace
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
    """Open a folder of ELEVATER: the list of its split ``test``."""
    index = spec.path / INDEX_FILE
    return open_elevater_list(replace(spec, path=index, file=index))


def open_elevater_list(spec: SourceSpec) -> OpenedSource:
    """Open a list of ELEVATER. Raises ``UserError`` for one without class names beside it, for a line that is no such,
    and for a zip that is not there."""
    labels = spec.path.parent / LABELS_FILE
    if not labels.is_file():
        raise UserError(
            f"{spec.path} is read as a list of ELEVATER, IMAGE NUMBER a line, and its class names, {labels}, are not "
            "there"
        )
    names = [name.strip() for name in labels.read_text("utf-8-sig").splitlines() if name.strip()]
    rows = [_parse(line, f"{spec.path} line {number}", names) for number, line in enumerate(_lines(spec.file), 1)]
    several = any(len(numbers) != 1 for _, numbers in rows)
    stamps: dict[str, str] = {}
    pairs = []
    for image, numbers in rows:
        classes = [names[number] for number in numbers]
        meta: dict[str, Any] = {"classes": classes} if several else {"label": numbers[0], "class": classes[0]}
        captions = tuple(Caption(name) for name in classes)
        pairs.append(Pair(image, _source(image, spec.path, stamps), captions, image, meta))
    return check_listed_pairs(str(spec.path), pairs, str(spec.path.parent.absolute()))


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


def _source(image: str, index: Path, stamps: dict[str, str]) -> ImageSource:
    folder = str(index.parent.absolute())
    archive, at, member = image.partition("@")
    require_inside(archive, folder, str(index))
    path = os.path.join(folder, archive)
    if not at:
        return FileSource(path)
    if path not in stamps:
        if not os.path.isfile(path):
            raise UserError(f"{index} names images in {archive}, which is not in {index.parent}")
        stamps[path] = file_stamp(path)
        open_zip(path, stamps[path], os.getpid())
    return ZipSource(path, stamps[path], member)
