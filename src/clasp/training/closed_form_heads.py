"""Heads in closed form that were computed before, to be set in place of their initialisation from the pairs.

Input: standardisation and map of either side. Output: the parameters of a model's heads, in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clasp.models.dual_encoder import DualEncoder
from clasp.models.heads import ProjectionHead
from clasp.models.standardize import Standardize


@dataclass(frozen=True, slots=True)
class HeadInClosedForm:
    """A head: scale and shift of the features, weight and bias of the linear map."""

    scale: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    weight: Float[Tensor, "E d"]
    bias: Float[Tensor, " E"]

    @classmethod
    def of(
        cls,
        standardize: Standardize,
        columns: Int[Tensor, " d"],
        weight: Float[Tensor, "E d"],
        mean: Float[Tensor, " d"],
    ) -> HeadInClosedForm:
        """The head of some columns of features that ``standardize`` is fitted to."""
        scale, shift = standardize.scale.detach()[columns], standardize.shift.detach()[columns]
        return cls(scale, shift, weight, -(weight @ mean))

    @torch.no_grad()
    def copy_to(self, head: ProjectionHead) -> None:
        """Set the parameters of a head of the same shape."""
        assert head.standardize is not None and isinstance(head.map, nn.Linear)
        head.standardize.scale.copy_(self.scale)
        head.standardize.shift.copy_(self.shift)
        head.map.weight.copy_(self.weight)
        head.map.bias.copy_(self.bias)


@dataclass(frozen=True, slots=True)
class ClosedFormHeads:
    """The heads that ``training.initialize.initialize_heads`` computes from the same pairs, to rounding."""

    image: HeadInClosedForm
    text: HeadInClosedForm

    def __call__(self, model: DualEncoder) -> None:
        self.image.copy_to(model.image_head)
        self.text.copy_to(model.text_head)
