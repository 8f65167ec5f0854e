"""The images of a search with their weights, which the command line and HTTP take apart from each other.

Input: images and weights in the same order. Output: pairs, as of ``clasp.search.query.WeightedImage``. Note: standard
library only: a command that asks a running server must not wait for numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from clasp.errors import UserError, counted

_Image = TypeVar("_Image")


def weigh_images(images: Sequence[_Image], weights: Sequence[float], name: str) -> list[tuple[_Image, float]]:
    """Each image with its weight; without weights, each counts 1.

    ``name``: what the weights are called where they are given. ``UserError`` for another number of weights than images.
    """
    if weights and len(weights) != len(images):
        given = ", ".join(f"{weight:g}" for weight in weights[:8]) + (", ..." if len(weights) > 8 else "")
        count = counted(len(images), "image") if images else "no image"
        raise UserError(f"{name} is {given} for {count}; give one weight for each image, in their order, or none")
    return list(zip(images, weights or [1.0] * len(images), strict=True))
