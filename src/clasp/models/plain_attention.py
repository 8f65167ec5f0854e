"""Attention by matrix products and a softmax, for machines whose fused kernel is slow in bfloat16.

Input: queries, keys and values, as ``scaled_dot_product_attention`` takes them. Output: the same states, to rounding.
Also: a context in which every net of the process attends so, whatever library it is from. Note: PyTorch's own backend
of plain products (``MATH``) serves float32, bit by bit as it is; in bfloat16 the products below are faster
(``dev/LOG.md``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clasp.models.autocast import is_autocast
from clasp.models.frozen_casts import within_frozen_casts

_fused_attention = F.scaled_dot_product_attention


@contextmanager
def plain_attention_everywhere() -> Iterator[None]:
    """Context in which ``scaled_dot_product_attention`` is plain products; nested, the outer one lasts.

    The function itself is replaced: nets of any library look it up in ``torch.nn.functional`` at each call.
    """
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        F.scaled_dot_product_attention = before


def plain_products(
    q: Float[Tensor, "*batch N D"],
    k: Float[Tensor, "*batch M D"],
    v: Float[Tensor, "*batch M Dv"],
    mask: Bool[Tensor, "*mask"] | Float[Tensor, "*mask"] | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*batch N Dv"]:
    """softmax(q kᵀ · scale + mask) v (Vaswani et al., 2017, equation 1).

    ``mask`` broadcasts to ``[*batch N M]``: true where attended to, or added to the logits. A query that may attend to
    nothing attends to all keys alike, where the fused kernel returns zeros.
    """
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    if q.dtype == torch.bfloat16 and q.shape[:-2] == k.shape[:-2]:
        rows, keys = (each.reshape(-1, *each.shape[-2:]) for each in (q, k))
        logits = _scaled_logits(rows, keys, factor).view(*q.shape[:-1], k.shape[-2])
    else:
        logits = (q * factor) @ k.transpose(-2, -1)
    if causal:
        assert mask is None, "as in PyTorch: a mask, or causal"
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if (addend := _as_addend(mask, q.dtype)) is not None:
        logits = logits + addend
    weights = logits.softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v


def _scaled_logits(rows: Float[Tensor, "n N D"], keys: Float[Tensor, "n M D"], scale: float) -> Float[Tensor, "n N M"]:
    """``rows keysᵀ · scale`` in bfloat16, scaled in the product, before it is rounded."""
    return torch.baddbmm(rows.new_empty(()), rows, keys.mT, beta=0, alpha=scale)


def _as_addend(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to be added to the logits: of the size of the mask, its gradient costs nothing."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


class _Products(torch.autograd.Function):
    """``plain_products`` without dropout: each input is laid out by heads once."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, addend: Tensor | None, scale: float) -> Tensor:
        rows, keys, values = (each.reshape(-1, *each.shape[-2:]) for each in (q, k, v))
        logits = _scaled_logits(rows, keys, scale)
        if addend is not None:
            logits = logits.view(*q.shape[:-1], k.shape[-2]).add_(addend).view_as(logits)
        weights = torch.softmax(logits, -1)
        ctx.save_for_backward(rows, keys, values, weights)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape, v.shape)
        return torch.bmm(weights, values).view(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, weights = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, *gradients[0].shape[-2:])
        of_weights = torch.bmm(gradient, values.mT)
        of_logits = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        found = torch.bmm(of_logits, keys), torch.bmm(of_logits.mT, rows), torch.bmm(weights.mT, gradient)
        return *(each.view(shape) for each, shape in zip(found, ctx.shapes, strict=True)), None, None


def attend_to_all(
    q: Float[Tensor, "*batch N D"], k: Float[Tensor, "*batch M D"], v: Float[Tensor, "*batch M Dv"]
) -> Float[Tensor, "*batch N Dv"]:
    """Attention without a mask: PyTorch's kernel, or plain products in inference in bfloat16 on a CPU: of captions of
    6 to 29 tokens, 1.3 to 5 times as fast as PyTorch's kernel in float32 (``dev/LOG.md``)."""
    if not (q.device.type == "cpu" and torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return plain_products(q, k, v)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``scaled_dot_product_attention`` with its own arguments; ``options`` are ``scale`` and ``enable_gqa``."""
    lower = is_autocast(query.device) or query.dtype == torch.bfloat16
    if options.get("enable_gqa") or not lower:
        given = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **options}
        return _fused_attention(query, key, value, **given)
    query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(torch.bfloat16)
    with torch.autocast(query.device.type, enabled=False):  # it would compute the softmax in float32
        scale = options.get("scale")
        simple = not (dropout_p or is_causal) and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        if within_frozen_casts() and simple and (attn_mask is None or not attn_mask.requires_grad):
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return _Products.apply(query, key, value, _as_addend(attn_mask, query.dtype), scale)
        return plain_products(query, key, value, attn_mask, dropout=dropout_p, causal=is_causal, scale=scale)
