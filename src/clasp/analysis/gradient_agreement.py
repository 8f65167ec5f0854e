"""Do images and text want the same of the weights that they share? Cosines of two gradients, layer by layer.

In go a dual encoder, a batch and a loss; out comes a row for each layer and part that both towers hold. A loss of image
and text embeddings sends its gradient into a shared weight on two ways: through the image view (the gradient of the
loss with text embeddings held fixed) and through the text view (with image embeddings held fixed). Their sum is the
gradient of training. A cosine of 1: both ways ask for one change; 0: for unrelated ones; -1: each undoes the other's
(the measure of Yu et al., NeurIPS 2020, who project conflicts away; we only look).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clasp.models.dual_encoder import DualEncoder
from clasp.models.transformer.encoders import ImageTransformer
from clasp.types import Batch, Loss, Pixels, Tokens, UserError

WHOLE_LAYER = "all"
# by how the path in a block begins; the first that fits
_PART_BY_PREFIX = {
    "attn.q_norm.": "qk_norm",
    "attn.k_norm.": "qk_norm",
    "attn.": "attention",
    "mlp.": "ffn",
    "norm1.": "norm1",
    "norm2.": "norm2",
    "gamma_": "layer_scale",
}


@dataclass(frozen=True, slots=True)
class GradientAgreement:
    """Of the weights of one part of one layer, or of all that is shared in it (``WHOLE_LAYER``)."""

    layer: int
    """counted from 0 as the sharing policy counts, a stem being layer 0"""
    part: str
    cosine: float
    """of the two gradients; NaN where one of them is zero"""
    image_norm: float
    """norm of the gradient through the image view"""
    text_norm: float
    """norm of that through the text view"""


def gradient_agreement(model: DualEncoder, batch: Batch, loss: Loss) -> list[GradientAgreement]:
    """A row for each layer with shared weights, all of them together and then part by part, lowest layer first.

    Frozen weights count too: what they would be asked for tells whether it is good to share them. Nothing is left on
    the model, gradients of training included, and its mode is not changed: dropout draws as it does. A shared final
    norm or head is in no layer, and is left out. Raises ``UserError`` where the towers have no layer in common, and for
    a batch of cached features.
    """
    if not (isinstance(batch.image, Pixels) and isinstance(batch.text, Tokens)):
        raise UserError("gradients go through both towers from pixels and tokens on; set data.feature_cache = 'off'")
    groups = _shared_parameters(model)
    weights = [weight for group in groups.values() for weight in group]
    if not weights:
        raise UserError(f"{model.name} holds no layer in common, so no two gradients meet; see [share] of a recipe")
    with torch.enable_grad(), _requiring_gradients(weights), _restored_buffers(model):
        sides = model.embed_image(batch.image), model.embed_text(batch.text)
        image, text = (side.detach().requires_grad_() for side in sides)
        scale, bias = (None if each is None else each.detach() for each in model.scale_and_bias())
        assert scale is not None
        total = loss(image, text, scale, bias, groups=batch.groups).total
        through_image, through_text = (
            _gradients_through(side, slope, weights)
            for side, slope in zip(sides, torch.autograd.grad(total, (image, text)), strict=True)
        )
    place = {id(weight): number for number, weight in enumerate(weights)}
    rows = []
    for layer in sorted({layer for layer, _ in groups}):
        parts = {part: held for (at, part), held in groups.items() if at == layer}
        parts = {WHOLE_LAYER: [weight for held in parts.values() for weight in held], **parts}
        for part, held in parts.items():
            numbers = [place[id(weight)] for weight in held]
            one, other = (
                _flatten_tensors([side[number] for number in numbers]) for side in (through_image, through_text)
            )
            rows.append(GradientAgreement(layer, part, _cosine(one, other), float(one.norm()), float(other.norm())))
    return rows


# --- how -------------------------------------------------------------------------------------------------------------


def _shared_parameters(model: DualEncoder) -> dict[tuple[int, str], list[nn.Parameter]]:
    """Parameters that both towers' blocks hold, by layer and part."""
    net, text = model.image.net, {id(parameter) for parameter in model.text.net.parameters()}
    if not isinstance(net, ImageTransformer):
        return {}
    found: dict[tuple[int, str], list[nn.Parameter]] = {}
    for layer, block in enumerate(net.blocks, net.settings.first_layer):
        for name, parameter in block.named_parameters():
            if id(parameter) in text:
                part = next(part for begin, part in _PART_BY_PREFIX.items() if name.startswith(begin))
                found.setdefault((layer, part), []).append(parameter)
    return found


@contextmanager
def _requiring_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """All of them want gradients inside; after, those that did before."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, wanted in zip(weights, before, strict=True):
            weight.requires_grad_(wanted)


@contextmanager
def _restored_buffers(model: DualEncoder) -> Iterator[None]:
    """What a forward pass moves by itself (statistics of BatchNorm, a scale that is held in its range) is put back."""
    moved = [*model.moving.values(), *([] if model.temperature is None else [model.temperature])]
    before = [tensor.detach().clone() for tensor in moved]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(moved, before, strict=True):
                tensor.copy_(value)


def _gradients_through(side: Tensor, slope: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    return [*torch.autograd.grad(side, weights, slope, materialize_grads=True)]


def _flatten_tensors(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float(one @ other) / lengths if lengths else math.nan
