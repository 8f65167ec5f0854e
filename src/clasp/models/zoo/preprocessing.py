"""From a model's ``preprocessor_config.json`` to an ``ImageTransform``.

Input: the settings of an image processor of ``transformers``. Output: the transform that returns the same pixels, or a
``UserError`` that names the unsupported field. Note: rescaling and normalisation become one mean and one standard
deviation; the output must be square. Fields that the processor ignores are ignored; fields that change pixels and that
a transform does not have are errors. Tested against the processors of ``transformers``, field by field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from clasp.data.images import ImageTransform, Interpolation
from clasp.models.tower_settings import ImageTowerSettings
from clasp.types import UserError

# by Pillow's numbers; nearest, box and hamming, which are not antialiased here, are replaced by bilinear
_INTERPOLATIONS: dict[int, Interpolation] = {
    0: "bilinear",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "bilinear",
    5: "bilinear",
}
# steps that are supported or do not matter; any other do_… field changes pixels in a way that a transform does not
_KNOWN_STEPS = {
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",  # images are always converted to RGB
    "do_flip_channel_order",
    "do_reduce_labels",  # of segmentation maps
}
_OTHER_GEOMETRY = ("size_divisor", "max_num_patches", "n_clusters")


class Preprocessing(NamedTuple):
    """A transform, and whether the net expects BGR channels."""

    transform: ImageTransform
    bgr: bool


def read_preprocessing(facts: Mapping[str, Any] | None, settings: ImageTowerSettings) -> Preprocessing:
    """The transform of a processor's settings. Raises ``UserError`` naming a field that a transform cannot implement.

    ``settings.size`` and ``settings.resize`` replace a geometry that is not square.
    """
    if facts is None or "size" not in facts:
        raise UserError(
            f"tower = {settings.tower!r} has no preprocessor_config.json with image_mean, image_std and size, so its "
            "pixels cannot be prepared; write a factory that gives a clasp.Backbone with a transform"
        )
    kind = str(facts.get("image_processor_type") or facts.get("feature_extractor_type") or "").removesuffix("Pil")
    for field, value in facts.items():
        other_step = field.startswith("do_") and field not in _KNOWN_STEPS
        if value and (other_step or field in _OTHER_GEOMETRY):
            raise _refused(settings, field, value, "clasp has no such step")
    if facts.get("num_channels") not in (None, 3):
        raise _refused(settings, "num_channels", facts["num_channels"], "pictures are RGB here")
    bgr = bool(facts.get("do_flip_channel_order", kind.startswith("MobileViT")))
    mean, std = _mean_and_deviation(facts, settings, flipped=bgr)
    resize, side, fraction = _geometry(facts, kind, settings)
    resample = facts.get("resample", 3)
    if resample not in _INTERPOLATIONS:
        raise _refused(settings, "resample", resample, f"it is one of {', '.join(map(str, _INTERPOLATIONS))}")
    transform = ImageTransform(
        settings.size or side, mean, std, resize, _INTERPOLATIONS[resample], crop_fraction=fraction
    )
    return Preprocessing(transform, bgr)


# --- values ----------------------------------------------------------------------------------------------------------


def _mean_and_deviation(
    facts: Mapping[str, Any], settings: ImageTowerSettings, *, flipped: bool
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation, RGB in [0, 1], for which ``(x / 255 - mean) / std`` is the processor's output."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if facts.get("do_normalize", True):
        lacking = [field for field in ("image_mean", "image_std") if facts.get(field) is None]
        if lacking:
            raise UserError(
                f"tower = {settings.tower!r}: its preprocessor_config.json normalises, and has no {lacking[0]}"
            )
        if flipped:
            raise _refused(settings, "do_flip_channel_order", True, "its mean and deviation could be of either order")
        mean, std = (_three(facts, field, settings) for field in ("image_mean", "image_std"))
        if facts.get("include_top"):
            std = _each(std, lambda s: s * s)  # EfficientNet's processor divides by the deviation twice
    factor = facts.get("rescale_factor", 1 / 255) if facts.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or factor <= 0:
        raise _refused(settings, "rescale_factor", factor, "it is a positive number")
    offset = 1.0 if facts.get("rescale_offset") and facts.get("do_rescale", True) else 0.0
    if abs(factor * 255 - 1) > 1e-3 or offset:
        mean = _each(mean, lambda m: (m + offset) / (255 * factor))
        std = _each(std, lambda s: s / (255 * factor))
    return mean, std


def _three(facts: Mapping[str, Any], field: str, settings: ImageTowerSettings) -> tuple[float, float, float]:
    """One value per channel; a single number applies to all three."""
    match facts[field]:
        case bool():
            pass
        case int() | float() as value if field == "image_mean" or value > 0:
            return float(value), float(value), float(value)
        case [int() | float() as red, int() | float() as green, int() | float() as blue] if (
            field == "image_mean" or min(red, green, blue) > 0
        ):
            return red, green, blue
    sign = "" if field == "image_mean" else " above 0"
    raise _refused(settings, field, facts[field], f"it is one number{sign}, or three, since pictures are RGB here")


def _each(values: tuple[float, float, float], change: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return change(red), change(green), change(blue)


# --- geometry --------------------------------------------------------------------------------------------------------


def _geometry(facts: Mapping[str, Any], kind: str, settings: ImageTowerSettings) -> tuple[Any, int, float]:
    """``resize``, the side in pixels, and ``crop_fraction`` of the transform."""
    chosen = settings.size is not None and settings.resize is not None
    size, crop = facts["size"], facts.get("crop_size")
    crops = crop is not None and facts.get("do_center_crop", True)
    if not facts.get("do_resize", True) and not chosen:
        raise _refused(settings, "do_resize", False, "clasp shows squares, so set image.size and image.resize")
    if crops and kind.startswith("Perceiver") and not chosen:
        raise _refused(
            settings, "image_processor_type", kind, "it crops before it resizes; set image.size and image.resize"
        )
    shorter = _square_size(size, settings)
    if not crops:
        if "crop_pct" in facts:  # ConvNeXt: from 384 px on, images are squashed
            return ("crop", shorter, facts["crop_pct"] or 224 / 256) if shorter < 384 else ("squash", shorter, 1.0)
        return "crop" if isinstance(size, dict) and "shortest_edge" in size else "squash", shorter, 1.0
    side = _square_size(crop, settings)
    deit = kind.startswith("DeiT")  # DeiT's authors crop; its processor in transformers squashes first, by at most 1/8
    if isinstance(size, dict) and "shortest_edge" not in size and shorter != side and not (chosen or deit):
        raise _refused(
            settings, "crop_size", crop, f"it is cut out of a squashed {shorter} px; set image.size and image.resize"
        )
    if kind.startswith("Levit") and isinstance(size, dict) and "shortest_edge" in size:
        shorter = int(256 / 224 * shorter)
    elif kind.startswith("PoolFormer") and facts.get("crop_pct"):
        shorter = int(shorter / facts["crop_pct"])
    if shorter < side and not chosen:
        raise _refused(settings, "crop_size", crop, f"it is larger than size = {size}; set image.size and image.resize")
    squashed = shorter == side and isinstance(size, dict) and "shortest_edge" not in size
    return ("squash", side, 1.0) if squashed else ("crop", side, _crop_fraction(side, shorter))


def _crop_fraction(side: int, shorter: int) -> float:
    """The fraction for which the transform's ``floor(side / fraction)`` is ``shorter``."""
    fraction = min(1.0, side / shorter)
    return fraction if math.floor(side / fraction) == max(side, shorter) else math.nextafter(fraction, 0)


def _square_size(size: Any, settings: ImageTowerSettings) -> int:
    """The side of a square in any of the four forms that ``preprocessor_config.json`` may have."""
    match size:
        case bool():
            pass
        case int():
            return size
        case {"shortest_edge": int() as side} if not size.get("longest_edge"):
            return side
        case {"height": int() as side, "width": int() as wide} | [int() as side, int() as wide] if side == wide:
            return side
    if settings.size is not None:
        return settings.size
    raise UserError(f"tower = {settings.tower!r} wants pictures of size {size}; clasp shows squares, so set image.size")


def _refused(settings: ImageTowerSettings, field: str, value: Any, why: str) -> UserError:
    return UserError(
        f"tower = {settings.tower!r}: its preprocessor_config.json has {field} = {str(value)[:80]}: {why}; or write a "
        "factory that gives a clasp.Backbone with a transform"
    )
