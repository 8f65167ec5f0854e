"""Pictures of patch–word maps: each image as the tower reads it, overlaid with its similarity to texts and attention.

Input: the ``PatchMaps`` of some images, the caption first among their texts. Output: one PNG, a row for each image.
Note: every map is drawn from its lowest to its highest value, which its label names, so that colours of two maps are
not comparable; colours are viridis', which colour-blind readers can order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clasp.analysis.patch_maps import PatchMaps
from clasp.report.contact_sheet import ContactSheet, SheetRow, SheetSection, Thumbnail, encode_png, sectioned_sheet

_SIDE = 192  # pixels of a tile
_OPACITY = 0.6
_VIRIDIS = torch.tensor([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]) / 255
_LINES = (
    "Each map: cosine of the embedding of every patch with a text, from its lowest (violet) to its highest (yellow).",
    "In brackets: the cosine of the whole image with the text. Colours of two maps are not comparable.",
)
_ATTENTION_LINE = "Attention: share of every patch in the class token, by attention rollout; it depends on no text."
_NO_ATTENTION_LINE = "No attention is drawn: the image tower has no class token, or its attention cannot be recorded."


def draw_patch_maps(found: Sequence[PatchMaps], title: str, path: Path) -> ContactSheet:
    """Draw a row for each image into ``path``: the image, the map of each text, and the attention."""
    attention = all(maps.attention is not None for maps in found)
    lines = [*_LINES, _ATTENTION_LINE if attention else _NO_ATTENTION_LINE]
    rows = [SheetRow(maps.texts[0], _tiles(maps)) for maps in found]
    return sectioned_sheet(title, lines, [SheetSection("Patch–word maps", [], rows, side=_SIDE)], path)


def _tiles(maps: PatchMaps) -> list[Thumbnail]:
    picture = _resized(maps.picture)
    tiles = [Thumbnail(_png(picture), "as the tower reads it")]
    for number, (text, cosines, whole) in enumerate(zip(maps.texts, maps.cosines, maps.image_cosines, strict=True)):
        ends = f"{float(cosines.min()):.2f} to {float(cosines.max()):.2f} ({float(whole):.2f})"
        tiles.append(Thumbnail(overlay(picture, cosines), f"{text if number else 'caption'}: {ends}"))
    if maps.attention is not None:
        highest = 100 * float(maps.attention.max())
        tiles.append(Thumbnail(overlay(picture, maps.attention), f"attention: up to {highest:.1f} %"))
    return tiles


def overlay(picture: Float[Tensor, "3 side side"], values: Float[Tensor, "h w"]) -> bytes:
    """A map over the picture in grey, as PNG: values from their lowest to their highest in the colours of viridis."""
    spread = values.max() - values.min()
    level = (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)
    level = F.interpolate(level[None, None], size=picture.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    place = level.clamp(0, 1) * (len(_VIRIDIS) - 1)
    lower = place.long().clamp(max=len(_VIRIDIS) - 2)
    colour = torch.lerp(_VIRIDIS[lower], _VIRIDIS[lower + 1], (place - lower)[..., None]).permute(2, 0, 1)
    grey = picture.mean(dim=0, keepdim=True).expand(3, -1, -1)
    return _png(torch.lerp(grey, colour, _OPACITY))


def _resized(picture: Float[Tensor, "3 _ _"]) -> Float[Tensor, "3 side side"]:
    """At the size of a tile, so that maps are smooth whatever the size that the tower reads."""
    sized = F.interpolate(picture[None], size=(_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False)
    return sized[0].clamp(0, 1)


def _png(picture: Float[Tensor, "3 side side"]) -> bytes:
    return encode_png((picture.permute(1, 2, 0) * 255).round().byte().numpy())
