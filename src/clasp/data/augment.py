"""Random changes of a training image: crop, turn, flip, recolour, and RandAugment as ALBEF and LilT have it.

In: settings (``data.augment``), a seed, a picture. Out: the box to crop, and the resized picture changed.
Unusual: all luck is drawn beforehand, from the seed alone and in a fixed order, whichever settings are on; what one
setting draws does not depend on the others. With ``images`` and ``sheets`` all that touches Pillow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageEnhance, ImageOps

from clasp.types import UserError

CropBox = tuple[float, float, float, float]
RGBColor = tuple[int, int, int]


class RandAugmentParams(NamedTuple):
    """The luck of one RandAugment operation, each number uniform in [0, 1)."""

    operation: float
    application: float
    sign: float


class AugmentParams(NamedTuple):
    """The luck of one augmented image, each number uniform in [0, 1). Always all drawn, in this order."""

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
    """Drawn last, as many as are asked for."""


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image. The defaults change nothing, so no caption becomes false.

    Captions speak of left and right, of letters and of colours: flips and colour changes are for data that does not.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Least and greatest area of the crop, as a fraction of what the plain transform shows."""
    aspect: tuple[float, float] = (1.0, 1.0)
    """Least and greatest width / height of that crop, relative to the plain one; drawn log-uniformly."""
    flip: float = 0.0
    """Probability of a left-right flip."""
    rotate: float = 0.0
    """Greatest rotation either way, degrees; the corners show the ground."""
    shift: float = 0.0
    """Greatest shift in either axis, fraction of the side; what is uncovered shows the ground."""
    grayscale: float = 0.0
    """Probability of losing the colours."""
    brightness: float = 0.0
    """Greatest relative change of brightness either way."""
    contrast: float = 0.0
    """Greatest relative change of contrast either way."""
    randaugment: tuple[int, int] = (0, 0)
    """How many of RandAugment's operations are drawn, and their magnitude from 1 to 10; (0, 0) is off, LilT has
    (2, 7). After all other changes; see ``apply_randaugment``."""

    def __post_init__(self) -> None:
        for name, (low, high), top in (("crop_scale", self.crop_scale, 1.0), ("aspect", self.aspect, math.inf)):
            if not 0 < low <= high <= top:
                raise UserError(f"augment {name} = ({low}, {high}) is not a range of positive numbers up to {top}")
        limits = {"flip": 1, "rotate": 180, "shift": 1, "grayscale": 1, "brightness": 1, "contrast": 1}
        for name, limit in limits.items():
            if not 0 <= asdict(self)[name] <= limit:
                raise UserError(f"augment {name} = {asdict(self)[name]} is not between 0 and {limit}")
        operations, magnitude = self.randaugment
        if self.randaugment != (0, 0) and not (operations >= 1 and 1 <= magnitude <= _MAX_MAGNITUDE):
            raise UserError(
                f"augment randaugment = ({operations}, {magnitude}) is neither (0, 0), for off, nor at least one "
                f"operation and a magnitude from 1 to {_MAX_MAGNITUDE}"
            )

    def sample_params(self, seed: int) -> AugmentParams:
        """The luck that belongs to a seed."""
        luck = random.Random(seed)
        numbers: dict[str, Any] = {name: luck.random() for name in AugmentParams._fields[:-1]}
        chances = (RandAugmentParams(luck.random(), luck.random(), luck.random()) for _ in range(self.randaugment[0]))
        return AugmentParams(**numbers, operations=tuple(chances))

    def crop(self, box: CropBox, params: AugmentParams) -> CropBox:
        """A box inside ``box``, of the drawn area, aspect and place."""
        left, top, right, bottom = box
        area = self.crop_scale[0] + params.area * (self.crop_scale[1] - self.crop_scale[0])
        aspect = self.aspect[0] * (self.aspect[1] / self.aspect[0]) ** params.aspect
        wide = (right - left) * min(1.0, math.sqrt(area * aspect))
        high = (bottom - top) * min(1.0, math.sqrt(area / aspect))
        left += params.left * (right - left - wide)
        top += params.top * (bottom - top - high)
        return left, top, left + wide, top + high

    def apply(self, picture: Image.Image, ground: RGBColor, params: AugmentParams) -> Image.Image:
        """The resized picture, turned, shifted, flipped and recoloured as drawn."""
        angle = self.rotate * (2 * params.rotate - 1)
        across, down = (
            round(self.shift * (2 * luck - 1) * picture.width) for luck in (params.translate_x, params.translate_y)
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

_MAX_MAGNITUDE = 10  # the magnitude at which an operation does the most it ever does
_APPLY_PROBABILITY = 0.5  # probability of a drawn operation
_FILL_COLOR = (128, 128, 128)  # what a moved picture uncovers

# What each does at the strongest. Brightness and sharpness do not go either way: their factor is 0.1 + 1.8 times the
# strength, so that magnitude 5 leaves the picture as it is and less takes away.
_MAX_SHEAR = 0.3  # pixels a row, or a column
_MAX_TRANSLATION = 10 / 256  # of the side
_MAX_ROTATION = 30.0  # degrees, positive against the clock


def _enhance_factor(strength: float) -> float:
    return 0.1 + 1.8 * abs(strength)


def _affine(
    picture: Image.Image, *, across: float = 0.0, down: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0
) -> Image.Image:
    """Shifted by so many pixels, or each row (column) by so many pixels more than the one before."""
    back = (1, -shear_x, -across, -shear_y, 1, -down)  # from a place in the outcome to where it was
    affine, smooth = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return picture.transform(picture.size, affine, back, smooth, fillcolor=_FILL_COLOR)


# each takes a picture and the strength, from -1 to 1
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
    """RandAugment (Cubuk et al., NeurIPS 2020): operations with equal chances, one after the other, at one magnitude.

    ALBEF's ten operations and ranges (Li et al., NeurIPS 2021), which leave colours out for the captions' sake; LilT
    took them over, two of magnitude 7. Each is drawn from all ten anew and applied with probability 0.5; shears,
    shifts and turns go either way. Ours are Pillow's filters in place of OpenCV's: the centre of a turn and the fixed
    edge of a shear lie up to half a pixel elsewhere, and levels are rounded otherwise. Shifts are a part of the side,
    which at LilT's 256 pixels comes to its 10 pixels at the strongest.
    """
    for which, whether, sign in params:
        if whether < _APPLY_PROBABILITY:
            operation = list(RANDAUGMENT_OPS.values())[int(which * len(RANDAUGMENT_OPS))]
            picture = operation(picture, math.copysign(magnitude / _MAX_MAGNITUDE, sign - 0.5))
    return picture
