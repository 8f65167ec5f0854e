"""Zero-shot classification of images with several classes: average precision and area under the ROC curve, per class.

Input: scores of images for classes, and which classes each image has. Output: the metric of each class. Pure. Note:
tied scores count as one threshold, as in scikit-learn, so that collapsed embeddings score at chance: the share of
positives for average precision, 1/2 for the area.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def average_precision(scores: Float[Tensor, "n C"], labels: Bool[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """For each class the mean over its positives of the precision at their threshold; NaN without a positive.

    Sum over thresholds of (R_i - R_(i-1)) P_i, without interpolation, as scikit-learn's ``average_precision_score``.
    """
    found = []
    for of_class, right in zip(scores.double().T, labels.T, strict=True):
        order = of_class.argsort(descending=True)
        ordered, hits = of_class[order], right[order].double().cumsum(0)
        last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])  # of each threshold
        hits, seen = hits[last], torch.arange(1, len(ordered) + 1)[last]
        gained = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
        found.append((gained * hits / seen).sum())
    return torch.stack(found)


def roc_auc(scores: Float[Tensor, "n C"], labels: Bool[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """For each class the probability that a positive scores above a negative, ties counting 1/2 (Mann and Whitney); NaN
    without a positive or a negative."""
    found = []
    for of_class, right in zip(scores.double().T, labels.T, strict=True):
        _, place, count = of_class.unique(return_inverse=True, return_counts=True)
        mean_rank = count.cumsum(0) - (count - 1) / 2  # of tied scores, from 1
        positives, negatives = int(right.sum()), int((~right).sum())
        above = mean_rank[place][right].sum() - positives * (positives + 1) / 2
        found.append(above / (positives * negatives))
    return torch.stack(found)
