"""A second modality through a pre-trained trunk: a net of its own embeddings and norms around the trunk's blocks.

In go the trunk, a net of one modality, and what the embeddings of the other start from; out comes a net of that other
modality, a ``TrunkView``, whose blocks and norms start as copies of the trunk's: ``nn.shared`` then makes one of what a
policy shares. Unusual: a pre-trained table of tokens stays as it is, and a linear map brings it into the trunk; a patch
embedding is linear itself, so it takes the map in. Either way states enter the trunk at the size that its blocks know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from clasp.models.sharing.policy import SharingSettings
from clasp.models.transformer.blocks import BlockSettings
from clasp.models.transformer.convolutions import PatchEmbed
from clasp.models.transformer.encoders import (
    ImageTransformer,
    ImageTransformerSettings,
    TextTransformer,
    TextTransformerSettings,
    init_weights,
)
from clasp.types import UserError

# what both views hold where a recipe says nothing else: all of a block but its norms and scales
DEFAULT_TRUNK_PARTS: dict[str, Any] = {"attention": "shared", "ffn": "shared"}
DEFAULT_TRUNK_POLICY = SharingSettings(**DEFAULT_TRUNK_PARTS)
_SAMPLED_ROWS = 4096  # rows of a table that say how large its rows are


class SingleTrunkSettings(BaseModel):
    """One pre-trained trunk that both modalities run through: the part of ``[share]`` beside the policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trunk: Literal["image", "text"]
    """Whose pre-trained blocks both modalities run through"""
    embedding: Literal["tower", "random"] = "tower"
    """What the patches or tokens of the other modality start from: its own pre-trained tower, or nothing"""
    patch: int = Field(default=16, ge=1)
    """Pixels a side of a patch, where images start from nothing"""
    context: int = Field(default=77, ge=1)
    """Tokens of the longest caption, where text starts from nothing"""


@dataclass(frozen=True, slots=True)
class RandomTokenEmbedding:
    """Tokens that start from nothing."""

    vocabulary: int
    context: int


@dataclass(frozen=True, slots=True)
class RandomPatchEmbedding:
    """Patches that start from nothing; both in pixels a side."""

    size: int
    patch: int


@dataclass(frozen=True, slots=True)
class TrunkView:
    """A net beside the trunk, and the names of its parameters that no pre-trained net has: they have to train."""

    net: ImageTransformer | TextTransformer
    new_parameters: frozenset[str]


def build_text_view(trunk: ImageTransformer, tokens: TextTransformer | RandomTokenEmbedding, *, seed: int) -> TrunkView:
    """Text through the blocks of an image net, read in both directions as those blocks are.

    ``tokens`` of a pre-trained net: its table, which the view then holds and which is to stay frozen; its positions;
    and a map that starts as the identity where widths are equal and else as orthonormal directions drawn from ``seed``,
    both scaled so that tokens enter as large as patches do. Raises ``UserError`` for a trunk that begins with a stem.
    """
    if trunk.settings.stem is not None:
        raise UserError("share.trunk = 'image': the image net begins with a stem, which no text can pass")
    pretrained = tokens if isinstance(tokens, TextTransformer) else None
    settings = TextTransformerSettings(
        **_trunk_settings(trunk),
        vocabulary=tokens.settings.vocabulary if isinstance(tokens, TextTransformer) else tokens.vocabulary,
        context=tokens.settings.context if isinstance(tokens, TextTransformer) else tokens.context,
        token_width=None if pretrained is None else pretrained.token_embed.embedding_dim,
        attention="bidirectional",
    )
    net = _initialized_view(trunk, settings, seed)
    assert isinstance(net, TextTransformer)
    own = [net.pos_embed, net.token_embed.weight]
    if pretrained is not None:
        net.token_embed = pretrained.token_embed
        into = _width_map(pretrained.settings.width, settings.width, pretrained.pos_embed, seed)
        net.pos_embed = nn.Parameter(pretrained.pos_embed.detach() @ into.T)
        if isinstance(pretrained.token_map, nn.Linear):
            into = into @ pretrained.token_map.weight.detach()
        assert isinstance(net.token_map, nn.Linear)
        net.token_map.weight = nn.Parameter(into)
        own = [net.pos_embed, net.token_map.weight]
    return _rescaled_view(trunk, net, own)


