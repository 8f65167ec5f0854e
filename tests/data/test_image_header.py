"""Headers of images from strangers, and copies that fit a size."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from clasp.data.image_header import read_image_header
from clasp.data.images import ImageError, shrink_to_fit

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def encoded(kind: str, size: tuple[int, int] = (60, 30), **options: object) -> bytes:
    out = io.BytesIO()
    image = Image.new("RGB", size, (220, 40, 40))
    image.paste((40, 80, 220), (0, 0, size[0] // 2, size[1]))  # the left half is blue
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_headers(kind: str):
    header = read_image_header(encoded(kind), 1800)
    assert (header.format, header.media_type) == (kind, f"image/{kind.lower()}")
    assert (header.width, header.height) == (60, 30)
    with pytest.raises(ImageError, match="60 x 30 pixels are more than the 1,799"):
        read_image_header(encoded(kind), 1799)
    small = Image.open(io.BytesIO(shrink_to_fit(encoded(kind), 20, "WEBP", 80)))
    assert small.size == (20, 10)


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX", "EPS", "PDF"])
def test_other_decoders_are_not_tried(kind: str):
    with pytest.raises(ImageError, match="not JPEG, PNG, WebP, GIF, BMP or TIFF"):
        read_image_header(encoded(kind), 10_000)


def test_copies_are_upright_opaque_and_never_larger():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left half becomes the upper one
    turned = Image.open(io.BytesIO(shrink_to_fit(encoded("JPEG", (64, 32), exif=exif), 16, "JPEG", 90)))
    assert turned.size == (8, 16) and not turned.getexif()
    upper, lower = turned.convert("RGB").getpixel((4, 2)), turned.convert("RGB").getpixel((4, 13))
    assert upper[2] > 150 > upper[0] and lower[0] > 150 > lower[2]
    assert Image.open(io.BytesIO(shrink_to_fit(encoded("PNG"), 500, "WEBP", 80))).size == (60, 30)
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "PNG")
    white = Image.open(io.BytesIO(shrink_to_fit(clear.getvalue(), 8, "JPEG", 90))).getpixel((4, 4))
    assert min(white) > 240
    with pytest.raises(ImageError, match="damaged"):
        shrink_to_fit(encoded("PNG", (600, 300))[:200], 20, "WEBP", 80)
