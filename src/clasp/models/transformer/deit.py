"""The vision transformer of DeiT and DeiT-III, and its position table at other sizes.

Here because the towers of the LilT paper include DeiT-III (layer scale, positions on patches only), which
``transformers`` does not have, and because papers' checkpoints carry its names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clasp.models.transformer.encoders import ImageTransformer, ImageTransformerSettings


class VisionTransformer(ImageTransformer):
    """ViT as DeiT has it (Touvron et al., ICML 2021); with ``layer_scale``, DeiT-III (ECCV 2022).

    Plain towers add ``N + 1`` positions after the class token is in place; layer-scale towers add ``N`` positions to
    the patches before it.
    """

    def __init__(self, *, size: int, patch: int, width: int, blocks: int, heads: int, layer_scale: float | None = None):
        super().__init__(
            ImageTransformerSettings(
                size=size,
                patch=patch,
                width=width,
                layers=blocks,
                heads=heads,
                layer_scale=layer_scale,
                class_position=layer_scale is None,
            )
        )


def resize_pos_embed(table: Float[Tensor, "1 rows D"], grid: int, extra_rows: int) -> Float[Tensor, "1 new_rows D"]:
    """A square position table at another grid: bicubic, no antialiasing; extra rows are kept in front."""
    extra, patches = table[:, :extra_rows], table[:, extra_rows:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return table
    square = patches.transpose(1, 2).reshape(1, -1, side, side)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((extra, resized.flatten(2).transpose(1, 2)), dim=1)
