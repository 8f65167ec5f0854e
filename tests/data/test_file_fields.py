"""Fields of image files: EXIF written by Pillow and by hand, in each container; hostile EXIF gives none."""

from __future__ import annotations

import io
import random
import struct

import pytest
from PIL import ExifTags, Image

from clasp.data.exif import ExifFields, read_exif
from clasp.data.file_fields import FILE_FIELDS, read_file_fields

TAKEN = {0x010F: "Canon", 0x0110: "Canon EOS 5D", 0x0112: 6}


def photo(kind: str, *, taken: str = "2020:02:29 12:34:56") -> bytes:
    """40 by 20 pixels, on its side."""
    exif = Image.Exif()
    exif.update(TAKEN)
    exif.get_ifd(ExifTags.IFD.Exif)[0x9003] = taken
    out = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(out, kind, exif=exif)
    return out.getvalue()


def tiff(*tags: tuple[int, int, int, bytes], order: str = "<", tail: bytes = b"") -> bytes:
    """A TIFF structure of one directory, with ``tail`` behind it."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    entries = b"".join(struct.pack(f"{order}HHI4s", *tag) for tag in tags)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + tail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_the_header_states(kind: str):
    data = photo(kind)
    expected = {"date": "2020-02-29", "camera": "Canon EOS 5D", "width": 20, "height": 40, "bytes": len(data)}
    if kind == "TIFF":
        del expected["date"]  # Pillow does not write this directory into a TIFF
        assert read_file_fields(data) == expected
        return
    assert read_file_fields(data) == expected
    assert tuple(expected) == FILE_FIELDS


def test_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda picture: pytest.fail("decoded"))
    whole = photo("JPEG")
    assert read_file_fields(whole[: len(whole) - 20])["date"] == "2020-02-29"
    out = io.BytesIO()
    Image.new("L", (3, 5)).save(out, "PNG")
    assert read_file_fields(out.getvalue()) == {"width": 3, "height": 5, "bytes": len(out.getvalue())}
    assert read_file_fields(b"no image") == {"bytes": 8}


@pytest.mark.parametrize("taken", ["0000:00:00 00:00:00", "2021:02:29 00:00:00", "    :  :     :  :  ", "2020:1:1", ""])
def test_a_day_that_is_none(taken: str):
    assert "date" not in read_file_fields(photo("JPEG", taken=taken))


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("NIKON CORPORATION", "NIKON D70", "NIKON D70"),
        ("Apple", "iPhone 12", "Apple iPhone 12"),
        ("Apple", "", "Apple"),
        ("", "X100", "X100"),
        ("<script>\x07\x1b[31m", "a\nb", "<script> [31m a b"),
        ("x" * 5000, "y", f"{'x' * 80} y"),
    ],
)
def test_maker_and_model(make: str, model: str, camera: str):
    long, short = make.encode() + b"\0", model.encode() + b"\0"
    at = 8 + 2 + 2 * 12 + 4
    tags = [(0x010F, 2, len(long), struct.pack(">I", at)), (0x0110, 2, len(short), struct.pack(">I", at + len(long)))]
    if len(short) <= 4:
        tags[1] = (0x0110, 2, len(short), short.ljust(4, b"\0"))
    assert read_exif(tiff(*tags, order=">", tail=long + short)).camera == camera


HOSTILE = {
    "empty": b"",
    "prefix alone": b"Exif\0\0",
    "cut header": b"II*\0\x08",
    "big TIFF": b"II+\0\x08\0\0\0",
    "directory behind the end": b"II*\0\xff\xff\xff\xff",
    "directory in the header": b"II*\0\0\0\0\0",
    "65535 tags": b"II*\0\x08\0\0\0\xff\xff" + bytes(24),
    "directory in itself": tiff((0x8769, 4, 1, struct.pack("<I", 8))),
    "text behind the end": tiff((0x010F, 2, 1 << 31, struct.pack("<I", 1 << 31))),
    "text of no length": tiff((0x010F, 2, 0, b"abcd")),
    "text that is a number": tiff((0x0110, 4, 1, b"abcd")),
    "orientation 77": tiff((0x0112, 3, 1, struct.pack("<I", 77))),
    "orientation of no values": tiff((0x0112, 3, 0, struct.pack("<I", 6))),
    "no UTF-8": tiff((0x010F, 2, 4, b"\xff\xfe\xfd\xfc")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_exif(name: str):
    assert read_exif(HOSTILE[name]) == ExifFields()


def test_damaged_exif_never_fails():
    whole, chance = photo("JPEG"), random.Random(0)
    start = whole.index(b"Exif\0\0")
    block = whole[start : start + 200]
    for _ in range(2000):
        damaged = bytearray(block[: chance.randrange(len(block))])
        for _ in range(chance.randrange(8)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        found = read_exif(bytes(damaged))
        assert len(found.camera) <= 161 and found.camera.isprintable() and 1 <= found.orientation <= 8
