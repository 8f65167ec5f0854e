"""The loss of a recipe, built from its settings.

Input: ``LossSettings``. Output: a ``Loss``: one of ``LOSSES``, optionally wrapped to ignore groups (diagonal positives)
or to take negatives from parts of the batch only. Note: both wrappers reproduce LilT and are off by default, since the
first adds false negatives and the second removes negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.training.loss_settings import LossSettings
from clasp.training.losses.contrastive import find_loss
from clasp.types import Loss, LossParts


def build_loss(settings: LossSettings) -> Loss:
    """The loss of the settings."""
    loss: Loss = find_loss(settings.kind)
    if settings.positives == "diagonal":
        loss = DiagonalPositives(loss)
    return loss if settings.negatives == "all" else SubBatchNegatives(loss, settings.negatives)


@dataclass(frozen=True, slots=True)
class DiagonalPositives:
    """A loss without groups: the only positive of a row is its own pair."""

    loss: Loss

    def __call__(
        self,
        image: Float[Tensor, "B E"],
        text: Float[Tensor, "B E"],
        scale: Float[Tensor, ""],
        bias: Float[Tensor, ""] | None = None,
        *,
        groups: Int[Tensor, "B 2"] | None = None,
    ) -> LossParts:
        return self.loss(image, text, scale, bias)


@dataclass(frozen=True, slots=True)
class SubBatchNegatives:
    """A loss whose negatives come from a part of the batch: consecutive pairs, at most ``max_pairs`` of them.

    Equivalent to several devices that do not gather embeddings; the mean over pairs of the parts' losses.
    """

    loss: Loss
    max_pairs: int

    def __call__(
        self,
        image: Float[Tensor, "B E"],
        text: Float[Tensor, "B E"],
        scale: Float[Tensor, ""],
        bias: Float[Tensor, ""] | None = None,
        *,
        groups: Int[Tensor, "B 2"] | None = None,
    ) -> LossParts:
        count = -(-len(image) // self.max_pairs)
        sides = zip(image.tensor_split(count), text.tensor_split(count), strict=True)
        of_part = [None] * count if groups is None else groups.tensor_split(count)
        losses = []
        for (images, texts), part_groups in zip(sides, of_part, strict=True):
            share = len(images) / len(image)
            losses.append([share * each for each in self.loss(images, texts, scale, bias, groups=part_groups)])
        return LossParts(*(torch.stack(each).sum() for each in zip(*losses, strict=True)))
