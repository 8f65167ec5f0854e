"""Gradient agreement between the modalities on shared weights: cosines of two gradients, layer by layer.

Input: a dual encoder, a batch and a loss. Output: a row for each layer and part that both towers share. The gradient of
a contrastive loss reaches a shared weight through the image tower (the gradient with text embeddings held constant) and
through the text tower (with image embeddings held constant); their sum is the training gradient. A cosine of 1: both
modalities request the same update; 0: unrelated updates; -1: opposite ones. The measure is that of Yu et al. (NeurIPS
2020), who project conflicts away; here it is only reported.
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
# by prefix of the parameter name in a block; the first match
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
    """Agreement on the weights of one part of one layer, or of all shared weights of the layer (``WHOLE_LAYER``)."""

    layer: int
    """counted from 0 as in the sharing policy, a stem being layer 0"""
    part: str
    cosine: float
    """of the two gradients; NaN where one of them is zero"""
    image_norm: float
    """norm of the gradient through the image tower"""
    text_norm: float
    """norm of the gradient through the text tower"""


def gradient_agreement(model: DualEncoder, batch: Batch, loss: Loss) -> list[GradientAgreement]:
    """For each layer with shared weights, lowest first, a row for all of them and then one for each part.

    Frozen weights are included: their gradients show whether sharing them is harmful. The model is left unchanged (its
    ``.grad`` too), and stays in its mode, so dropout is active in training mode. A shared final norm or head belongs to
    no layer and is skipped. Raises ``UserError`` where the towers share no layer, and for a batch of cached features.
    """
    if not (isinstance(batch.image, Pixels) and isinstance(batch.text, Tokens)):
        raise UserError("gradients need pixels and tokens as inputs of both towers; set data.feature_cache = 'off'")
    groups = _shared_parameters(model)
    weights = [weight for group in groups.values() for weight in group]
    if not weights:
        raise UserError(
            f"{model.name} holds no layer in common, so there are no gradients to compare; see [share] of a recipe"
        )
    with torch.enable_grad(), _requiring_gradients(weights), _restored_buffers(model):
        embeddings = model.embed_image(batch.image), model.embed_text(batch.text)
        image, text = (embedding.detach().requires_grad_() for embedding in embeddings)
        scale, bias = (None if value is None else value.detach() for value in model.scale_and_bias())
        assert scale is not None
        total = loss(image, text, scale, bias, groups=batch.groups).total
        through_image, through_text = (
            _gradients_through(embedding, upstream, weights)
            for embedding, upstream in zip(embeddings, torch.autograd.grad(total, (image, text)), strict=True)
        )
    index = {id(weight): number for number, weight in enumerate(weights)}
    rows = []
    for layer in sorted({layer for layer, _ in groups}):
        parts = {part: shared for (number, part), shared in groups.items() if number == layer}
        parts = {WHOLE_LAYER: [weight for shared in parts.values() for weight in shared], **parts}
        for part, shared in parts.items():
            numbers = [index[id(weight)] for weight in shared]
            image_gradient, text_gradient = (
                _flatten_tensors([gradients[number] for number in numbers])
                for gradients in (through_image, through_text)
            )
            cosine = _cosine(image_gradient, text_gradient)
            norms = float(image_gradient.norm()), float(text_gradient.norm())
            rows.append(GradientAgreement(layer, part, cosine, *norms))
    return rows


# --- how -------------------------------------------------------------------------------------------------------------


def _shared_parameters(model: DualEncoder) -> dict[tuple[int, str], list[nn.Parameter]]:
    """Parameters shared by the blocks of both towers, by layer and part."""
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
    """Sets ``requires_grad`` on all weights inside the context, and restores it afterwards."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


@contextmanager
def _restored_buffers(model: DualEncoder) -> Iterator[None]:
    """Restores what a forward pass changes in place: BatchNorm statistics, and a temperature clamped to its range."""
    changed = [*model.moving.values(), *([] if model.temperature is None else [model.temperature])]
    before = [tensor.detach().clone() for tensor in changed]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)


def _gradients_through(embedding: Tensor, upstream: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    return [*torch.autograd.grad(embedding, weights, upstream, materialize_grads=True)]


def _flatten_tensors(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float(one @ other) / lengths if lengths else math.nan
