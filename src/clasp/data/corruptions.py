"""Corrupted images, made when they are read, as in ImageNet-C (Hendrycks & Dietterich, ICLR 2019): eight of its kinds.

Input: an ``ImageSource``, a name of ``CORRUPTIONS`` and a severity from 1 to 5. Output: an ``ImageSource`` whose bytes
are a PNG of the corrupted image. Note: as in ImageNet-C the shorter side is resized to 256 and the centre of 224 is cut
out first, and the formulas and their constants are those of ``make_imagenet_c.py``; ours is not compressed as JPEG
afterwards, and random numbers depend on name, severity and the name of the image alone. Imports Pillow.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clasp.data.decoding import ResizeSettings, decode_resized
from clasp.plain_types import ImageSource

_SIDE, _CROP_FRACTION = 224, 224 / 256
MAX_SEVERITY = 5

_Values = np.ndarray  # height, width, RGB; from 0 to 1
_Corruption = Callable[[_Values, float, np.random.Generator], _Values]


def _gaussian_noise(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    return x + draw.normal(size=x.shape, scale=c)


def _shot_noise(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    return draw.poisson(x * c) / c


def _impulse_noise(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    flipped, salted = draw.random(x.shape) < c, draw.random(x.shape) < 0.5
    return np.where(flipped, salted, x)


def _speckle_noise(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    return x + x * draw.normal(size=x.shape, scale=c)


def _contrast(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * c + mean


def _brightness(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    """``c`` added to the value of HSV; hue and saturation stay, so all channels grow by one factor."""
    value = x.max(axis=2, keepdims=True)
    brighter = np.clip(value + c, 0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _pixelate(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    picture, side = _to_picture(x), int(_SIDE * c)
    small = picture.resize((side, side), Image.Resampling.BOX)
    return _to_values(small.resize((_SIDE, _SIDE), Image.Resampling.BOX))


def _jpeg_compression(x: _Values, c: float, draw: np.random.Generator) -> _Values:
    file = io.BytesIO()
    _to_picture(x).save(file, "JPEG", quality=int(c))
    with Image.open(file) as picture:
        return _to_values(picture.convert("RGB"))


CORRUPTIONS: dict[str, tuple[_Corruption, tuple[float, float, float, float, float]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60.0, 25.0, 12.0, 5.0, 3.0)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (25.0, 18.0, 15.0, 10.0, 7.0)),
}
"""Name to the formula and its constant at severities 1 to 5"""


@dataclass(frozen=True, slots=True)
class CorruptedImage:
    """An ``ImageSource``: ``source`` as it is read, corrupted."""

    source: ImageSource
    corruption: str
    severity: int

    @property
    def name(self) -> str:
        return f"{self.source.name} ({self.corruption} {self.severity})"

    @property
    def version(self) -> str:
        return f"{self.source.version}|{self.corruption}:{self.severity}"

    def read(self) -> bytes:
        """The corrupted image as PNG. Raises ``ImageError`` where the source is no image."""
        frame = ResizeSettings(_SIDE, "crop", "bilinear", crop_fraction=_CROP_FRACTION)
        picture = _to_picture(corrupt(_to_values(decode_resized(self.source.read(), frame)), *self._how))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        return file.getvalue()

    @property
    def _how(self) -> tuple[str, int, int]:
        key = f"{self.corruption}\0{self.severity}\0{self.source.name}"
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return self.corruption, self.severity, int.from_bytes(digest[:8], "big")


def corrupt(values: np.ndarray, corruption: str, severity: int, seed: int) -> np.ndarray:
    """``values`` [224 224 3] from 0 to 1, corrupted and clipped to that range."""
    formula, constants = CORRUPTIONS[corruption]
    return np.clip(formula(values, constants[severity - 1], np.random.default_rng(seed)), 0, 1)


def _to_picture(values: _Values) -> Image.Image:
    return Image.fromarray((values * 255).astype(np.uint8))  # truncated, as there


def _to_values(picture: Image.Image) -> _Values:
    return np.asarray(picture, dtype=np.float64) / 255
