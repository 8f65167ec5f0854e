"""Similarity measures: linear CKA and mutual k-NN of two sets of features, relative change of two sets of weights.

Input: tensors. Output: Python floats, computed in float64. Note: an undefined value is NaN, which callers skip; two
equal sets give exactly 1 and exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def linear_cka(x: Float[Tensor, "n D1"], y: Float[Tensor, "n D2"]) -> float:
    """Centred kernel alignment with linear kernels, in [0, 1]; row i of ``x`` and ``y`` belongs to the same input.

    ``|Y'X|² / (|X'X| |Y'Y|)`` with centred columns and Frobenius norms (Kornblith et al., ICML 2019, section 3).
    Invariant to rotation and isotropic scaling. It is biased upwards: for unrelated features with fewer inputs than
    features it is far above 0, so only values on equally many inputs are comparable. NaN where a side is constant.
    """
    assert len(x) == len(y), f"{len(x)} rows and {len(y)}"
    x, y = (features.double() - features.double().mean(dim=0) for features in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same value from n x n Gram matrices
        left, right = x @ x.T, y @ y.T
        cross, norm_x, norm_y = (left * right).sum(), left.square().sum(), right.square().sum()
    else:
        cross, norm_x, norm_y = (x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum()
    norms = (norm_x * norm_y).sqrt()  # sqrt(a²) is exactly a
    return float(cross / norms) if norms > 0 else math.nan


def mutual_knn(x: Float[Tensor, "n D1"], y: Float[Tensor, "n D2"], neighbours: int) -> float:
    """Mean share of the ``neighbours`` nearest rows that a row has in common in ``x`` and ``y``, 0 to 1.

    Row i of both belongs to the same input (Huh et al., ICML 2024, "The Platonic Representation Hypothesis", appendix
    A; theirs is of the same cosine, with 10 neighbours among 1,024 pairs). Chance is ``neighbours / (n - 1)``.
    """
    assert len(x) == len(y), f"{len(x)} rows and {len(y)}"
    one, other = nearest_rows(x, neighbours), nearest_rows(y, neighbours)
    return float((one[:, :, None] == other[:, None, :]).any(dim=2).double().mean())


def nearest_rows(features: Float[Tensor, "n D"], neighbours: int) -> Int[Tensor, "n K"]:
    """Indices of the rows with the highest cosine to each row, itself excluded; of equal ones any."""
    assert 0 < neighbours < len(features), f"{neighbours} neighbours among {len(features)} rows"
    unit = F.normalize(features.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-math.inf).topk(neighbours, dim=1).indices


def relative_change(before: Sequence[Float[Tensor, ...]], after: Sequence[Float[Tensor, ...]]) -> float:
    """``|after - before| / |before|``, Euclidean norms over all tensors as one vector.

    0 for equal tensors; NaN without tensors, and for a change from all zeros.
    """
    assert len(before) == len(after), f"{len(before)} tensors and {len(after)}"
    change = math.sqrt(sum(_squares(b.double() - a.double()) for b, a in zip(before, after, strict=True)))
    norm = math.sqrt(sum(_squares(tensor.double()) for tensor in before))
    if norm == 0:
        return math.nan if change or not before else 0.0
    return change / norm


def _squares(tensor: Float[Tensor, ...]) -> float:
    return torch.sum(tensor * tensor).item()
