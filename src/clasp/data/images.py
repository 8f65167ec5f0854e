"""Encoded images to pixels: decoded and resized (``data.decoding``), augmented, normalised.

Input: the bytes of one image (or a path, or a Pillow image). Output: ``Float[Tensor, "3 height width"]``, normalised
with the mean and standard deviation of the image tower; an unreadable image raises ``ImageError``. Note: only this
file, ``decoding``, ``image_header``, ``augment`` and ``contact_sheet`` use Pillow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from clasp.data.augment import Augment
from clasp.data.decoding import (
    IMAGE_FORMS,
    ImageError,
    Interpolation,
    ResizeMode,
    ResizeSettings,
    RGBColor,
    decode_resized,
    is_image_form,
    load_opened,
    shrink_to_fit,
    thumbnail,
)
from clasp.plain_types import UserError

__all__ = [
    "IMAGE_FORMS",
    "Augment",
    "ImageError",
    "ImageTransform",
    "Interpolation",
    "RGBColor",
    "ResizeMode",
    "is_image_form",
    "load_opened",
    "shrink_to_fit",
    "thumbnail",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DECODER_VERSION = 2  # part of every fingerprint: increment it when the same bytes give other pixels


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
        return self._normalise(decode_resized(image, self._resizing))

    def augmented(
        self, image: bytes | str | Path | Image.Image, augment: Augment, seed: int
    ) -> Float[Tensor, "3 height width"]:
        """The same with random augmentation, determined by ``seed``. Raises ``ImageError``."""
        draw = augment.sample_params(seed)
        resized = decode_resized(image, self._resizing, lambda box: augment.crop(box, draw))
        return self._normalise(augment.apply(resized, self.background, draw))

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

    @property
    def _resizing(self) -> ResizeSettings:
        return ResizeSettings(self.size, self.resize, self.interpolation, self.background, self.crop_fraction)

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
