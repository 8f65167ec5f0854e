"""The vision transformer of DeiT and DeiT-III, and interpolation of its position embedding to other image sizes.

The towers of the LilT paper include DeiT-III (layer scale, positions on patches only), which ``transformers`` does not
have, and the papers' checkpoints use these parameter names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clasp.models.transformer.encoders import ImageTransformer
from clasp.models.transformer.settings import ImageTransformerSettings


class VisionTransformer(ImageTransformer):
    """The ViT of DeiT (Touvron et al., ICML 2021); with ``layer_scale``, of DeiT-III (ECCV 2022).

    Without layer scale, ``N + 1`` positions are added after the class token is prepended; with it, ``N`` positions are
    added to the patches before.
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
    """Resize a square position embedding to a ``grid`` x ``grid`` one: bicubic, no antialiasing. The first
    ``extra_rows`` rows (class token) are not resized."""
    extra, patches = table[:, :extra_rows], table[:, extra_rows:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return table
    square = patches.transpose(1, 2).reshape(1, -1, side, side)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((extra, resized.flatten(2).transpose(1, 2)), dim=1)
