"""Two backbones on a single pre-trained trunk: ``[share] trunk`` of a recipe.

Input: the backbones of both modalities, the settings and a policy. Output: the backbones that the towers are built
from: the trunk's as a native encoder, the other a view of the same blocks, with parameters shared by the policy. Of the
other tower only its tokenizer or transform, its pooling and the initialisation of its embeddings are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from clasp.models.backbone import Backbone
from clasp.models.sharing.policy import SharingPlan, SharingSettings
from clasp.models.sharing.tie import LowRankLinear, share_weights
from clasp.models.sharing.trunk_settings import DEFAULT_TRUNK_POLICY, SingleTrunkSettings
from clasp.models.sharing.trunk_views import (
    RandomPatchEmbedding,
    RandomTokenEmbedding,
    TrunkView,
    build_image_view,
    build_text_view,
)
from clasp.models.structure import is_transformers_model
from clasp.models.transformer.bert import BertEncoder
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.zoo.to_native import to_native
from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class SingleTrunkBackbones:
    """Two backbones with shared weights.

    ``image_new`` and ``text_new`` name the parameters of either encoder that no pre-trained model has (embeddings of
    the other modality, low-rank updates): they are trained whatever the tuning. ``sharing`` prints as a table.
    """

    image: Backbone
    text: Backbone
    image_new: frozenset[str]
    text_new: frozenset[str]
    sharing: SharingPlan


def build_single_trunk(
    image: Backbone,
    text: Backbone,
    settings: SingleTrunkSettings,
    policy: SharingSettings = DEFAULT_TRUNK_POLICY,
    *,
    seed: int,
) -> SingleTrunkBackbones:
    """Build both encoders on the trunk of one modality; both backbones are modified in place.

    All parts of the blocks start as in the trunk, including norms and layer scales that the policy does not share. Also
    works on the meta device. Raises ``UserError`` for a trunk that cannot be converted to a native encoder, for a
    policy that does not fit the trunk, and for an embedding that the other tower does not have.
    """
    if settings.trunk == "image":
        image, other = to_native(image), text
        assert isinstance(image.net, ImageTransformer)
        view = build_text_view(image.net, _token_embedding_source(text, settings), seed=seed)
        text = _replace_net(view, text, image)
    else:
        text, other = to_native(text), image
        assert isinstance(text.net, TextTransformer)
        view = build_image_view(text.net, _patch_embedding_source(image, settings), seed=seed)
        image = _replace_net(view, image, text)
    assert isinstance(image.net, ImageTransformer) and isinstance(text.net, TextTransformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # low-rank updates are initialised at random
        sharing = share_weights(image.net, text.net, policy, keep=settings.trunk)
    new = {side.modality: _low_rank_parameters(side.net) for side in (image, text)}
    new[other.modality] |= view.new_parameters
    return SingleTrunkBackbones(image, text, new["image"], new["text"], sharing)


def _replace_net(view: TrunkView, other: Backbone, trunk: Backbone) -> Backbone:
    version = f"embeddings of {other.version}, through {trunk.name} ({trunk.version})"
    pool = other.pool
    if pool == "pooler" and other.pooler is not None:  # its layers stay behind with its net
        pool = "mean" if other.pooler.reads in ("states", "prefix") else other.pooler.reads
    return replace(
        other, net=view.net, version=version, forward_features=None, pool=pool, pooler=None, weight_hashes=None
    )


def _token_embedding_source(text: Backbone, settings: SingleTrunkSettings) -> TextTransformer | RandomTokenEmbedding:
    if settings.embedding == "random":
        return RandomTokenEmbedding(_vocabulary_size(text), settings.context)
    net = _to_native_for_embedding(text).net
    assert isinstance(net, TextTransformer)
    return net


def _patch_embedding_source(image: Backbone, settings: SingleTrunkSettings) -> ImageTransformer | RandomPatchEmbedding:
    if settings.embedding == "tower":
        net = _to_native_for_embedding(image).net
        assert isinstance(net, ImageTransformer)
        return net
    size = image.net.size if isinstance(image.net, ImageTransformer) else image.transform and image.transform.size
    if size is None:
        raise UserError(f"share.embedding = 'random': {image.name} has no known image size")
    if size % settings.patch:
        raise UserError(f"share.patch = {settings.patch} does not divide the {size} px of {image.name}'s images")
    return RandomPatchEmbedding(size, settings.patch)


def _to_native_for_embedding(base: Backbone) -> Backbone:
    try:
        return to_native(base)
    except UserError as error:
        raise UserError(f"{error}; or write share.embedding = 'random'") from None


def _vocabulary_size(text: Backbone) -> int:
    if isinstance(text.net, TextTransformer):
        return text.net.settings.vocabulary
    if isinstance(text.net, BertEncoder):
        return text.net.settings.vocab_size
    if is_transformers_model(text.net):
        table: Any = text.net.get_input_embeddings()
        return table.num_embeddings
    raise UserError(f"share.embedding = 'random': {text.name} has no known vocabulary size")


def _low_rank_parameters(net: nn.Module) -> frozenset[str]:
    found = (path for path, module in net.named_modules() if isinstance(module, LowRankLinear))
    return frozenset(f"{path}.{leaf}" for path in found for leaf in ("down", "up"))
