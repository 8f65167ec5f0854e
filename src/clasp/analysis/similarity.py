"""How far states and weights have moved: linear CKA of two sets of states, relative change of two sets of weights.

In go tensors, out come plain numbers; pure, in float64. Unusual: a measure that its inputs leave undefined is NaN, and
whoever asked leaves it out; two equal sets give exactly 1 and exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def linear_cka(x: Float[Tensor, "n D1"], y: Float[Tensor, "n D2"]) -> float:
    """Centred kernel alignment with linear kernels; row i of both is about the same input. Between 0 and 1.

    ``|Y'X|² / (|X'X| |Y'Y|)`` with centred columns and Frobenius norms (Kornblith et al., ICML 2019, section 3). It
    does not see a rotation or a common scale. It is biased upwards: of unrelated states with fewer inputs than
    features it is far above 0, so only values on equally many inputs can be compared. NaN where a side is constant.
    """
    assert len(x) == len(y), f"{len(x)} states and {len(y)}"
    x, y = (states.double() - states.double().mean(dim=0) for states in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same number from n x n matrices
        left, right = x @ x.T, y @ y.T
        cross, own, other = (left * right).sum(), left.square().sum(), right.square().sum()
    else:
        cross, own, other = (x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum()
    norms = (own * other).sqrt()  # sqrt(a²) is exactly a
    return float(cross / norms) if norms > 0 else math.nan


def relative_change(before: Sequence[Float[Tensor, ...]], after: Sequence[Float[Tensor, ...]]) -> float:
    """``|after - before| / |before|``, both Euclidean norms over all tensors taken as one vector.

    0 where nothing moved; NaN where there is nothing, and where something moved away from zeros alone.
    """
    assert len(before) == len(after), f"{len(before)} tensors and {len(after)}"
    moved = math.sqrt(sum(_squares(b.double() - a.double()) for b, a in zip(before, after, strict=True)))
    size = math.sqrt(sum(_squares(tensor.double()) for tensor in before))
    if size == 0:
        return math.nan if moved or not before else 0.0
    return moved / size


def _squares(tensor: Float[Tensor, ...]) -> float:
    return torch.sum(tensor * tensor).item()
