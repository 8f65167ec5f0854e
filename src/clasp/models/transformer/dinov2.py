"""DINOv2 under the parameter names of ``transformers``, for the packaged tower: importing that library takes seconds.

Input: pixels of any multiple of the patch size. Output: hidden states, the class token first. Note: output and
gradients are bitwise those of ``transformers``' ``Dinov2Model`` without mask token, so a delta or a weight hash fits
either; under autocast the gradients differ within rounding, since queries, keys and values share one cast of their
input, and so does the output in inference in bfloat16, where packed weights contain the layer scale. Unlike
``ImageTransformer``, which also runs a converted DINOv2, it keeps the three apart and its position embedding at the
size of the checkpoint, interpolated at each pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.frozen_products import frozen_feed_forward
from clasp.models.low_rank_forward import project_together
from clasp.models.packed_weights import product, scaled_product
from clasp.models.plain_attention import attend_to_all
from clasp.models.transformer.blocks import LayerNorm, add_to, cast_for_products, gelu_of
from clasp.models.transformer.encoders import EncoderOutput


@dataclass(frozen=True, slots=True)
class Dinov2EncoderSettings:
    """Architecture; fields and defaults are those of ``transformers``' ``Dinov2Config``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-6
    layerscale_value: float = 1.0


class Dinov2Encoder(nn.Module):
    """Pixels to the states of every token (Oquab et al., TMLR 2024): pre-norm blocks with layer scale, exact GELU.

    Its weights are to be loaded: the embeddings are not initialised.
    """

    def __init__(self, settings: Dinov2EncoderSettings):
        super().__init__()
        self.settings = settings
        self.embeddings = _Embeddings(settings)
        self.encoder = _Blocks(settings)
        self.layernorm = LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)

    def forward(
        self, pixel_values: Float[Tensor, "B 3 height width"], *, class_token_only: bool = False
    ) -> EncoderOutput:
        """States of the class token and of every patch; or of the class token alone, for which the last block computes
        keys and values of the patches and nothing else of them."""
        states = self.embeddings(pixel_values)
        *lower, last = self.encoder.layer
        for block in lower:
            states = block(states)
        states = last(states, class_token_only=True) if class_token_only else last(states)
        return EncoderOutput(self.layernorm(states))


class _Embeddings(nn.Module):
    """Patch embeddings after a class token, with the position embedding added."""

    def __init__(self, settings: Dinov2EncoderSettings):
        super().__init__()
        width, self.grid = settings.hidden_size, settings.image_size // settings.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embeddings = _PatchEmbeddings(settings)
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B N D"]:
        patches = self.patch_embeddings.projection(pixels)
        tokens = torch.cat((self.cls_token.expand(pixels.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)), dim=1)
        return tokens + self._positions(patches)

    def _positions(self, patches: Float[Tensor, "B D height width"]) -> Float[Tensor, "1 N D"]:
        """The position embedding for a grid of patches; bicubic interpolation in float32, as in the original code."""
        height, width = patches.shape[2:]
        if height == width == self.grid:
            return self.position_embeddings
        first, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        maps = grid.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(maps.float(), size=(height, width), mode="bicubic", align_corners=False).to(maps.dtype)
        return torch.cat((first, resized.permute(0, 2, 3, 1).view(1, -1, grid.shape[-1])), dim=1)


class _PatchEmbeddings(nn.Module):
    def __init__(self, settings: Dinov2EncoderSettings):
        super().__init__()
        patch = settings.patch_size
        self.projection = nn.Conv2d(3, settings.hidden_size, kernel_size=patch, stride=patch)


class _Blocks(nn.Module):
    def __init__(self, settings: Dinov2EncoderSettings):
        super().__init__()
        self.layer = nn.ModuleList(_Block(settings) for _ in range(settings.num_hidden_layers))


class _Block(nn.Module):
    """Attention, then the feed-forward part, each after a norm and before a layer scale and the residual sum."""

    def __init__(self, settings: Dinov2EncoderSettings):
        super().__init__()
        width = settings.hidden_size
        self.norm1 = LayerNorm(width, eps=settings.layer_norm_eps)
        self.attention = _Attention(settings)
        self.layer_scale1 = _LayerScale(settings)
        self.norm2 = LayerNorm(width, eps=settings.layer_norm_eps)
        self.mlp = _FeedForward(width, width * settings.mlp_ratio)
        self.layer_scale2 = _LayerScale(settings)

    def forward(self, states: Float[Tensor, "B N D"], *, class_token_only: bool = False) -> Float[Tensor, "B M D"]:
        """The states of all tokens (M = N), or of the class token alone (M = 1)."""
        attended = _scaled(self.attention, self.layer_scale1, self.norm1(states), class_token_only)
        states = add_to(attended, states[:, :1] if class_token_only else states)
        return add_to(_scaled(self.mlp, self.layer_scale2, self.norm2(states)), states)


def _scaled(
    branch: nn.Module, scale: nn.Module, states: Float[Tensor, "B N D"], *options: Any
) -> Float[Tensor, "B M D"]:
    """The output of a branch times the layer scale; by the branch itself in inference mode, which may have its last
    product do it, unless something watches its output."""
    ours = isinstance(branch, _Attention | _FeedForward) and "forward" not in vars(branch)
    watched = branch._forward_hooks or branch._forward_pre_hooks
    if ours and torch.is_inference_mode_enabled() and not watched:
        return branch(states, *options, scale=scale)
    return scale(branch(states, *options))


class _Attention(nn.Module):
    """Multi-head self-attention over every token, of all tokens or of the class token alone."""

    def __init__(self, settings: Dinov2EncoderSettings):
        super().__init__()
        width, self.heads = settings.hidden_size, settings.num_attention_heads
        self.q_proj: nn.Module = nn.Linear(width, width)
        self.k_proj: nn.Module = nn.Linear(width, width)
        self.v_proj: nn.Module = nn.Linear(width, width)
        self.o_proj: nn.Module = nn.Linear(width, width)

    def forward(
        self, states: Float[Tensor, "B N D"], class_token_only: bool = False, *, scale: _LayerScale | None = None
    ) -> Float[Tensor, "B M D"]:
        states = cast_for_products(states)
        if class_token_only:
            queries = project_together(states[:, :1], (self.q_proj,))
            projected = [*queries, *project_together(states, (self.k_proj, self.v_proj))]
        else:
            projected = project_together(states, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projected)
        return _last_product(self.o_proj, attend_to_all(q, k, v).transpose(1, 2).flatten(2), scale)


class _LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, settings: Dinov2EncoderSettings):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((settings.hidden_size,), settings.layerscale_value))

    def forward(self, states: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return states * self.lambda1


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1: nn.Module = nn.Linear(width, hidden)
        self.fc2: nn.Module = nn.Linear(hidden, width)

    def forward(self, states: Float[Tensor, "B N D"], *, scale: _LayerScale | None = None) -> Float[Tensor, "B N D"]:
        whole = frozen_feed_forward(states, self.fc1, self.fc2)
        if whole is None:
            return _last_product(self.fc2, gelu_of(product(self.fc1, states)), scale)
        return whole if scale is None else scale(whole)


def _last_product(layer: nn.Module, x: Float[Tensor, "B N _"], scale: _LayerScale | None) -> Float[Tensor, "B N D"]:
    """The last product of a branch, with the layer scale if given."""
    return product(layer, x) if scale is None else scaled_product(layer, x, scale, scale.lambda1)
