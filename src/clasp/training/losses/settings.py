"""Loss settings of a recipe, and the loss built from them.

Input: ``LossSettings``. Output: a ``Loss``: one of ``LOSSES``, optionally wrapped to ignore groups (diagonal positives)
or to take negatives from parts of the batch only. Note: both wrappers reproduce LilT and are off by default, since the
first adds false negatives and the second removes negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from clasp.training.losses.contrastive import find_loss
from clasp.types import Loss, LossParts, UserError


class LossSettings(BaseModel):
    """The part of ``[loss]`` that selects the loss, its positives and its negatives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = "infonce"
    """A key of ``clasp.training.losses.LOSSES``, or ``package.module:Name`` for a function or ``LossMethod``"""
    positives: Literal["groups", "diagonal"] = "groups"
    """``groups``: a pair's positives are all pairs of its group or of its caption's text; ``diagonal``: itself alone,
    so that another caption of the same image is a negative (LilT)"""
    negatives: Annotated[int, Field(gt=1)] | Literal["all"] = "all"
    """``all``: those in the whole batch. A number: those in a part of the batch, of so many pairs; the loss is the mean
    over the parts (LilT: 128, the pairs on one of four devices). Where the batch is no multiple of it, the parts are as
    few as will do, alike in size but for one pair, and each counts by its pairs"""

    @field_validator("kind")
    @classmethod
    def _require_known_loss(cls, kind: str) -> str:
        find_loss(kind)
        return kind

    def require_batch_size(self, batch: int) -> None:
        """Raises ``UserError`` where ``negatives`` is larger than the batch size, which would have no effect."""
        if self.negatives != "all" and self.negatives > batch:
            raise UserError(
                f"loss.negatives = {self.negatives} is more than the {batch} pairs of a batch (train.batch_size); "
                f"at most {batch}, or 'all'"
            )


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
