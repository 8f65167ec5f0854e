"""EXIF metadata of a photograph: the day it was taken, the camera, and the orientation; read without Pillow.

Input: an EXIF block, or a whole TIFF file: both are a TIFF structure (Exif 2.32, CIPA DC-008, section 4.6). Output:
``ExifFields``, empty where the data is missing, damaged or of another form; nothing raises. Note: the data is
untrusted. Two directories are read, whatever offsets they contain, so no loop is followed; every offset is checked
against the length; texts are cut, and characters that cannot be printed are dropped. Pillow's parser does more than
that, and prints a warning for each damaged tag.
"""

from __future__ import annotations

import re
import struct
from datetime import date
from typing import NamedTuple

_PREFIX = b"Exif\x00\x00"  # of the block in a JPEG
_BYTE_ORDERS = {b"II*\x00": "<", b"MM\x00*": ">"}
_MAKE, _MODEL, _ORIENTATION, _EXIF_DIRECTORY = 0x010F, 0x0110, 0x0112, 0x8769
_TAKEN, _DIGITIZED = 0x9003, 0x9004  # DateTimeOriginal, DateTimeDigitized; 0x0132 is when the file was changed
_WANTED = frozenset((_MAKE, _MODEL, _ORIENTATION, _EXIF_DIRECTORY, _TAKEN, _DIGITIZED))
_ASCII, _SHORT, _LONG, _IFD = 2, 3, 4, 13  # types of a tag
_TEXT_BYTES = 80
_DATE = re.compile(r"([0-9]{4})[:/-]([0-9]{2})[:/-]([0-9]{2})(?![0-9])")


class ExifFields(NamedTuple):
    """What the EXIF data of an image states."""

    date: str = ""
    """Day on which it was taken, or else digitized, as ``2020-01-31``, in the camera's time; empty if unknown"""
    camera: str = ""
    """Maker and model; empty if unknown"""
    orientation: int = 1
    """1 to 8; from 5 on, width and height are exchanged"""


class _Tag(NamedTuple):
    kind: int
    length: int
    value: bytes  # 4 bytes: the value itself, or the offset of a longer one


def read_exif(data: bytes) -> ExifFields:
    """The fields of a TIFF structure, with or without the prefix ``Exif``."""
    data = data.removeprefix(_PREFIX)
    order = _BYTE_ORDERS.get(data[:4])
    if order is None or len(data) < 8:
        return ExifFields()
    block = _TiffBlock(data, order)
    main = block.directory(block.unsigned(data[4:8]))
    inner = block.directory(block.integer(main.get(_EXIF_DIRECTORY)))
    taken = _day(block.text(inner.get(_TAKEN))) or _day(block.text(inner.get(_DIGITIZED)))
    orientation = block.integer(main.get(_ORIENTATION))
    return ExifFields(
        taken,
        _camera(block.text(main.get(_MAKE)), block.text(main.get(_MODEL))),
        orientation if 1 <= orientation <= 8 else 1,
    )


class _TiffBlock:
    """A TIFF structure in memory; ``order`` is the byte order as ``struct`` names it."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order = data, order

    def unsigned(self, value: bytes) -> int:
        """Two or four bytes as a number."""
        return struct.unpack(f"{self._order}{'H' if len(value) == 2 else 'I'}", value)[0]

    def directory(self, start: int) -> dict[int, _Tag]:
        """The wanted tags of the directory at an offset; none if it is 0 or lies outside of the data."""
        if start < 8 or start + 2 > len(self._data):
            return {}
        first = start + 2
        end = min(first + 12 * self.unsigned(self._data[start:first]), len(self._data) - 11)
        found = {}
        for place in range(first, end, 12):
            tag, *rest = struct.unpack_from(f"{self._order}HHI4s", self._data, place)
            if tag in _WANTED:
                found.setdefault(tag, _Tag(*rest))
        return found

    def integer(self, tag: _Tag | None) -> int:
        """The first number of a tag; 0 without one."""
        if tag is None or tag.kind not in (_SHORT, _LONG, _IFD) or tag.length == 0:
            return 0
        return self.unsigned(tag.value[: 2 if tag.kind == _SHORT else 4])

    def text(self, tag: _Tag | None) -> str:
        """The text of a tag, at most ``_TEXT_BYTES`` long, without what cannot be printed; empty without one."""
        if tag is None or tag.kind != _ASCII:
            return ""
        length = min(tag.length, _TEXT_BYTES)
        start = self.unsigned(tag.value)
        raw = tag.value[:length] if tag.length <= 4 else self._data[start : start + length]
        text = raw.partition(b"\0")[0].decode("utf-8", "ignore")
        return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _day(text: str) -> str:
    match = _DATE.match(text)
    try:
        return "" if match is None else date(*map(int, match.groups())).isoformat()
    except ValueError:  # 0000:00:00, which cameras without a clock write
        return ""


def _camera(make: str, model: str) -> str:
    """``NIKON CORPORATION`` and ``NIKON D70`` are ``NIKON D70``."""
    if make and model and not model.casefold().startswith(make.split()[0].casefold()):
        return f"{make} {model}"
    return model or make
