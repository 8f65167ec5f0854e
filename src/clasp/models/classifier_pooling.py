"""The pooling of the last hidden states that a linear classifier reads, found by trying each.

Input: the encoder of a whole classifier, its hidden states for two probe images, and the logits of the whole net for
the same images. Output: the pooling that gives those logits, or ``None``. Note: nothing is concluded from names; a
classifier that reads anything else (an attention pooling, a further convolution, another norm) has none.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.classifier import ClassifierPooling
from clasp.models.pooling import POOLING_FUNCTIONS, norm_pooled
from clasp.models.probe import relative_difference
from clasp.models.structure import find_structure

_TOLERANCE = 1e-3  # of the logits, relative


@torch.no_grad()
def find_classifier_pooling(
    net: nn.Module,
    states: Float[Tensor, "B N D"],
    layer: tuple[Float[Tensor, "C Dp"], Float[Tensor, " C"] | None],
    logits: Float[Tensor, "B C"],
) -> ClassifierPooling | None:
    """The pooling of ``states`` that ``layer`` (weight, bias) makes ``logits`` of; ``None`` where none does.

    The norm of pooled vectors that the family has is applied as in ``Tower.pool``. A layer that gives all classes the
    same logits (a head that was zeroed) has no pooling either.
    """
    weight, bias = layer
    if not (weight - weight.mean(0)).any():
        return None
    structure = find_structure(net)
    mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    for pool in get_args(ClassifierPooling):
        if pool != "mean" and not structure.prefix_tokens:
            continue
        vectors = POOLING_FUNCTIONS[pool](states, mask, structure.prefix_tokens)
        if vectors.shape[1] != weight.shape[1]:
            continue
        if structure.pooled_norm is not None:
            vectors = norm_pooled(net.get_submodule(structure.pooled_norm), vectors, states.shape[2])
        if relative_difference(F.linear(vectors, weight, bias), logits) <= _TOLERANCE:
            return pool
    return None
