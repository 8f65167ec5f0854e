"""Our own layers: a vision transformer that keeps DeiT's names, poolings, the bottleneck adapter.

Tensors in, tensors out; no file, no other model. The transformer exists because the towers of the LilT paper include
DeiT-III (layer scale, positions on patches only), which ``transformers`` does not have, and because papers' checkpoints
carry these names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection, rows ordered query, key, value."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """A pre-norm transformer block, with layer scale where ``layer_scale`` gives its start value (DeiT-III: 1e-4)."""

    def __init__(self, width: int, heads: int, layer_scale: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        attended = self.attn(self.norm1(x))
        x = x + (attended if self.gamma_1 is None else self.gamma_1 * attended)
        fed = self.mlp(self.norm2(x))
        return x + (fed if self.gamma_2 is None else self.gamma_2 * fed)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one strided convolution, in row-major order."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B N D"]:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT as DeiT has it (Touvron et al., ICML 2021); with ``layer_scale``, DeiT-III (ECCV 2022).

    Plain towers add ``N + 1`` positions after the class token is in place; layer-scale towers add ``N`` positions to
    the patches before it. Returns all tokens after the final norm, class token first.
    """

    def __init__(self, *, size: int, patch: int, width: int, blocks: int, heads: int, layer_scale: float | None = None):
        super().__init__()
        self.size = size
        tokens = (size // patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + (layer_scale is None), width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(VisionBlock(width, heads, layer_scale) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "_ N D"]:
        # as many rows as pixels, but for a net that goes on from given states (nn.trunk)
        x = self.patch_embed(pixels)
        cls = self.cls_token.expand(len(x), -1, -1)
        if self.pos_embed.shape[1] == x.shape[1]:
            x = torch.cat((cls, x + self.pos_embed), dim=1)
        else:
            x = torch.cat((cls, x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def resize_positions(table: Float[Tensor, "1 rows D"], grid: int, extra_rows: int) -> Float[Tensor, "1 new_rows D"]:
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

    ``start="identity"`` zeroes ``up``, so a tower is unchanged when adapters are inserted; ``start="random"`` is the
    paper's N(0, 0.02) with zero biases. Works on the last axis, or on axis 1 of feature maps (``channels_first``).
    """

    def __init__(self, width: int, hidden: int, start: str, channels_first: bool):
        super().__init__()
        self.channels_first = channels_first
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        if self.up.weight.is_meta:  # only counted; drawing shapes would be most of the time that counting takes
            return
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if start == "identity":
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.trunc_normal_(self.up.weight, std=0.02)

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        if self.channels_first:
            x = x.movedim(1, -1)
        x = x + self.up(F.gelu(self.down(x)))
        return x.movedim(-1, 1) if self.channels_first else x


# --- pooling: states [B N D] and the mask of real tokens -> one vector a row ------------------------------------------


def pool_first(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D"]:
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
    return torch.cat((pool_first(states, mask, prefix), pool_mean(states, mask, prefix)), dim=1)


def pool_mean_max(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D2"]:
    """Mean and maximum of real tokens (or patches), side by side: what is there on the whole, and what at all."""
    hidden = states[:, prefix:].masked_fill(~mask[:, prefix:, None], -torch.inf)
    return torch.cat((pool_mean(states, mask, prefix), hidden.amax(1)), dim=1)


POOLS = {
    "cls": pool_first,
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
