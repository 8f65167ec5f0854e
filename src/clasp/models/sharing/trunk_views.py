"""The second modality of a single pre-trained trunk: an encoder with embeddings of its modality and the trunk's blocks.

Input: the trunk (a native encoder of one modality) and the source of the other modality's embeddings. Output: a
``TrunkView``, an encoder whose blocks and norms start as copies of the trunk's; ``models.sharing.tie`` then ties what
the policy shares. Note: a pre-trained token table stays frozen and a linear map projects it to the trunk's width; a
patch embedding is linear, so the map is folded into it. States enter the blocks with the magnitude of the trunk's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.transformer.convolutions import PatchEmbed
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer, init_weights
from clasp.models.transformer.settings import BlockSettings, ImageTransformerSettings, TextTransformerSettings
from clasp.types import UserError

_SAMPLED_ROWS = 4096  # rows of the token table from which its RMS is estimated


@dataclass(frozen=True, slots=True)
class RandomTokenEmbedding:
    """A randomly initialised token embedding."""

    vocabulary: int
    context: int


@dataclass(frozen=True, slots=True)
class RandomPatchEmbedding:
    """A randomly initialised patch embedding; both sides in pixels."""

    size: int
    patch: int


@dataclass(frozen=True, slots=True)
class TrunkView:
    """The encoder of the second modality, and the names of its new parameters, which no pre-trained model has and which
    therefore must be trained."""

    net: ImageTransformer | TextTransformer
    new_parameters: frozenset[str]


def build_text_view(trunk: ImageTransformer, tokens: TextTransformer | RandomTokenEmbedding, *, seed: int) -> TrunkView:
    """A text encoder on the blocks of an image encoder, with bidirectional attention as in those blocks.

    With a pre-trained text encoder as ``tokens``: its token table, which the view holds and which is to stay frozen;
    its positions; and a map that starts as the identity for equal widths, else as an orthonormal matrix drawn from
    ``seed``. Positions and map are scaled so that tokens have the RMS of the trunk's patches. Raises ``UserError`` for
    a trunk with a stem.
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
    new = [net.pos_embed, net.token_embed.weight]
    if pretrained is not None:
        net.token_embed = pretrained.token_embed
        projection = _width_map(pretrained.settings.width, settings.width, pretrained.pos_embed, seed)
        net.pos_embed = nn.Parameter(pretrained.pos_embed.detach() @ projection.T)
        if isinstance(pretrained.token_map, nn.Linear):
            projection = projection @ pretrained.token_map.weight.detach()
        assert isinstance(net.token_map, nn.Linear)
        net.token_map.weight = nn.Parameter(projection)
        new = [net.pos_embed, net.token_map.weight]
    return _rescaled_view(trunk, net, new)


def build_image_view(
    trunk: TextTransformer, patches: ImageTransformer | RandomPatchEmbedding, *, seed: int
) -> TrunkView:
    """An image encoder on the blocks of a text encoder, with bidirectional attention and a class token.

    With a pre-trained image encoder as ``patches``: its patch embedding, class token and positions, projected to the
    trunk's width by a map as in ``build_text_view``, which is folded into them; all of them are to be trained. Raises
    ``UserError`` for a pre-trained encoder with a stem.
    """
    pretrained = patches if isinstance(patches, ImageTransformer) else None
    if pretrained is not None and pretrained.settings.stem is not None:
        raise UserError("share.trunk = 'text': the image net begins with a stem; write share.embedding = 'random'")
    source = patches.settings if isinstance(patches, ImageTransformer) else patches
    settings = ImageTransformerSettings(
        **_trunk_settings(trunk),
        size=source.size,
        patch=source.patch,
        patch_bias=True if pretrained is None else pretrained.settings.patch_bias,
        class_position=True if pretrained is None else pretrained.settings.class_position,
    )
    net = _initialized_view(trunk, settings, seed)
    assert isinstance(net, ImageTransformer)
    kernel, bias = _patch_weights(net)
    if pretrained is not None:
        projection = _width_map(pretrained.settings.width, settings.width, pretrained.pos_embed, seed)
        source_kernel, source_bias = _patch_weights(pretrained)
        with torch.no_grad():
            kernel.copy_(torch.einsum("de,echw->dchw", projection, source_kernel))
            net.cls_token.copy_(pretrained.cls_token @ projection.T)
            net.pos_embed.copy_(pretrained.pos_embed @ projection.T)
            if bias is not None and source_bias is not None:
                bias.copy_(projection @ source_bias)
    return _rescaled_view(trunk, net, [net.cls_token, net.pos_embed, kernel, *([] if bias is None else [bias])])


