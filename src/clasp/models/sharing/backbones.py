"""Applies the ``[share]`` policy of a recipe to two backbones.

Input: two backbones and the policy. Output: the policy resolved layer by layer; the encoders then hold the same
parameter objects. Note: a pre-trained encoder gives its weights to one initialised from a seed; two pre-trained ones
may share only parameters that are already equal, as after shared training, since weights would be lost otherwise.
"""

from __future__ import annotations

import torch

from clasp.models.backbone import Backbone
from clasp.models.sharing.policy import SharingPlan, SharingSettings
from clasp.models.sharing.tie import share_weights
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.types import UserError


def share_backbones(image: Backbone, text: Backbone, policy: SharingSettings, *, seed: int) -> SharingPlan | None:
    """Share weights of two backbones according to ``policy``; low-rank updates are initialised from ``seed``.

    Returns ``None`` where a backbone is not a native encoder and the policy shares nothing in them (a shared head does
    not count). Raises ``UserError`` where the policy needs native encoders, for parts that do not fit, and for weights
    that would be lost.
    """
    if not (isinstance(image.net, ImageTransformer) and isinstance(text.net, TextTransformer)):
        if policy.model_copy(update={"head": "separate"}) == SharingSettings():
            return None
        odd = text.name if isinstance(image.net, ImageTransformer) else image.name
        raise UserError(
            f"[share]: {odd} is not a native encoder, and only those share weights: write image.tower = 'own:image' "
            "and text.tower = 'own:text', or set share.trunk; share.head is for any two"
        )
    before = dict(text.net.named_parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sharing = share_weights(
            image.net, text.net, policy, keep="text" if image.from_seed and not text.from_seed else "image"
        )
    if not (image.from_seed or text.from_seed):
        after = dict(text.net.named_parameters())
        for name, weight in before.items():
            if name not in after or not (weight is after[name] or weight.is_meta or torch.equal(weight, after[name])):
                raise UserError(
                    f"[share]: {image.name} and {text.name} are both pre-trained, and {name} differs between them; two "
                    "pre-trained towers share only equal parameters, or nothing"
                )
    return sharing
