"""Gradient agreement between the modalities on shared weights: cosines of two gradients, layer by layer.

Input: a dual encoder, a batch and a loss. Output: a row for each layer and part that both towers share. The gradient of
a contrastive loss reaches a shared weight through the image tower (the gradient with text embeddings held constant) and
through the text tower (with image embeddings held constant); their sum is the training gradient. A cosine of 1: both
modalities request the same update; 0: unrelated updates; -1: opposite ones. The measure is that of Yu et al. (NeurIPS
2020), who project conflicts away; here it is only reported, beside the same for captions of other images.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientAgreement:
    """Agreement on the weights of one part of one layer, or of all shared weights of the layer (``WHOLE_LAYER``)."""

    layer: int
    """counted from 0 as in the sharing policy, a stem being layer 0"""
    part: str
    cosine: float | None
    """of the two gradients; ``None`` where one of them is zero"""
    cosine_shuffled: float | None
    """the same where each image has the caption of the next one in the batch"""
    image_norm: float
    """norm of the gradient through the image tower"""
    text_norm: float
    """norm of the gradient through the text tower"""


def gradient_agreement(model: DualEncoder, batch: Batch, loss: Loss) -> list[GradientAgreement]:
    """For each layer with shared weights, lowest first, a row for all of them and then one for each part.

    Frozen weights are included: their gradients show whether sharing them is harmful. The model is left unchanged (its
    ``.grad`` too), and stays in its mode, so dropout is active in training mode. A shared final norm or head belongs to
    no layer and is skipped. Empty where the towers share no layer. Raises ``UserError`` for a batch of cached features.
    """
    if not (isinstance(batch.image, Pixels) and isinstance(batch.text, Tokens)):
        raise UserError("gradients need pixels and tokens as inputs of both towers; set data.feature_cache = 'off'")
    groups = shared_parameters(model)
    weights = [weight for group in groups.values() for weight in group]
    if not weights:
        return []
    with torch.enable_grad(), _requiring_gradients(weights), _restored_buffers(model):
        embeddings = model.embed_image(batch.image), model.embed_text(batch.text)
        paired, shuffled = (
            _gradients_by_way(model, embeddings, loss, batch.groups, weights, offset) for offset in (0, 1)
        )
    index = {id(weight): number for number, weight in enumerate(weights)}
    rows = []
    for layer in sorted({layer for layer, _ in groups}):
        parts = {part: shared for (number, part), shared in groups.items() if number == layer}
        parts = {WHOLE_LAYER: [weight for shared in parts.values() for weight in shared], **parts}
        for part, shared in parts.items():
            numbers = [index[id(weight)] for weight in shared]
            image, text = (_flatten_tensors([way[number] for number in numbers]) for way in paired)
            others = (_flatten_tensors([way[number] for number in numbers]) for way in shuffled)
            rows.append(
                GradientAgreement(
                    layer=layer,
                    part=part,
                    cosine=_cosine(image, text),
                    cosine_shuffled=_cosine(*others),
                    image_norm=float(image.norm()),
                    text_norm=float(text.norm()),
                )
            )
    return rows


def shared_parameters(model: DualEncoder) -> dict[tuple[int, str], list[nn.Parameter]]:
    """Parameters that blocks of both towers share, by layer and part; empty where there are none."""
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


# --- how -------------------------------------------------------------------------------------------------------------


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


def _gradients_by_way(
    model: DualEncoder,
    embeddings: tuple[Tensor, Tensor],
    loss: Loss,
    groups: Tensor,
    weights: Sequence[nn.Parameter],
    offset: int,
) -> list[list[Tensor]]:
    """The gradients of ``weights`` through the image tower and through the text tower; row i of the images beside row
    i + ``offset`` of the texts."""
    image, text = (embedding.detach() for embedding in embeddings)
    text = text.roll(-offset, 0)
    image, text = image.requires_grad_(), text.requires_grad_()
    scale, bias = (None if value is None else value.detach() for value in model.scale_and_bias())
    assert scale is not None
    total = loss(image, text, scale, bias, groups=groups).total
    to_image, to_text = torch.autograd.grad(total, (image, text))
    return [
        [*torch.autograd.grad(embedding, weights, upstream, retain_graph=True, materialize_grads=True)]
        for embedding, upstream in zip(embeddings, (to_image, to_text.roll(offset, 0)), strict=True)
    ]


def _flatten_tensors(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _cosine(one: Tensor, other: Tensor) -> float | None:
    lengths = float(one.norm() * other.norm())
    return float(one @ other) / lengths if lengths else None
