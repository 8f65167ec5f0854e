"""The vision transformer of DeiT, poolings, the bottleneck adapter.

Tensors in, tensors out; no file, no other model. DeiT is here because the towers of the LilT paper include DeiT-III
(layer scale, positions on patches only), which ``transformers`` does not have, and because papers' checkpoints carry
its names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

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


class Adapter(nn.Module):
    """Bottleneck adapter: ``x + up(gelu(down(x)))`` (Houlsby et al., ICML 2019; LilT section 3).

    ``init="identity"`` zeroes ``up``, so a tower is unchanged when adapters are inserted; ``init="random"`` is the
    paper's N(0, 0.02) with zero biases. Works on the last axis, or on axis 1 of feature maps (``channels_first``).
    """

    def __init__(self, width: int, hidden: int, init: str, channels_first: bool):
        super().__init__()
        self.channels_first = channels_first
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        if self.up.weight.is_meta:  # only counted; drawing shapes would be most of the time that counting takes
            return
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if init == "identity":
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.trunc_normal_(self.up.weight, std=0.02)

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        if self.channels_first:
            x = x.movedim(1, -1)
        x = x + self.up(F.gelu(self.down(x)))
        return x.movedim(-1, 1) if self.channels_first else x


# --- pooling: states [B N D] and the mask of real tokens -> one vector a row ------------------------------------------


def pool_cls(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D"]:
    """The class token."""
    return states[:, 0].contiguous()  # a view would keep all tokens in memory


def pool_mean(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D"]:
    """The mean of real tokens; in an image tower, of the patches (without class and register tokens)."""
    weight = mask[:, prefix:, None].to(states.dtype)
    return (states[:, prefix:] * weight).sum(1) / weight.sum(1).clamp(min=1)


def pool_last(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D"]:
    """The last real token."""
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def pool_cls_mean(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D2"]:
    """Class token and mean of the patches, side by side (DINOv2's linear evaluation)."""
    return torch.cat((pool_cls(states, mask, prefix), pool_mean(states, mask, prefix)), dim=1)


def pool_mean_max(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D2"]:
    """Mean and maximum of real tokens (or patches), side by side: what is there on the whole, and what at all."""
    hidden = states[:, prefix:].masked_fill(~mask[:, prefix:, None], -torch.inf)
    return torch.cat((pool_mean(states, mask, prefix), hidden.amax(1)), dim=1)


POOLING_FUNCTIONS = {
    "cls": pool_cls,
    "mean": pool_mean,
    "last": pool_last,
    "eos": pool_last,  # a tower refuses "eos" unless its tokenizer ends every text with its end token
    "cls+mean": pool_cls_mean,
    "mean+max": pool_mean_max,
}


class AttentionPool(nn.Module):
    """One learned query attends to all real tokens (Lee et al., Set Transformer, ICML 2019); starts at their mean."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.key = nn.Linear(width, width, bias=False)  # a bias would cancel in the softmax

    def forward(self, states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        scores = self.key(states) @ self.query / states.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=1)
        return torch.einsum("bn,bnd->bd", weights, states)