def build_image_view(
    trunk: TextTransformer, patches: ImageTransformer | RandomPatchEmbedding, *, seed: int
) -> TrunkView:
    """Images through the blocks of a text net, each patch seeing all, with a class token of their own.

    ``patches`` of a pre-trained net: its patch embedding, class token and positions, brought to the trunk's width by a
    map as in ``build_text_view``, which becomes part of them; all of them are to train. Raises ``UserError`` for a
    pre-trained net that begins with a stem.
    """
    pretrained = patches if isinstance(patches, ImageTransformer) else None
    if pretrained is not None and pretrained.settings.stem is not None:
        raise UserError("share.trunk = 'text': the image net begins with a stem; write share.embedding = 'random'")
    given = patches.settings if isinstance(patches, ImageTransformer) else patches
    settings = ImageTransformerSettings(
        **_trunk_settings(trunk),
        size=given.size,
        patch=given.patch,
        patch_bias=True if pretrained is None else pretrained.settings.patch_bias,
        class_position=True if pretrained is None else pretrained.settings.class_position,
    )
    net = _initialized_view(trunk, settings, seed)
    assert isinstance(net, ImageTransformer)
    kernel, bias = _patch_weights(net)
    if pretrained is not None:
        into = _width_map(pretrained.settings.width, settings.width, pretrained.pos_embed, seed)
        theirs, their_bias = _patch_weights(pretrained)
        with torch.no_grad():
            kernel.copy_(torch.einsum("de,echw->dchw", into, theirs))
            net.cls_token.copy_(pretrained.cls_token @ into.T)
            net.pos_embed.copy_(pretrained.pos_embed @ into.T)
            if bias is not None and their_bias is not None:
                bias.copy_(into @ their_bias)
    return _rescaled_view(trunk, net, [net.cls_token, net.pos_embed, kernel, *([] if bias is None else [bias])])


# --- how -------------------------------------------------------------------------------------------------------------


def _trunk_settings(trunk: ImageTransformer | TextTransformer) -> dict[str, Any]:
    """Settings of the view that are the trunk's."""
    blocks = trunk.settings.model_dump(include=set(BlockSettings.model_fields))
    return {**blocks, "layers": len(trunk.blocks), "entry_norm": trunk.settings.entry_norm}


def _initialized_view(
    trunk: ImageTransformer | TextTransformer, settings: ImageTransformerSettings | TextTransformerSettings, seed: int
) -> ImageTransformer | TextTransformer:
    """The view with embeddings from ``seed`` and the trunk's blocks and norms, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.device(trunk.pos_embed.device):
        net = (
            ImageTransformer(settings) if isinstance(settings, ImageTransformerSettings) else TextTransformer(settings)
        )
    init_weights(net, seed=seed)
    for part in ("norm_pre", "blocks", "norm"):
        net.get_submodule(part).load_state_dict(trunk.get_submodule(part).state_dict())
    return net.to(trunk.pos_embed.dtype).eval()


def _width_map(narrow: int, wide: int, like: Tensor, seed: int) -> Float[Tensor, "wide narrow"]:
    """A map between widths that keeps lengths (shortens them on average where it leads to fewer dimensions)."""
    if narrow == wide:
        return torch.eye(wide, dtype=like.dtype, device=like.device)
    into = torch.empty(wide, narrow, dtype=like.dtype, device=like.device)
    if not into.is_meta:
        nn.init.orthogonal_(into, generator=torch.Generator(like.device).manual_seed(seed))
    return into


def _rescaled_view(
    trunk: ImageTransformer | TextTransformer, net: ImageTransformer | TextTransformer, new_parameters: Sequence[Tensor]
) -> TrunkView:
    """Scale the view's ``new_parameters`` embeddings so that its states enter the blocks as large as the trunk's."""
    if not trunk.pos_embed.is_meta:
        factor = _embedding_rms(trunk) / _embedding_rms(net)
        with torch.no_grad():
            for parameter in new_parameters:
                parameter.mul_(factor)
    held = {id(parameter) for parameter in new_parameters}
    return TrunkView(net, frozenset(name for name, parameter in net.named_parameters() if id(parameter) in held))


@torch.no_grad()
def _embedding_rms(net: ImageTransformer | TextTransformer) -> float:
    """Root mean square of what an embedding gives before any norm, positions included.

    Of pixels it is that of white noise: measured on DINOv2 ViT-S/14, 0.18 where photographs give 0.15.
    """
    if isinstance(net, TextTransformer):
        rows = net.token_embed.weight[:: max(1, net.token_embed.num_embeddings // _SAMPLED_ROWS)]
        squares = net.token_map(rows).square().mean()
    else:
        kernel, bias = _patch_weights(net)
        squares = kernel.square().sum(dim=(1, 2, 3)).mean() + (0.0 if bias is None else bias.square().mean())
    return math.sqrt(float(squares + net.pos_embed.square().mean()))


def _patch_weights(net: ImageTransformer) -> tuple[Tensor, Tensor | None]:
    assert isinstance(net.patch_embed, PatchEmbed), "stems were refused"
    return net.patch_embed.proj.weight, net.patch_embed.proj.bias
