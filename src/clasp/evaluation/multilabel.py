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


def eleven_point_precision(scores: Float[Tensor, "n C"], labels: Bool[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """For each class the mean over the recalls 0, 0.1, …, 1 of the highest precision at that recall or above; NaN
    without a positive. The metric of PASCAL VOC 2007 (Everingham et al., IJCV 2010, section 4.2)."""
    found = []
    for of_class, right in zip(scores.double().T, labels.T, strict=True):
        order = of_class.argsort(descending=True)
        ordered, hits = of_class[order], right[order].double().cumsum(0)
        if not hits[-1]:
            found.append(hits.new_tensor(torch.nan))
            continue
        last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])  # of each threshold
        recall, precision = hits[last] / hits[-1], hits[last] / torch.arange(1, len(ordered) + 1)[last]
        best = precision.flip(0).cummax(0).values.flip(0)
        wanted = torch.linspace(0, 1, 11, dtype=torch.float64) - 1e-9
        found.append(best[torch.searchsorted(recall, wanted)].mean())
    return torch.stack(found)


def two_class_influence(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """For each image ``2 w - A``: A is the area under the ROC curve, w the share of the images of the other class that
    it is on the right side of, ties counting 1/2.

    The mean over the classes of their means is A, and the bootstrap variance of that mean is ``S10/m + S01/n`` (DeLong
    et al., Biometrics 1988). With images of one class only, A is 1/2.
    """
    scores = scores.double()
    wins = torch.empty_like(scores)
    for side, sign in ((labels, 1.0), (~labels, -1.0)):
        others, mine = (sign * scores[~side]).sort().values, sign * scores[side]
        below, not_above = (torch.searchsorted(others, mine, right=right) for right in (False, True))
        wins[side] = (below + not_above).double() / (2 * len(others)) if len(others) else 0.5
    return 2 * wins - wins[labels if labels.any() else ~labels].mean()


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
