"""Encoded images to resized RGB pictures: decode, turn upright, crop, resize; without torch.

Input: the bytes of one image (or a path, or a Pillow image) and ``ResizeSettings``. Output: a square Pillow image, or a
smaller encoded copy of the image. Every mode is converted to upright RGB on a background colour; an unreadable image
raises ``ImageError``. Note: crop and resize are one ``resize`` call with a box, so no full copy is made, and a JPEG
to be downscaled is decoded at reduced scale. Nothing here imports torch, so that an exported model runs where there is
none (``clasp.convert.onnx_model``).
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from clasp.data.regular_file import read_regular_file
from clasp.errors import UserError, printable

CropBox = tuple[float, float, float, float]
RGBColor = tuple[int, int, int]

ResizeMode = Literal["crop", "squash", "pad"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
EXIF_TRANSPOSE = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREYS = {"I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "I": 32}  # integer modes of more than 8 bits -> bits
# Pillow's decoders of the suffixes that are read, and their modules. Others are refused whatever the file is named:
# that of EPS runs another program.
DECODERS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "AVIF": "AvifImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "PPM": "PpmImagePlugin",
}
_LARGE_IMAGE_PIXELS = 50_000_000  # decoded; of larger ones, worker processes decode one at a time
_REDUCING_GAP = 1.0  # a JPEG is decoded at the smallest scale of at least this many times the target size


IMAGE_FORMS = "a path, encoded bytes or a PIL image"


class ImageError(ValueError):
    """An image that cannot be read or decoded; the message gives the reason."""


@dataclass(frozen=True)
class ResizeSettings:
    """How an image becomes a square RGB picture; the fields are those of ``clasp.data.images.ImageTransform``."""

    size: int
    resize: ResizeMode = "crop"
    interpolation: Interpolation = "bicubic"
    background: RGBColor = (255, 255, 255)
    crop_fraction: float = 1.0

    def crop_box(self, width: int, height: int) -> CropBox:
        """The box of the upright image that is resized, in pixels: left, top, right, bottom."""
        if self.resize != "crop":
            return 0.0, 0.0, float(width), float(height)
        # torchvision's whole-pixel sizes and offsets (Resize, then CenterCrop), mapped back to the image
        shorter = math.floor(self.size / self.crop_fraction)
        longer = int(shorter * max(width, height) / min(width, height))
        wide, high = (shorter, longer) if width <= height else (longer, shorter)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        across, down = width / wide, height / high
        return left * across, top * down, (left + self.size) * across, (top + self.size) * down


def decode_resized(
    image: bytes | str | Path | Image.Image,
    settings: ResizeSettings,
    crop: Callable[[CropBox], CropBox] = lambda box: box,
) -> Image.Image:
    """Decoded and resized to ``size`` by ``size``, RGB; ``crop`` maps the box of the upright image that is resized, in
    pixels. Raises ``ImageError``."""
    with open_image(image) as picture:
        turn = exif_orientation(picture)
        width, height = picture.size[::-1] if turn >= 5 else picture.size
        box = crop(settings.crop_box(width, height))
        target = (settings.size, settings.size)
        if settings.resize == "pad":
            scale = settings.size / max(box[2] - box[0], box[3] - box[1])
            target = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
        reduced = 1
        if not isinstance(image, Image.Image):  # an image of the caller must not be changed in place
            reduced = draft_jpeg(picture, min((box[2] - box[0]) / target[0], (box[3] - box[1]) / target[1]))
        with _one_large_image_at_a_time(picture.width * picture.height):
            picture = to_opaque(picture, settings.background)
    if turn in EXIF_TRANSPOSE:
        picture = picture.transpose(EXIF_TRANSPOSE[turn])
    left, top, right, bottom = (edge / reduced for edge in box)
    box = (left, top, min(right, picture.width), min(bottom, picture.height))
    picture = picture.resize(target, RESAMPLING[settings.interpolation], box=box, reducing_gap=3.0).convert("RGB")
    if target != (settings.size, settings.size):
        page = Image.new("RGB", (settings.size, settings.size), settings.background)
        page.paste(picture, ((settings.size - target[0]) // 2, (settings.size - target[1]) // 2))
        return page
    return picture


def thumbnail(image: bytes, side: int) -> Image.Image:
    """The whole image padded to a white square of ``side`` pixels, as a Pillow image. Raises ``ImageError``."""
    return decode_resized(image, ResizeSettings(side, "pad"))


def shrink_to_fit(image: bytes, side: int, format: Literal["JPEG", "WEBP"], quality: int) -> bytes:
    """The whole image, upright, at most ``side`` pixels wide and high (never enlarged), encoded anew without metadata.

    Raises ``ImageError``.
    """
    with open_image(image) as picture:
        turn = exif_orientation(picture)
        draft_jpeg(picture, max(picture.size) / side)
        picture = to_opaque(picture, (255, 255, 255))
        if turn in EXIF_TRANSPOSE:
            picture = picture.transpose(EXIF_TRANSPOSE[turn])
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        out = io.BytesIO()
        picture.save(out, format, quality=quality)
    return out.getvalue()


def normalise_picture(
    picture: Image.Image, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[np.ndarray, "3 height width"]:
    """``(x / 255 - mean) / std`` in float32, each step rounded once: bitwise ``ImageTransform`` without torch."""
    values = np.ascontiguousarray(np.array(picture).transpose(2, 0, 1), dtype=np.float32)
    shift, factor = (np.array(each, dtype=np.float32)[:, None, None] for each in (mean, std))
    return (values / np.float32(255) - shift) / factor


# --- decoding -------------------------------------------------------------------------------------------------------


@cache
def available_decoders() -> tuple[str, ...]:
    """Those of ``DECODERS`` that this Pillow was built with; no others are imported, as by Pillow's own ``init``."""
    for module in DECODERS.values():
        with suppress(ImportError):
            import_module(f"PIL.{module}")
    return tuple(name for name in DECODERS if name in Image.OPEN)


