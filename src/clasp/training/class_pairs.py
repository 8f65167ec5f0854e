"""Class pairs in the closed form of two linear heads: a tower's classifier as image-text pairs without images.

Input: a model whose image tower was pre-trained with a classifier, and the features of its class names. Output:
``ClassPairFeatures`` and their moments, to be combined with those of the training pairs. In standardised features the
image of a class is its weight vector times the deviation of each feature: the activation pattern of a linear classifier
(Haufe et al., NeuroImage 2014, equation 6) under a diagonal covariance. Note: columns that the classifier does not read
(maxima, lower layers) are predicted from those that it reads, by ridge regression over the training images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clasp.models.classifier import ClassPairs, class_pairs
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.models.standardize import Standardize, signed_power
from clasp.training.moments import PairMoments
from clasp.training.pooled_features import pool_inputs
from clasp.types import UserError

DEFAULT_CLASS_WEIGHT = 10.0
"""Training pairs that a class counts as. Chosen on validation, drawings and photos (``dev/LOG.md``)"""

_PAIRS_AT_ONCE = 8192  # so that 60,000 pairs of 21,843 classes are never in memory at once in float64


@dataclass(frozen=True)
class WeightedClassPairs:
    """The class pairs of a tower and their weight in the closed form."""

    pairs: ClassPairs
    columns: slice
    """The columns of the image tower's pooled features that the classifier reads"""
    weight: float
    """Training pairs that a class counts as"""
    source: str

    @property
    def total_weight(self) -> float:
        """Training pairs that all class pairs together count as."""
        return self.weight * self.pairs.classes

    def __str__(self) -> str:
        return (
            f"class pairs: {self.pairs.classes:,} classes ({self.source}), {len(self.pairs.texts):,} names and "
            f"definitions; a class counts as {self.weight:g} training pair{'' if self.weight == 1 else 's'}"
        )


@dataclass(frozen=True)
class ClassPairFeatures:
    """Class pairs with the text tower's pooled features of their texts."""

    classes: WeightedClassPairs
    text: Float[Tensor, "n Dt"]

    def patterns(self, image: Standardize) -> Float[Tensor, "K Di"]:
        """The standardised image features of each concept; those of the pairs have the mean length of a pair's.

        The class probabilities that a head may read are 1 for a class, and equal for the classes of a broader concept.
        Where a layer has one factor, weight vectors are multiplied by the deviation of each feature, which
        standardising each feature does by itself. Columns that the classifier does not read are zero.
        """
        scale, pairs, columns = image.scale.detach(), self.classes.pairs, self.classes.columns
        rows = torch.zeros(len(pairs.vectors), len(scale), dtype=scale.dtype, device=scale.device)
        own = pairs.vectors.to(scale) / scale[columns]
        if image.deviations is not None:
            own = own * image.deviations[columns].to(scale)
        rows[:, columns] = self._pair_length(own)
        if image.probabilities is not None:
            probabilities = torch.zeros(len(rows), len(image.probabilities.weight), dtype=scale.dtype)
            for row, concept in zip(probabilities, pairs.concepts, strict=True):
                row[list(concept.classes)] = 1 / len(concept.classes)
            rows[:, image.pooled_width :] = self._pair_length(signed_power(probabilities, image.power)).to(rows)
        return rows

    def _pair_length(self, rows: Float[Tensor, "K d"]) -> Float[Tensor, "K d"]:
        """Rows scaled to the mean length of standardised features over the class pairs."""
        return rows * (rows.shape[1] ** 0.5 / rows.norm(dim=1)[self.classes.pairs.concept].mean())

    def moments(self, image: Standardize, text: Standardize, training: PairMoments, ridge: float) -> PairMoments:
        """Moments in the standardised features of both heads.

        ``training``: those of the training pairs. A column ``r`` that the classifier does not read is
        ``pattern (C_mm + ridge)⁻¹ C_mr``, with ``C`` the covariance of the training images and ``m`` the columns read.
        """
        pairs, columns = self.classes.pairs, self.classes.columns
        patterns = self.patterns(image)
        rows = _whole_rows(patterns[:, columns], columns, training, ridge)
        rows[:, image.pooled_width :] = patterns[:, image.pooled_width :]
        moments = PairMoments.empty(rows.shape[1], self.text.shape[1], rows.device)
        for part in torch.arange(len(pairs.texts)).split(_PAIRS_AT_ONCE):
            texts = text(self.text[part].to(rows)).detach()
            moments.add(rows[pairs.concept[part]], texts, pairs.weight[part].to(rows.device))
        return moments


def _whole_rows(
    pattern: Float[Tensor, "n d"], columns: slice, pairs: PairMoments, ridge: float
) -> Float[Tensor, "n Di"]:
    """Patterns with the columns that the classifier does not read, predicted from those that it reads."""
    covariance = pairs.image_image / pairs.weight
    covariance = covariance - torch.outer(pairs.image, pairs.image) / pairs.weight**2
    if len(covariance) == pattern.shape[1]:
        return pattern
    penalty = ridge * torch.eye(pattern.shape[1], dtype=covariance.dtype, device=covariance.device)
    rows = pattern.double() @ torch.linalg.solve(covariance[columns, columns] + penalty, covariance[columns])
    rows[:, columns] = pattern.double()
    return rows.to(pattern)


def find_class_pairs(model: DualEncoder, weight: float | None) -> WeightedClassPairs | None:
    """The class pairs of a model's image tower; ``None`` where there are none, or ``weight`` is 0.

    ``weight``: ``data.class_weight``. ``None`` is ``DEFAULT_CLASS_WEIGHT`` where the tower has a classifier; with a
    number, a tower without one raises ``UserError``.
    """
    if weight == 0:
        return None
    found = model.image.classifier()
    if found is None:
        if weight is not None:
            raise UserError(
                f"data.class_weight = {weight:g}: {model.image.name} has no classifier whose classes have names, or "
                "image.pool has other features than it reads; leave data.class_weight out, or choose a tower that was "
                "trained as a classifier (pip:efficientnet-lite0, or one of timm: or hf:) with its own pool"
            )
        return None
    classifier, columns = found
    weight = DEFAULT_CLASS_WEIGHT if weight is None else weight
    return WeightedClassPairs(class_pairs(classifier), columns, weight, classifier.source)


def class_pair_features(classes: WeightedClassPairs, model: DualEncoder, inputs: FeatureSource) -> ClassPairFeatures:
    """Class pairs with the pooled features of their texts, cached as other captions."""
    texts = sorted(set(classes.pairs.texts))
    rows: dict[str, Tensor] = {}
    for some, batch in inputs.read(texts):
        rows.update(zip(some, pool_inputs(model.text, batch), strict=True))
    return ClassPairFeatures(classes, torch.stack([rows[text] for text in classes.pairs.texts]))
