"""Augmentation of training images: crop, rotation, shift, flip, colour, and RandAugment as in ALBEF and LilT.

Input: settings (``[data.augment]``), a seed, an image. Output: the crop box, and the augmented resized image. Note: all
random numbers are drawn beforehand, from the seed alone and in a fixed order, whichever settings are on, so that no
setting's draw depends on another. Imports Pillow, as do ``data.decoding``, ``data.images``,
``report.contact_sheet`` and ``report.text_rendering``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageEnhance, ImageOps

from clasp.data.decoding import CropBox, RGBColor
from clasp.plain_types import UserError


class RandAugmentParams(NamedTuple):
    """The random numbers of one RandAugment operation, each uniform in [0, 1)."""

    operation: float
    application: float
    sign: float


class AugmentParams(NamedTuple):
    """The random numbers of one augmented image, each uniform in [0, 1); all are always drawn, in this order."""

    area: float
    aspect: float
    left: float
    top: float
    flip: float
    rotate: float
    translate_x: float
    translate_y: float
    grayscale: float
    brightness: float
    contrast: float
    operations: tuple[RandAugmentParams, ...] = ()
    """Drawn last; their number depends on ``randaugment``."""


@dataclass(frozen=True)
class Augment:
    """Augmentation settings. The defaults change nothing, so that no caption becomes false.

    Captions mention left and right, text and colours: flips and colour changes are for data without such captions.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Minimum and maximum area of the crop, as a fraction of the area of the plain transform."""
    aspect: tuple[float, float] = (1.0, 1.0)
    """Minimum and maximum aspect ratio (width / height) of the crop, relative to the plain one; log-uniform."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    rotate: float = 0.0
    """Maximum rotation either way, degrees; corners are filled with the background."""
    shift: float = 0.0
    """Maximum shift along either axis, fraction of the side; uncovered areas are filled with the background."""
    grayscale: float = 0.0
    """Probability of conversion to greyscale."""
    brightness: float = 0.0
    """Maximum relative change of brightness either way."""
    contrast: float = 0.0
    """Maximum relative change of contrast either way."""
    randaugment: tuple[int, int] = (0, 0)
    """Number of RandAugment operations and their magnitude from 1 to 10; (0, 0) is off, LilT has (2, 7). Applied after
    all other changes; see ``apply_randaugment``."""

    def __post_init__(self) -> None:
        for name, (low, high), top in (("crop_scale", self.crop_scale, 1.0), ("aspect", self.aspect, math.inf)):
            if not 0 < low <= high <= top:
                raise UserError(f"augment {name} = ({low}, {high}) is not a range of positive numbers up to {top}")
        limits = {"flip": 1, "rotate": 180, "shift": 1, "grayscale": 1, "brightness": 1, "contrast": 1}
        for name, limit in limits.items():
            if not 0 <= asdict(self)[name] <= limit:
                raise UserError(f"augment {name} = {asdict(self)[name]} is not between 0 and {limit}")
        operations, magnitude = self.randaugment
        valid = 1 <= operations <= _MAX_OPERATIONS and 1 <= magnitude <= _MAX_MAGNITUDE
        if self.randaugment != (0, 0) and not valid:
            raise UserError(
                f"augment randaugment = ({operations}, {magnitude}) is neither (0, 0), for off, nor from 1 to "
                f"{_MAX_OPERATIONS} operations and a magnitude from 1 to {_MAX_MAGNITUDE}"
            )

    def sample_params(self, seed: int) -> AugmentParams:
        """The random numbers of a seed."""
        rng = random.Random(seed)
        numbers: dict[str, Any] = {name: rng.random() for name in AugmentParams._fields[:-1]}
        operations = (RandAugmentParams(rng.random(), rng.random(), rng.random()) for _ in range(self.randaugment[0]))
        return AugmentParams(**numbers, operations=tuple(operations))

    def crop(self, box: CropBox, params: AugmentParams) -> CropBox:
        """The random crop inside ``box``: area, aspect ratio and position from ``params``."""
        left, top, right, bottom = box
        area = self.crop_scale[0] + params.area * (self.crop_scale[1] - self.crop_scale[0])
        aspect = self.aspect[0] * (self.aspect[1] / self.aspect[0]) ** params.aspect
        width = (right - left) * min(1.0, math.sqrt(area * aspect))
        height = (bottom - top) * min(1.0, math.sqrt(area / aspect))
        left += params.left * (right - left - width)
        top += params.top * (bottom - top - height)
        return left, top, left + width, top + height

    def apply(self, picture: Image.Image, ground: RGBColor, params: AugmentParams) -> Image.Image:
        """The resized image, rotated, shifted, flipped and recoloured; ``ground`` fills uncovered areas."""
        angle = self.rotate * (2 * params.rotate - 1)
        across, down = (
            round(self.shift * (2 * number - 1) * picture.width) for number in (params.translate_x, params.translate_y)
        )
        if self.rotate or self.shift:
            picture = picture.rotate(angle, Image.Resampling.BICUBIC, translate=(across, down), fillcolor=ground)
        if params.flip < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if params.grayscale < self.grayscale:
            picture = picture.convert("L").convert("RGB")
        if self.brightness:
            picture = ImageEnhance.Brightness(picture).enhance(1 + self.brightness * (2 * params.brightness - 1))
        if self.contrast:
            picture = ImageEnhance.Contrast(picture).enhance(1 + self.contrast * (2 * params.contrast - 1))
        return apply_randaugment(picture, self.randaugment[1], params.operations)