def is_image_form(value: Any) -> bool:
    """Whether a value is of one of the types of ``IMAGE_FORMS``; does not read it."""
    return isinstance(value, str | bytes | Path | Image.Image)


def load_opened(image: Any) -> None:
    """Decode a Pillow image that was only opened: its file is not read by several threads then. Raises
    ``ImageError``."""
    if isinstance(image, Image.Image):
        with open_image(image) as picture:
            picture.load()


@contextmanager
def open_image(image: bytes | str | Path | Image.Image) -> Iterator[Image.Image]:
    """The image, opened but not decoded; errors in the block are raised as ``ImageError``, which names a path."""
    if not is_image_form(image):
        raise ImageError(f"{type(image).__name__} is not an image: {IMAGE_FORMS} is wanted")
    if not isinstance(image, str | Path):
        with _image_errors():
            yield from _opened(image)
        return
    encoded = _read_file(image)
    try:
        with _image_errors():
            yield from _opened(encoded)
    except ImageError as error:
        raise ImageError(f"{printable(str(image))}: {error}") from error.__cause__


def _opened(image: bytes | Image.Image) -> Iterator[Image.Image]:
    if isinstance(image, Image.Image):
        yield image
    else:
        with Image.open(io.BytesIO(image), formats=available_decoders()) as picture:
            yield picture


def _read_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises ``ImageError``, which names it once."""
    try:
        return read_regular_file(path)
    except UserError as error:
        raise ImageError(str(error)) from error
    except FileNotFoundError as error:
        raise ImageError(f"{printable(str(path)) or 'an empty path'}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"{printable(str(path))}: cannot be read: {reason}") from error


@contextmanager
def _image_errors() -> Iterator[None]:
    """Errors in the block as ``ImageError``."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or of a format that Pillow cannot read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"too large to be decoded safely: {error}") from error
    except Exception as error:  # for damaged bytes Pillow raises struct, index, zlib, syntax errors and others
        raise ImageError(f"damaged image: {error}") from error


@contextmanager
def _one_large_image_at_a_time(pixels: int) -> Iterator[None]:
    """A block that one process of this user is in at a time, where the image is large: a decoded pixel takes up to 12
    bytes, so that a few such images in as many workers would fill the memory."""
    if pixels <= _LARGE_IMAGE_PIXELS:
        yield
        return
    import fcntl  # not on every system

    path = Path(tempfile.gettempdir()) / f"clasp-large-image-{os.getuid()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def exif_orientation(picture: Image.Image) -> int:
    """The EXIF orientation that is still to be undone, 1 to 8; read before decoding.

    Pillow undoes that of a TIFF while it decodes, and of no other container, so a TIFF is decoded first.
    """
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        picture.load()
    try:
        orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data does not make the image unreadable
        return 1
    return orientation if orientation in EXIF_TRANSPOSE else 1


def draft_jpeg(picture: Image.Image, shrink: float) -> int:
    """Have a JPEG to be downscaled decoded at 1/2, 1/4 or 1/8; returns the divisor, 1 otherwise."""
    divisor = max((d for d in (1, 2, 4, 8) if d * _REDUCING_GAP <= shrink), default=1)
    if divisor == 1 or not isinstance(picture, JpegImagePlugin.JpegImageFile):
        return 1
    full = picture.width
    drafted = picture.draft(None, (picture.width // divisor, picture.height // divisor))
    return round(full / drafted[1][2]) if drafted else 1


def to_opaque(picture: Image.Image, ground: RGBColor) -> Image.Image:
    """Decoded, 8 bits, opaque: RGB, or L (three times cheaper to resize)."""
    picture.load()
    if picture.mode in _GREYS:
        # Pillow rescales the levels of a PGM to 16 bits, whatever its maximum
        bits = 16 if picture.format == "PPM" else _GREYS[picture.mode]
        return _grey_from_integers(np.asarray(picture), bits)
    if picture.mode == "F":
        raise ImageError("floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        page = Image.new("RGB", picture.size, ground)
        page.paste(picture, mask=picture)
        return page
    if picture.mode == "1":
        return picture.convert("L")
    return picture if picture.mode in ("RGB", "L") else picture.convert("RGB")


def _grey_from_integers(values: np.ndarray, bits: int) -> Image.Image:
    """Grey levels 0 to 65535 as 8 bits. Raises ``ImageError`` where the range of the levels is ambiguous.

    Levels up to 255 are an 8-bit image in a wider file, which would become black; 32-bit files have no standard range,
    so their levels must need 16 bits.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535 or 0 < high <= 255 or (bits == 32 and 0 < high < 32768):
        raise ImageError(
            f"{bits}-bit integer pixels from {low} to {high}, whose range is not known; save it with 8 bits, or with "
            "16 and levels up to 65535"
        )
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
