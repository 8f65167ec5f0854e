"""What the header of an image file states, as metadata to search by: size in pixels and bytes, day taken, camera.

Input: the bytes of an image. Output: a dictionary of ``FILE_FIELDS``. Note: pixels are not decoded. EXIF data behind
the pixels of a PNG is not read, since Pillow reaches it by decoding them.
"""

from __future__ import annotations

from clasp.data.decoding import ImageError, open_image
from clasp.data.exif import read_exif

EXIF_FIELDS = ("date", "camera")
"""What a file states only in EXIF data, which many files do not have"""
FILE_FIELDS = (*EXIF_FIELDS, "width", "height", "bytes")
"""``date``: 2020-01-31; ``width`` and ``height``: pixels of the upright image; ``bytes``: size of the file"""


def read_file_fields(data: bytes) -> dict[str, str | int]:
    """The fields that the file has: without EXIF data no ``date`` and ``camera``; of an unreadable image ``bytes``."""
    try:
        with open_image(data) as picture:
            width, height = picture.size
            is_tiff = picture.format == "TIFF"
            block = data if is_tiff else picture.info.get("exif")
    except ImageError:
        return {"bytes": len(data)}
    exif = read_exif(block if isinstance(block, bytes) else b"")
    if exif.orientation >= 5 and not is_tiff:  # Pillow gives the upright size of a TIFF
        width, height = height, width
    named = {name: text for name, text in zip(EXIF_FIELDS, (exif.date, exif.camera), strict=True) if text}
    return {**named, "width": width, "height": height, "bytes": len(data)}
