"""What ``[share]`` of a recipe means for two bases: which of them gives, and what cannot be shared.

In go two bases and the policy, out comes the policy layer by layer; the nets hold the same parameters afterwards.
A trained net gives its weights to one that nobody has trained. Two trained ones share only what is equal in both, as in
a pair that was trained so: weights would be lost otherwise.
"""

from __future__ import annotations

import torch

from clasp.models.backbone import Backbone
from clasp.models.sharing.policy import SharingPlan, SharingSettings
from clasp.models.sharing.tie import share_weights
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.types import UserError


def share_backbones(image: Backbone, text: Backbone, policy: SharingSettings, *, seed: int) -> SharingPlan | None:
    """Make two bases hold in common what ``policy`` says; low-rank differences start from ``seed``.

    ``None`` where nets are not ours and nothing in them is to be shared; a shared head is no part of a net.
    Raises ``UserError`` for such nets otherwise, for parts that do not fit, and for weights that would be lost.
    """
    if not (isinstance(image.net, ImageTransformer) and isinstance(text.net, TextTransformer)):
        if policy.model_copy(update={"head": "separate"}) == SharingSettings():
            return None
        odd = text.name if isinstance(image.net, ImageTransformer) else image.name
        raise UserError(
            f"[share]: {odd} is no net of ours, and only they hold parts in common: write image.tower = 'own:image' "
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
                    f"[share]: {image.name} and {text.name} are both trained, and {name} is not the same in both; they "
                    "share only what is equal, or nothing"
                )
    return sharing
