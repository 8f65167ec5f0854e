"""The transformer block of the native encoders: attention, feed-forward, a norm with each, optional layer scale.

Input: states ``[B N D]`` and, for bidirectional attention, a mask that is true on real tokens. Output: states. The
settings choose the norm and its position, the activation, and QK normalisation. Parameter names follow timm and DeiT,
as the papers' checkpoints do. Note: attention never returns its map; ``Attention.attention_weights`` computes it from
the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clasp.models.autocast import is_autocast
from clasp.models.transformer.settings import BlockSettings


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, the approximation that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def cast_for_products(states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """States in the dtype of autocast, once for all layers that multiply them; unchanged outside of autocast."""
    return states.to(torch.get_autocast_dtype(states.device.type)) if is_autocast(states.device) else states


def gelu_of(states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """The exact GELU of the fresh output of a layer: in inference mode in place, since new memory costs as much."""
    return torch.ops.aten.gelu_(states) if torch.is_inference_mode_enabled() else F.gelu(states)


def add_to(branch: Float[Tensor, "*batch D"], states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """The residual sum with the fresh output of a branch: in inference mode in place, of a copy where the dtype of the
    states is higher."""
    if torch.is_inference_mode_enabled():
        return branch.to(torch.promote_types(branch.dtype, states.dtype)).add_(states)
    return branch + states


def add_rounded_to(branch: Float[Tensor, "*batch D"], states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """The residual sum with an output that may be held elsewhere: in inference mode in place of a copy in the dtype of
    the states, where it is higher."""
    exact = torch.promote_types(branch.dtype, states.dtype)
    return branch + states if branch.dtype == exact else add_to(branch, states)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that keeps its float32 input in the dtype of autocast for the backward pass, in half the memory;
    the gradients then differ from PyTorch's within the rounding of that dtype."""

    def forward(self, input: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        kept = torch.is_grad_enabled() and input.requires_grad and input.dtype == torch.float32
        if not (kept and is_autocast(input.device)):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(input.device.type)
        return _NormOfRounded.apply(input, self.weight, self.bias, self.eps, dtype)  # pyright: ignore[reportReturnType]


class _NormOfRounded(torch.autograd.Function):
    """Layer norm over the last axis; its gradients are taken at the input rounded to ``dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, mean, inverse_deviation = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x.to(dtype), mean, inverse_deviation, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rounded, mean, inverse_deviation, weight, bias = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_layer_norm_backward(
            *gradients, rounded.float(), weight.shape, mean, inverse_deviation, weight, bias, wanted
        )
        return (*(each if needed else None for each, needed in zip(found, wanted, strict=True)), None, None)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in the dtype of its weights: under autocast PyTorch's has weights and input in different dtypes,
    and warns."""

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick-gelu": quick_gelu}
# both compute their statistics in float32, whatever the dtype of the states
_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "layer": lambda width, eps: nn.LayerNorm(width, eps=eps),
    "rms": lambda width, eps: RMSNorm(width, eps=eps),
}


def make_norm(settings: BlockSettings, width: int) -> nn.Module:
    """A norm of the kind of the settings over a last axis of length ``width``."""
    return _NORMS[settings.norm](width, settings.eps)


def attend(
    q: Float[Tensor, "B H N d"],
    k: Float[Tensor, "B H M d"],
    v: Float[Tensor, "B H M d"],
    mask: Bool[Tensor, "B _"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "B H N d"]:
    """Scaled dot-product attention: the only call of the attention kernel. ``mask`` is true on keys to attend to."""
    if causal:
        # padding is on the right, so no real token attends to it and no mask is needed
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    key_mask = None if mask is None else _key_mask(mask, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)


def _key_mask(mask: Bool[Tensor, "B _"], keys: int) -> Bool[Tensor, "B 1 1 M"]:
    """The mask broadcast over heads and queries. Tokens prepended to the masked ones (prompts) count as real."""
    return F.pad(mask, (keys - mask.shape[1], 0), value=True)[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention with one packed QKV projection, rows ordered query, key, value."""

    def __init__(self, settings: BlockSettings, *, causal: bool):
        super().__init__()
        self.heads, self.causal = settings.heads, causal
        self.qkv: nn.Module = nn.Linear(settings.width, 3 * settings.width)
        self.q_norm = make_norm(settings, settings.width // settings.heads) if settings.qk_norm else None
        self.k_norm = make_norm(settings, settings.width // settings.heads) if settings.qk_norm else None
        self.proj: nn.Module = nn.Linear(settings.width, settings.width)

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B _"] | None = None) -> Float[Tensor, "B N D"]:
        B, N, D = x.shape
        q, k, v = self._split(x)
        return self.proj(attend(q, k, v, mask, causal=self.causal).transpose(1, 2).reshape(B, N, D))

    def attention_weights(
        self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B _"] | None = None
    ) -> Float[Tensor, "B H N N"]:
        """The attention weights of ``forward`` for the same inputs: queries by keys, rows sum to 1."""
        q, k, _ = self._split(x)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            masked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        else:
            masked = torch.zeros_like(scores, dtype=torch.bool) if mask is None else ~_key_mask(mask, k.shape[2])
        return scores.masked_fill(masked, -torch.inf).softmax(dim=-1)

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
    """Pre-norm: ``x += gamma_1 * attn(norm1(x)); x += gamma_2 * mlp(norm2(x))``, the factors only with layer scale.

    Post-norm: ``x = norm1(x + gamma_1 * attn(x)); x = norm2(x + gamma_2 * mlp(x))``.
    """

    def __init__(self, settings: BlockSettings, *, causal: bool):
        super().__init__()
        width = settings.width
        self.norm_position = settings.norm_position
        self.norm1 = make_norm(settings, width)
        self.attn = Attention(settings, causal=causal)
        self.norm2 = make_norm(settings, width)
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
