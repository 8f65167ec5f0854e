"""Pooling of hidden states: parameter-free functions (``POOLING_FUNCTIONS``), a learned one, and what a tower can have.

Input: hidden states ``[B N D]``, the attention mask ``[B N]``, and the number of prefix tokens (class and registers).
Output: one vector a row, ``[B D]``, or ``[B 2D]`` where two poolings are concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clasp.errors import counted
from clasp.models.backbone import Backbone, Pooler
from clasp.models.structure import ModelStructure
from clasp.models.tower_settings import PoolingMode
from clasp.types import UserError


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
    return states[torch.arange(states.shape[0], device=states.device), last]


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


def pool_as_authors(
    net: nn.Module,
    pooler: Pooler,
    states: Float[Tensor, "B N D"],
    mask: Bool[Tensor, "B N"],
    prefix: int,
) -> Float[Tensor, "B Dp"]:
    """The pooling of a pre-trained net that has layers for it."""
    if pooler.reads == "states":
        read = states
    elif pooler.reads == "prefix":
        read = states[:, :prefix].mean(dim=1)
    else:
        read = POOLING_FUNCTIONS[pooler.reads](states, mask, prefix)
    return net.get_submodule(pooler.module)(read) if pooler.module else read


# --- which pooling a tower can have ----------------------------------------------------------------------------------


def check_pool(pool: str, backbone: Backbone, structure: ModelStructure) -> None:
    """Raise ``UserError`` for a pooling that the backbone cannot have."""
    if pool not in get_args(PoolingMode):
        raise UserError(f"pool = {pool!r} of {backbone.name} is not one of {', '.join(get_args(PoolingMode))}")
    if pool == "pooler" and backbone.pooler is None:
        raise UserError(f"pool = 'pooler': {backbone.name} brings no layers to pool with; choose another pool")
    if pool in ("cls", "cls+mean") and backbone.modality == "image" and not structure.class_token:
        raise UserError(f"pool = {pool!r}: {backbone.name} has no class token; choose mean or attention")


def pool_of_layers(pool: str, modality: str, structure: ModelStructure) -> str | None:
    """The pooling for several layers of a tower; ``None`` where only the last states can be pooled."""
    if pool in ("attention", "pooler"):
        return None
    if modality == "text":
        return pool
    return "cls+mean" if structure.prefix_tokens else "mean+max" if structure.channels_first else "mean"


def resolve_extra_layers(layers: Sequence[int] | Literal["all"], pool: str, count: int, name: str) -> list[int]:
    """``extra_layers`` of a tower of ``count`` blocks, counted from 1, lowest first; "all": below the last.

    Raises ``UserError`` for numbers that are none of its blocks, and for a ``pool`` of the last states only.
    """
    layers = range(1, count) if layers == "all" else layers
    numbers = sorted({layer if layer > 0 else count + layer for layer in layers})
    if numbers and not 1 <= numbers[0] <= numbers[-1] < count:
        raise UserError(
            f"extra_layers = {list(layers)}: {name} has {counted(count, 'block')}, the last is always there; choose "
            f'from 1 to {count - 1}, or {1 - count} to -1, or "all"'
        )
    if numbers and pool in ("attention", "pooler"):
        raise UserError(
            f"extra_layers = {list(layers)}: pool = {pool!r} of {name} is for the last states only; choose another pool"
        )
    return numbers
