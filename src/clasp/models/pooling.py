"""Pooling of hidden states: parameter-free functions (``POOLING_FUNCTIONS``) and a learned attention pooling.

Input: hidden states ``[B N D]``, the attention mask ``[B N]``, and the number of prefix tokens (class and registers).
Output: one vector a row, ``[B D]``, or ``[B 2D]`` where two poolings are concatenated.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def pool_cls(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D"]:
    """The class token."""
    return states[:, 0].contiguous()  # a view would hold all tokens in memory


def pool_mean(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D"]:
    """The mean of real tokens; in an image tower, of the patches (without class and register tokens)."""
    weight = mask[:, prefix:, None].to(states.dtype)
    return (states[:, prefix:] * weight).sum(1) / weight.sum(1).clamp(min=1)


def pool_last(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D"]:
    """The last real token."""
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def pool_cls_mean(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D2"]:
    """Class token and mean of the patches, concatenated (DINOv2's linear evaluation)."""
    return torch.cat((pool_cls(states, mask, prefix), pool_mean(states, mask, prefix)), dim=1)


def pool_mean_max(states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"], prefix: int) -> Float[Tensor, "B D2"]:
    """Mean and maximum over the real tokens (or patches), concatenated."""
    hidden = states[:, prefix:].masked_fill(~mask[:, prefix:, None], -torch.inf)
    return torch.cat((pool_mean(states, mask, prefix), hidden.amax(1)), dim=1)


POOLING_FUNCTIONS = {
    "cls": pool_cls,
    "mean": pool_mean,
    "last": pool_last,
    "eos": pool_last,  # valid only where the tokenizer ends every text with its end token
    "cls+mean": pool_cls_mean,
    "mean+max": pool_mean_max,
}


def norm_pooled(norm: nn.Module, vectors: Float[Tensor, "B Dp"], width: int) -> Float[Tensor, "B Dp"]:
    """Apply a norm of ``width`` features to each of the concatenated pooled vectors."""
    return norm(vectors.unflatten(1, (-1, width))).flatten(1)


class AttentionPool(nn.Module):
    """One learned query attends to all real tokens (Lee et al., Set Transformer, ICML 2019); initially their mean."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.key = nn.Linear(width, width, bias=False)  # a bias would cancel in the softmax

    def forward(self, states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        scores = self.key(states) @ self.query / states.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=1)
        return torch.einsum("bn,bnd->bd", weights, states)