# --- RandAugment ---------------------------------------------------------------------------------------------------

_MAX_OPERATIONS = 10  # as many as there are
_MAX_MAGNITUDE = 10  # the magnitude of the strongest effect
_APPLY_PROBABILITY = 0.5  # probability that a drawn operation is applied
_FILL_COLOR = (128, 128, 128)  # fills uncovered areas

# Maxima of the operations. Brightness and sharpness are not symmetric: their factor is 0.1 + 1.8 times the strength, so
# that magnitude 5 is the identity and less reduces them.
_MAX_SHEAR = 0.3  # pixels per row, or per column
_MAX_TRANSLATION = 10 / 256  # of the side
_MAX_ROTATION = 30.0  # degrees, positive is counter-clockwise


def _enhance_factor(strength: float) -> float:
    return 0.1 + 1.8 * abs(strength)


def _affine(
    picture: Image.Image, *, across: float = 0.0, down: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0
) -> Image.Image:
    """Translation in pixels, or a shear: each row (column) is shifted by so many pixels more than the one before."""
    inverse = (1, -shear_x, -across, -shear_y, 1, -down)  # from output to input coordinates
    affine, smooth = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return picture.transform(picture.size, affine, inverse, smooth, fillcolor=_FILL_COLOR)


# each takes an image and a strength from -1 to 1
RANDAUGMENT_OPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda picture, s: picture,
    "autocontrast": lambda picture, s: ImageOps.autocontrast(picture),
    "equalize": lambda picture, s: ImageOps.equalize(picture),
    "brightness": lambda picture, s: ImageEnhance.Brightness(picture).enhance(_enhance_factor(s)),
    "sharpness": lambda picture, s: ImageEnhance.Sharpness(picture).enhance(_enhance_factor(s)),
    "shear_x": lambda picture, s: _affine(picture, shear_x=_MAX_SHEAR * s),
    "shear_y": lambda picture, s: _affine(picture, shear_y=_MAX_SHEAR * s),
    "translate_x": lambda picture, s: _affine(picture, across=_MAX_TRANSLATION * s * picture.width),
    "translate_y": lambda picture, s: _affine(picture, down=_MAX_TRANSLATION * s * picture.height),
    "rotate": lambda picture, s: picture.rotate(_MAX_ROTATION * s, Image.Resampling.BILINEAR, fillcolor=_FILL_COLOR),
}


def apply_randaugment(picture: Image.Image, magnitude: int, params: tuple[RandAugmentParams, ...]) -> Image.Image:
    """RandAugment (Cubuk et al., NeurIPS 2020): uniformly drawn operations, applied in sequence at one magnitude.

    ALBEF's ten operations and ranges (Li et al., NeurIPS 2021), which exclude colour changes because of the captions;
    LilT uses them, two of magnitude 7. Each is drawn from all ten independently and applied with probability 0.5;
    shears, shifts and rotations go either way. Ours uses Pillow's filters instead of OpenCV's: the centre of a rotation
    and the fixed edge of a shear differ by up to half a pixel, and levels are rounded differently. Shifts are relative
    to the side; at LilT's 256 pixels the maximum is its 10 pixels.
    """
    for which, application, sign in params:
        if application < _APPLY_PROBABILITY:
            operation = list(RANDAUGMENT_OPS.values())[int(which * len(RANDAUGMENT_OPS))]
            picture = operation(picture, math.copysign(magnitude / _MAX_MAGNITUDE, sign - 0.5))
    return picture
