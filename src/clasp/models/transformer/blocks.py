"""The one transformer block of our own nets: attention, feed-forward, a norm with each, layer scale where wanted.

In go states ``[B N D]`` and, where the net reads both ways, a mask of real tokens; out come states. Settings say which
norm and where it stands, which activation, and whether queries and keys are normed. Names are those of timm and DeiT,
which papers' checkpoints carry. Unusual: attention never gives out its map; ``Attention.attention_weights`` computes it
from the same inputs, for who asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, the approximation that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class RMSNorm(nn.RMSNorm):
    """As PyTorch's, which under autocast would have its weights in another precision than its input, and warn."""

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick-gelu": quick_gelu}
# both take their statistics in float32 whatever the states are in
_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "layer": lambda width, eps: nn.LayerNorm(width, eps=eps),
    "rms": lambda width, eps: RMSNorm(width, eps=eps),
}


class BlockSettings(BaseModel):
    """What the blocks of a net are like."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(ge=1)
    """D, the width of the states"""
    heads: int = Field(ge=1)
    """Attention heads; they divide ``width``"""
    hidden: int | None = Field(default=None, ge=1)
    """Width inside the feed-forward part; four times ``width`` where left out"""
    activation: Literal["gelu", "quick-gelu"] = "gelu"
    """Inside the feed-forward part"""
    norm_position: Literal["pre", "post"] = "pre"
    """Where the norms of a block stand. pre: before attention and feed-forward part, and one more after the last block;
    post: after each sum (Vaswani et al., 2017), as BERT has them, and none at the end"""
    norm: Literal["layer", "rms"] = "layer"
    """Of the whole net: LayerNorm, or RMSNorm (Zhang and Sennrich, 2019)"""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the variance in every norm of states"""
    qk_norm: bool = False
    """Norm the queries and keys of each head (Henry et al., 2020), which bounds the attention logits"""
    layer_scale: float | None = None
    """Start of a learned factor on each channel of what a block adds (Touvron et al., 2021); DeiT-III has 1e-4"""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BlockSettings:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        return self

    @property
    def mlp_width(self) -> int:
        """Width inside the feed-forward part."""
        return self.hidden or 4 * self.width

    def make_norm(self, width: int) -> nn.Module:
        """A norm of this kind over the last axis, which is ``width`` long."""
        return _NORMS[self.norm](width, self.eps)


def attend(
    q: Float[Tensor, "B H N d"],
    k: Float[Tensor, "B H M d"],
    v: Float[Tensor, "B H M d"],
    mask: Bool[Tensor, "B _"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "B H N d"]:
    """Scaled dot-product attention: the one place where a kernel is chosen. ``mask`` is true on keys to be seen."""
    if causal:
        # padding stands at the end, so no real token sees it and no mask is needed
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = None if mask is None else _key_mask(mask, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _key_mask(mask: Bool[Tensor, "B _"], keys: int) -> Bool[Tensor, "B 1 1 M"]:
    """The mask for every head and query. Tokens put in front of those it speaks of (prompts) are real."""
    return F.pad(mask, (keys - mask.shape[1], 0), value=True)[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection, rows ordered query, key, value."""

    def __init__(self, settings: BlockSettings, *, causal: bool):
        super().__init__()
        self.heads, self.causal = settings.heads, causal
        self.qkv: nn.Module = nn.Linear(settings.width, 3 * settings.width)
        self.q_norm = settings.make_norm(settings.width // settings.heads) if settings.qk_norm else None
        self.k_norm = settings.make_norm(settings.width // settings.heads) if settings.qk_norm else None
        self.proj: nn.Module = nn.Linear(settings.width, settings.width)

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B _"] | None = None) -> Float[Tensor, "B N D"]:
        B, N, D = x.shape
        q, k, v = self._split(x)
        return self.proj(attend(q, k, v, mask, causal=self.causal).transpose(1, 2).reshape(B, N, D))

    def attention_weights(
        self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B _"] | None = None
    ) -> Float[Tensor, "B H N N"]:
        """The weights by which ``forward`` mixes values, from the same inputs: queries by keys, rows sum to 1."""
        q, k, _ = self._split(x)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        else:
            hidden = torch.zeros_like(scores, dtype=torch.bool) if mask is None else ~_key_mask(mask, k.shape[2])
        return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)

    def _split(self, x: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B H N d]``."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, settings: BlockSettings):
        super().__init__()
        self.fc1: nn.Module = nn.Linear(settings.width, settings.mlp_width)
        self.fc2: nn.Module = nn.Linear(settings.mlp_width, settings.width)
        self._act = _ACTIVATIONS[settings.activation]

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.fc2(self._act(self.fc1(x)))


class Block(nn.Module):
    """``x += gamma_1 * attn(norm1(x)); x += gamma_2 * mlp(norm2(x))``, the factors where there is a layer scale.

    In the order "post", ``x = norm1(x + gamma_1 * attn(x)); x = norm2(x + gamma_2 * mlp(x))``.
    """

    def __init__(self, settings: BlockSettings, *, causal: bool):
        super().__init__()
        width = settings.width
        self.norm_position = settings.norm_position
        self.norm1 = settings.make_norm(width)
        self.attn = Attention(settings, causal=causal)
        self.norm2 = settings.make_norm(width)
        self.mlp = MLP(settings)
        self.gamma_1 = self.gamma_2 = None
        if settings.layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((width,), settings.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((width,), settings.layer_scale))

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B _"] | None = None) -> Float[Tensor, "B N D"]:
        if self.norm_position == "post":
            x = self.norm1(x + _apply_layer_scale(self.attn(x, mask), self.gamma_1))
            return self.norm2(x + _apply_layer_scale(self.mlp(x), self.gamma_2))
        x = x + _apply_layer_scale(self.attn(self.norm1(x), mask), self.gamma_1)
        return x + _apply_layer_scale(self.mlp(self.norm2(x)), self.gamma_2)


def _apply_layer_scale(added: Float[Tensor, "B N D"], gamma: Float[Tensor, " D"] | None) -> Float[Tensor, "B N D"]:
    return added if gamma is None else gamma * added
