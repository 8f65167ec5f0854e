"""What a projection head maps: pooled features, with class probabilities beside them if wanted, standardised.

Input: the pooled features of a tower, ``[B D]``. Output: ``[B D + C]``, where C is the number of classes of the tower's
own classifier, or 0. In this order: append the class probabilities, raise to a power with the sign kept, shift and
scale. Note: the classifier is a frozen part of the pre-trained tower, read again wherever a model is built; it is not
among the parameters and not in a delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clasp.models.classifier import Classifier

_ROWS_AT_ONCE = 4096  # of a float64 copy


class ClassProbabilities(nn.Module):
    """``softmax(W x + b)`` of a classifier that was pre-trained on some columns of the pooled features."""

    weight: Tensor
    bias: Tensor

    def __init__(self, classifier: Classifier, columns: slice):
        super().__init__()
        self.columns = columns
        self.register_buffer("weight", classifier.weight.float(), persistent=False)
        self.register_buffer("bias", classifier.bias.float(), persistent=False)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        return (x[:, self.columns].float() @ self.weight.T + self.bias).softmax(dim=1)


@dataclass(frozen=True)
class FeatureLayout:
    """The columns of pooled features by layer, and what else the head reads of them."""

    layers: Sequence[int]
    """The width of each pooled layer"""
    per_layer: bool = False
    """One factor for all features of a layer, and one for the class probabilities"""
    power: float = 1.0
    probabilities: ClassProbabilities | None = None


class Standardize(nn.Module):
    """``x * scale + shift`` per feature, data-dependent initialisation by ``fit`` (Kingma & Dhariwal, 2018, section
    3.1), after class probabilities and power normalisation (Perronnin et al., ECCV 2010, section 3.1)."""

    def __init__(self, layout: FeatureLayout):
        super().__init__()
        self.power, self.probabilities = layout.power, layout.probabilities
        self.pooled_width = sum(layout.layers)
        classes = [] if layout.probabilities is None else [len(layout.probabilities.weight)]
        self.width = self.pooled_width + sum(classes)
        self._per_layer = layout.per_layer
        self._blocks = [*layout.layers, *classes] if layout.per_layer else [1] * self.width
        self.scale = nn.Parameter(torch.ones(self.width))
        self.shift = nn.Parameter(torch.zeros(self.width))
        self.deviations: Tensor | None = None
        """Deviation of each standardised feature, ``[D + C]``; set by ``fit`` where a layer has one factor, not saved.
        ``None``: 1 each"""

    def fit(self, pooled: Float[Tensor, "n D"], counts: Int[Tensor, " n"] | None = None) -> None:
        """Initialise so that the features of ``pooled`` get mean 0 and deviation 1, each or on average over a layer.

        ``counts``: how often each row counts. Near-constant features are not blown up.
        """
        features = self._features(pooled).double()
        if counts is None or bool((counts == 1).all()):
            variance, mean = torch.var_mean(features, dim=0, correction=0)
        else:
            share = (counts / counts.sum()).to(features)
            mean, variance = share @ features, torch.zeros_like(features[0])
            for part, of_part in zip(share.split(_ROWS_AT_ONCE), features.split(_ROWS_AT_ONCE), strict=True):
                variance += part @ (of_part - mean).square()
        deviation = torch.cat([block.mean().sqrt().expand(len(block)) for block in variance.split(self._blocks)])
        factor = 1 / deviation.clamp(min=1e-3 * float(deviation.median()) + 1e-12)
        with torch.no_grad():
            self.scale.copy_(factor)
            self.shift.copy_(-mean * factor)
        if self._per_layer:
            self.deviations = (variance.sqrt() * factor).to(self.scale)

    def forward(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B Dh"]:
        return self._features(pooled) * self.scale + self.shift

    @torch.no_grad()
    def invert(self, standardized: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The pooled features whose own columns, without class probabilities, are ``standardized``."""
        own = slice(0, self.pooled_width)
        return signed_power((standardized - self.shift[own]) / self.scale[own], 1 / self.power)

    @torch.no_grad()
    def shrunk_mean(self, shrinkage: float) -> Float[Tensor, " Dh"]:
        """The mean that ``fit`` has set to 0, moved this fraction of the way to the mean over all features of a layer,
        or over all class probabilities (Efron & Morris, JASA 1973; ours is a set fraction, not an estimate)."""
        assert self._per_layer, "features of one layer have one factor, so that their means compare"
        means = (-self.shift).split(self._blocks)
        return shrinkage * torch.cat([block.mean() - block for block in means])

    def _features(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B Dh"]:
        if self.probabilities is not None:
            pooled = torch.cat((pooled, self.probabilities(pooled).to(pooled)), dim=1)
        return signed_power(pooled, self.power)


def signed_power(x: Float[Tensor, "*shape"], power: float) -> Float[Tensor, "*shape"]:
    """``sign(x) |x|^power``."""
    return x if power == 1 else x.sign() * x.abs() ** power
