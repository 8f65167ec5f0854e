"""The header of an encoded image from a stranger: format, media type and size, read without decoding the pixels.

Input: bytes, at most so many pixels. Output: an ``ImageHeader``. Note: only the decoders of ``IMAGE_MEDIA_TYPES`` are
tried, so that bytes of an upload never reach one of Pillow's rarer ones (which include programs that it calls); a
header that claims more pixels than allowed is refused before anything is allocated.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from clasp.data.decoding import ImageError, available_decoders

IMAGE_MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # several JPEG images in one file; the first is decoded
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
"""Formats that may be decoded, with their media types"""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of an encoded image states; ``width`` and ``height`` in pixels, before any rotation."""

    format: str
    media_type: str
    width: int
    height: int


def read_image_header(data: bytes, max_pixels: int) -> ImageHeader:
    """The header. Raises ``ImageError`` for other formats, damaged headers and more than ``max_pixels`` pixels."""
    decoders = [name for name in available_decoders() if name in IMAGE_MEDIA_TYPES]  # MPO is read by that of JPEG
    try:
        with Image.open(io.BytesIO(data), formats=decoders) as picture:
            name, (width, height) = picture.format or "", picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"too large to be decoded safely: {error}") from None
    except Exception:  # for damaged bytes Pillow raises struct, index, zlib, syntax errors and others
        raise ImageError("not an image, or not JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than the {max_pixels:,} that are decoded")
    return ImageHeader(name, IMAGE_MEDIA_TYPES[name], width, height)
