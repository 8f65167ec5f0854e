"""Encoded images to pixels: decode, crop, resize, augment, normalise.

Input: the bytes of one image (or a path, or a Pillow image). Output: ``Float[Tensor, "3 height width"]``, normalised
with the mean and standard deviation of the image tower. Every mode is converted to upright RGB on a background colour;
an unreadable image raises ``ImageError``. Note: crop and resize are one ``resize`` call with a box, so no full-size
copy is made, and a JPEG to be downscaled is decoded at reduced scale. Only this file, ``image_header``, ``augment`` and
``contact_sheet`` use Pillow.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from clasp.data.augment import Augment, AugmentParams, CropBox, RGBColor
from clasp.data.regular_file import read_regular_file
from clasp.types import UserError

__all__ = [
    "Augment",
    "ImageError",
    "ImageTransform",
    "Interpolation",
    "RGBColor",
    "ResizeMode",
    "shrink_to_fit",
    "thumbnail",
]

ResizeMode = Literal["crop", "squash", "pad"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
_EXIF_TRANSPOSE = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREYS = {"I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "I": 32}  # integer modes of more than 8 bits -> bits
# Pillow's decoders of the suffixes that are read. Others are refused whatever the file is named: that of EPS runs
# another program.
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_LARGE_IMAGE_PIXELS = 50_000_000  # decoded; of larger ones, worker processes decode one at a time
_REDUCING_GAP = 1.0  # a JPEG is decoded at the smallest scale of at least this many times the target size
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DECODER_VERSION = 2  # part of every fingerprint: increment it when the same bytes give other pixels


IMAGE_FORMS = "a path, encoded bytes or a PIL image"


class ImageError(ValueError):
    """An image that cannot be read or decoded; the message gives the reason."""


# --- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTransform:
    """The preprocessing of an image tower: crop and resize, and normalisation with its mean and deviation."""

    size: int
    """Side of the square output, pixels."""
    mean: tuple[float, float, float]
    """Mean of RGB in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of RGB in [0, 1]."""
    resize: ResizeMode = "crop"
    """``crop``: centre crop. ``squash``: the whole image, aspect ratio ignored. ``pad``: the whole image, padded."""
    interpolation: Interpolation = "bicubic"
    """Always with antialiasing."""
    background: RGBColor = (255, 255, 255)
    """RGB, 0 to 255, behind transparent pixels and of the padding."""
    crop_fraction: float = 1.0
    """Only for ``crop``: side of the crop as a fraction of the shorter side (timm's ``crop_pct``)."""

    def __post_init__(self) -> None:
        _check_choices(asdict(self))
        if self.size < 1 or min(self.std) <= 0:
            raise UserError(f"image size = {self.size} and std = {self.std} must be positive")
        if not 0 <= min(self.background) <= max(self.background) <= 255:
            raise UserError(f"image ground = {self.background} is not three numbers from 0 to 255")
        if not (0 < self.crop_fraction <= 1 and (self.resize == "crop" or self.crop_fraction == 1)):
            raise UserError(f"image crop_fraction = {self.crop_fraction} is not in (0, 1], or resize is not 'crop'")

    def __call__(self, image: bytes | str | Path | Image.Image) -> Float[Tensor, "3 height width"]:
        """The normalised image, ``size`` by ``size``. Raises ``ImageError``."""
        return self._normalise(self._decode_resized(image, None, None))

    def augmented(
        self, image: bytes | str | Path | Image.Image, augment: Augment, seed: int
    ) -> Float[Tensor, "3 height width"]:
        """The same with random augmentation, determined by ``seed``. Raises ``ImageError``."""
        draw = augment.sample_params(seed)
        return self._normalise(augment.apply(self._decode_resized(image, augment, draw), self.background, draw))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ImageTransform:
        """Inverse of ``to_dict``. Raises ``UserError`` for an unknown or missing setting."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"unknown image setting {name!r}; there are {', '.join(known)}")
        for name in ("size", "mean", "std"):
            if name not in settings:
                raise UserError(f"the image settings lack {name!r}")
        _check_choices(settings)
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """sha256 over the settings: changes whenever the same bytes could give other pixels."""
        return hashlib.sha256(json.dumps([_DECODER_VERSION, self.to_dict()], sort_keys=True).encode()).hexdigest()

    def _crop_box(self, width: int, height: int) -> CropBox:
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

    def _decode_resized(
        self, image: bytes | str | Path | Image.Image, augment: Augment | None, draw: AugmentParams | None
    ) -> Image.Image:
        """Decoded and resized to ``size`` by ``size``, RGB."""
        with _open_image(image) as picture:
            turn = _orientation(picture)
            width, height = picture.size[::-1] if turn >= 5 else picture.size
            box = self._crop_box(width, height)
            if augment is not None and draw is not None:
                box = augment.crop(box, draw)
            target = (self.size, self.size)
            if self.resize == "pad":
                scale = self.size / max(box[2] - box[0], box[3] - box[1])
                target = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
            reduced = 1
            if not isinstance(image, Image.Image):  # an image of the caller must not be changed in place
                reduced = _draft_jpeg(picture, min((box[2] - box[0]) / target[0], (box[3] - box[1]) / target[1]))
            with _one_large_image_at_a_time(picture.width * picture.height):
                picture = _to_opaque(picture, self.background)
        if turn in _EXIF_TRANSPOSE:
            picture = picture.transpose(_EXIF_TRANSPOSE[turn])
        left, top, right, bottom = (edge / reduced for edge in box)
        box = (left, top, min(right, picture.width), min(bottom, picture.height))
        picture = picture.resize(target, _RESAMPLING[self.interpolation], box=box, reducing_gap=3.0).convert("RGB")
        if target != (self.size, self.size):
            page = Image.new("RGB", (self.size, self.size), self.background)
            page.paste(picture, ((self.size - target[0]) // 2, (self.size - target[1]) // 2))
            return page
        return picture

    def _normalise(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """``(x / 255 - mean) / std`` in float32, each step rounded once."""
        # permuted while still uint8: a quarter of the memory traffic
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float()
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32).view(2, 3, 1, 1)
        return values.div_(255).sub_(mean).div_(std)


def _check_choices(settings: Mapping[str, Any]) -> None:
    for name, choices in (("resize", get_args(ResizeMode)), ("interpolation", get_args(Interpolation))):
        if settings.get(name, choices[0]) not in choices:
            raise UserError(f"image {name} = {settings[name]!r} is not one of {', '.join(choices)}")


def thumbnail(image: bytes, side: int) -> Image.Image:
    """The whole image padded to a white square of ``side`` pixels, as a Pillow image. Raises ``ImageError``."""
    return ImageTransform(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "pad")._decode_resized(image, None, None)


def shrink_to_fit(image: bytes, side: int, format: Literal["JPEG", "WEBP"], quality: int) -> bytes:
    """The whole image, upright, at most ``side`` pixels wide and high (never enlarged), encoded anew without metadata.

    Raises ``ImageError``.
    """
    with _open_image(image) as picture:
        turn = _orientation(picture)
        _draft_jpeg(picture, max(picture.size) / side)
        picture = _to_opaque(picture, (255, 255, 255))
        if turn in _EXIF_TRANSPOSE:
            picture = picture.transpose(_EXIF_TRANSPOSE[turn])
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        out = io.BytesIO()
        picture.save(out, format, quality=quality)
    return out.getvalue()


# --- decoding ------------------------------------------------------------------------------------------------------


@cache
def _decoders() -> tuple[str, ...]:
    """Those of ``DECODERS`` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in DECODERS if name in Image.OPEN)


