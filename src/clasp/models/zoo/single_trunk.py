"""Two bases on one pre-trained trunk: what ``[share] trunk`` of a recipe asks for.

In go the bases of both modalities as they came, the settings and a policy; out come the bases that towers are made of:
the trunk's as a net of our own, the other's a view of the same blocks, sharing parameters as the policy says. Of the
other tower nothing stays but its tokenizer or transform, its pooling, and what its embeddings start from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from clasp.models.backbone import Base
from clasp.models.sharing.policy import Sharing, SharingSettings
from clasp.models.sharing.tie import LowRankLinear, share
from clasp.models.sharing.trunk_views import TRUNK_POLICY, Patches, TrunkSettings, View, Words, image_view, text_view
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.zoo.to_native import adopt
from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class OneTrunk:
    """Two bases that hold weights in common.

    ``image_new`` and ``text_new`` name the parameters of either net that no pre-trained net has (embeddings of the
    other modality, low-rank differences): whatever is tuned, they have to train. ``sharing`` prints as a table.
    """

    image: Base
    text: Base
    image_new: frozenset[str]
    text_new: frozenset[str]
    sharing: Sharing


def on_one_trunk(
    image: Base, text: Base, settings: TrunkSettings, policy: SharingSettings = TRUNK_POLICY, *, seed: int
) -> OneTrunk:
    """Let both modalities run through the trunk of one, taking both bases over.

    Everything starts as it does in the trunk, norms and layer scale that the policy keeps apart too. On the meta device
    there are shapes alone. Raises ``UserError`` for a trunk that does not fit our blocks, for a policy that does not
    fit the trunk, and for an embedding that the other tower does not have.
    """
    if settings.trunk == "image":
        image, other = adopt(image), text
        assert isinstance(image.net, ImageTransformer)
        view = text_view(image.net, _tokens(text, settings), seed=seed)
        text = _through(view, text, image)
    else:
        text, other = adopt(text), image
        assert isinstance(text.net, TextTransformer)
        view = image_view(text.net, _patches(image, settings), seed=seed)
        image = _through(view, image, text)
    assert isinstance(image.net, ImageTransformer) and isinstance(text.net, TextTransformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # low-rank differences start at random
        sharing = share(image.net, text.net, policy, keep=settings.trunk)
    new = {side.modality: _differences(side.net) for side in (image, text)}
    new[other.modality] |= view.new
    return OneTrunk(image, text, new["image"], new["text"], sharing)


def _through(view: View, other: Base, trunk: Base) -> Base:
    version = f"embeddings of {other.version}, through {trunk.name} ({trunk.version})"
    return replace(other, net=view.net, version=version, read=None)


def _tokens(text: Base, settings: TrunkSettings) -> TextTransformer | Words:
    if settings.embedding == "random":
        return Words(_vocabulary(text), settings.context)
    net = _adopted_for_its_embedding(text).net
    assert isinstance(net, TextTransformer)
    return net


def _patches(image: Base, settings: TrunkSettings) -> ImageTransformer | Patches:
    if settings.embedding == "tower":
        net = _adopted_for_its_embedding(image).net
        assert isinstance(net, ImageTransformer)
        return net
    size = image.net.size if isinstance(image.net, ImageTransformer) else image.transform and image.transform.size
    if size is None:
        raise UserError(f"share.embedding = 'random': {image.name} does not say how large its pictures are")
    if size % settings.patch:
        raise UserError(f"share.patch = {settings.patch} does not divide the {size} px of {image.name}'s pictures")
    return Patches(size, settings.patch)


def _adopted_for_its_embedding(base: Base) -> Base:
    try:
        return adopt(base)
    except UserError as error:
        raise UserError(f"{error}; or write share.embedding = 'random'") from None


def _vocabulary(text: Base) -> int:
    from transformers import PreTrainedModel

    if isinstance(text.net, TextTransformer):
        return text.net.settings.vocabulary
    if isinstance(text.net, PreTrainedModel):
        table: Any = text.net.get_input_embeddings()
        return table.num_embeddings
    raise UserError(f"share.embedding = 'random': {text.name} does not say how many tokens its tokenizer has")


def _differences(net: nn.Module) -> frozenset[str]:
    found = (path for path, module in net.named_modules() if isinstance(module, LowRankLinear))
    return frozenset(f"{path}.{leaf}" for path in found for leaf in ("down", "up"))
