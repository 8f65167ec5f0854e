"""Captions of the same images in many languages: the layouts of XTD and of Crossmodal-3600 (XM3600).

Input: a folder. XTD: ``test_image_names.txt``, and ``test_1kcaptions_LANGUAGE.txt`` with a caption for each of its
lines. XM3600: ``captions.jsonl``, a line an image, ``{"image/key", "LANGUAGE": {"caption": […]}}``. Output: pairs, each
caption with its language; images are looked for in the folder and in folders one level below. Note: Aggarwal & Kale,
2020 (XTD); Thapliyal et al., EMNLP 2022 (XM3600).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clasp.data.formats.base import OpenedSource, SourceSpec
from clasp.data.formats.listed_pairs import check_listed_pairs
from clasp.data.formats.rows import load_json, parse_captions
from clasp.data.formats.samples import IMAGE_SUFFIXES
from clasp.data.formats.sources import FileSource
from clasp.plain_types import Caption, Pair, UserError

XTD_NAMES_FILE, XM3600_FILE = "test_image_names.txt", "captions.jsonl"
_XTD_PREFIX = "test_1kcaptions_"


def open_xtd(spec: SourceSpec) -> OpenedSource:
    """Open a folder of XTD. Raises ``UserError``: a caption file of another length, an image that is not there."""
    names = (spec.path / XTD_NAMES_FILE).read_text("utf-8-sig").split("\n")
    names = [name.strip() for name in names if name.strip()]
    files = sorted(spec.path.glob(f"{_XTD_PREFIX}*.txt"))
    if not files:
        raise UserError(f"{spec.path} has {XTD_NAMES_FILE} and no {_XTD_PREFIX}LANGUAGE.txt")
    captions: list[list[Caption]] = [[] for _ in names]
    for file in files:
        lines = file.read_text("utf-8-sig").rstrip("\n").split("\n")
        if len(lines) != len(names):
            raise UserError(f"{file} has {len(lines)} lines for the {len(names)} images of {XTD_NAMES_FILE}")
        language = file.stem.removeprefix(_XTD_PREFIX)
        for row, line in zip(captions, lines, strict=True):
            row.append(Caption(line.strip(), language))
    return _open(spec, zip(names, captions, strict=True))


def open_xm3600(spec: SourceSpec) -> OpenedSource:
    """Open a folder of XM3600. Raises ``UserError``: a line that is no such, an image that is not there."""
    rows = []
    for number, line in enumerate((spec.path / XM3600_FILE).read_text("utf-8-sig").splitlines(), 1):
        where = f"{spec.path / XM3600_FILE} line {number}"
        try:
            record = load_json(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("image/key"), str):
            raise UserError(f'{where} is not as in XM3600: {{"image/key": …, "en": {{"caption": […]}}}} is wanted')
        rows.append((record["image/key"], _xm3600_captions(record, where)))
    return _open(spec, rows)


def _xm3600_captions(record: dict[str, Any], where: str) -> list[Caption]:
    given = {key: value["caption"] for key, value in record.items() if isinstance(value, dict) and "caption" in value}
    return list(parse_captions(given, None, where))


def _open(spec: SourceSpec, rows: Iterable[tuple[str, list[Caption]]]) -> OpenedSource:
    images = _find_images(spec.path)
    pairs, missing = [], []
    for name, captions in rows:
        path = images.get(name) or images.get(os.path.splitext(name)[0])
        if path is None:
            missing.append(name)
        else:
            pairs.append(Pair(name, FileSource(path), tuple(captions), name))
    if missing:
        raise UserError(
            f"{spec.path} lacks {len(missing)} of its images, such as {missing[0]}; looked in it and in the folders "
            "one level below"
        )
    return check_listed_pairs(str(spec.path), pairs, str(spec.path.absolute()))


def _find_images(folder: Path) -> dict[str, str]:
    """Image files by name, and by name without suffix, in a folder and one level below."""
    found: dict[str, str] = {}
    for place in (folder, *sorted(each for each in folder.iterdir() if each.is_dir())):
        for entry in os.scandir(place):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower().removeprefix(".") in IMAGE_SUFFIXES:
                path = os.path.abspath(entry.path)
                found.setdefault(entry.name, path)
                found.setdefault(stem, path)
    return found