# --- how -------------------------------------------------------------------------------------------------------------


def _trunk_settings(trunk: ImageTransformer | TextTransformer) -> dict[str, Any]:
    """The settings that the view takes from the trunk."""
    blocks = trunk.settings.model_dump(include=set(BlockSettings.model_fields))
    return {**blocks, "layers": len(trunk.blocks), "entry_norm": trunk.settings.entry_norm}


def _initialized_view(
    trunk: ImageTransformer | TextTransformer, settings: ImageTransformerSettings | TextTransformerSettings, seed: int
) -> ImageTransformer | TextTransformer:
    """The view with embeddings initialised from ``seed`` and copies of the trunk's blocks and norms, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.device(trunk.pos_embed.device):
        net = (
            ImageTransformer(settings) if isinstance(settings, ImageTransformerSettings) else TextTransformer(settings)
        )
    init_weights(net, seed=seed)
    for part in ("norm_pre", "blocks", "norm"):
        net.get_submodule(part).load_state_dict(trunk.get_submodule(part).state_dict())
    return net.to(trunk.pos_embed.dtype).eval()


def _width_map(narrow: int, wide: int, like: Tensor, seed: int) -> Float[Tensor, "wide narrow"]:
    """An orthonormal map between widths: norm-preserving upwards, shrinking norms on average downwards."""
    if narrow == wide:
        return torch.eye(wide, dtype=like.dtype, device=like.device)
    projection = torch.empty(wide, narrow, dtype=like.dtype, device=like.device)
    if not projection.is_meta:
        nn.init.orthogonal_(projection, generator=torch.Generator(like.device).manual_seed(seed))
    return projection


def _rescaled_view(
    trunk: ImageTransformer | TextTransformer, net: ImageTransformer | TextTransformer, new_parameters: Sequence[Tensor]
) -> TrunkView:
    """Scale the ``new_parameters`` of the view so that its embeddings have the RMS of the trunk's."""
    if not trunk.pos_embed.is_meta:
        factor = _embedding_rms(trunk) / _embedding_rms(net)
        with torch.no_grad():
            for parameter in new_parameters:
                parameter.mul_(factor)
    new = {id(parameter) for parameter in new_parameters}
    return TrunkView(net, frozenset(name for name, parameter in net.named_parameters() if id(parameter) in new))


@torch.no_grad()
def _embedding_rms(net: ImageTransformer | TextTransformer) -> float:
    """Root mean square of the embedding output before any norm, positions included.

    For images it is computed for white-noise pixels: on DINOv2 ViT-S/14, 0.18 where photographs give 0.15 (measured).
    """
    if isinstance(net, TextTransformer):
        rows = net.token_embed.weight[:: max(1, net.token_embed.num_embeddings // _SAMPLED_ROWS)]
        squares = net.token_map(rows).square().mean()
    else:
        kernel, bias = _patch_weights(net)
        squares = kernel.square().sum(dim=(1, 2, 3)).mean() + (0.0 if bias is None else bias.square().mean())
    return math.sqrt(float(squares + net.pos_embed.square().mean()))


def _patch_weights(net: ImageTransformer) -> tuple[Tensor, Tensor | None]:
    assert isinstance(net.patch_embed, PatchEmbed), "encoders with a stem were refused before"
    return net.patch_embed.proj.weight, net.patch_embed.proj.bias