def is_image_form(value: Any) -> bool:
    """Whether a value is of one of the types of ``IMAGE_FORMS``; does not read it."""
    return isinstance(value, str | bytes | Path | Image.Image)


@contextmanager
def _open_image(image: bytes | str | Path | Image.Image) -> Iterator[Image.Image]:
    """The image, opened but not decoded; errors in the block are raised as ``ImageError``."""
    if not is_image_form(image):
        raise ImageError(f"{type(image).__name__} is no image: {IMAGE_FORMS} is wanted")
    try:
        if isinstance(image, Image.Image):
            yield image
        else:
            encoded = image if isinstance(image, bytes) else read_regular_file(image)
            with Image.open(io.BytesIO(encoded), formats=_decoders()) as picture:
                yield picture
    except (ImageError, MemoryError):
        raise
    except UserError as error:
        raise ImageError(str(error)) from error
    except FileNotFoundError as error:
        raise ImageError(f"no such file: {image}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
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


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation that is still to be undone, 1 to 8; read before decoding.

    Pillow undoes that of a TIFF while it decodes, and of no other container, so a TIFF is decoded first.
    """
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        picture.load()
    try:
        orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data does not make the image unreadable
        return 1
    return orientation if orientation in _EXIF_TRANSPOSE else 1


def _draft_jpeg(picture: Image.Image, shrink: float) -> int:
    """Have a JPEG to be downscaled decoded at 1/2, 1/4 or 1/8; returns the divisor, 1 otherwise."""
    divisor = max((d for d in (1, 2, 4, 8) if d * _REDUCING_GAP <= shrink), default=1)
    if divisor == 1 or not isinstance(picture, JpegImagePlugin.JpegImageFile):
        return 1
    full = picture.width
    drafted = picture.draft(None, (picture.width // divisor, picture.height // divisor))
    return round(full / drafted[1][2]) if drafted else 1


def _to_opaque(picture: Image.Image, ground: RGBColor) -> Image.Image:
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
