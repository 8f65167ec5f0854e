"""Modality clusters: whether the states of images and of texts fall apart into two groups, block by block.

Input: for the blocks of both towers the features of the same pairs. Output: a ``ModalityClusters`` for the joint
embedding and, of towers of one depth, for each block with one width in both. Note: this is the question of MS-CLIP (You
et al., ECCV 2022, "NMI"), after the probes of Cao et al. (ECCV 2020); the definition is ours, theirs is not in the
published code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clasp.analysis.layer_similarity import SHUFFLES

_RESTARTS, _ITERATIONS = 8, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityClusters:
    """Normalised mutual information of cluster and modality after one block, counted from 1; 0 is the joint embedding.

    1: each modality is a cluster; 0: both are mixed. ``nmi_shuffled``: with the modalities of the rows permuted.
    """

    block: int
    nmi: float
    nmi_shuffled: float


def modality_clusters(
    image: Mapping[int, Float[Tensor, "n _"]], text: Mapping[int, Float[Tensor, "n _"]]
) -> list[ModalityClusters]:
    """A row for every block at the same place in towers of one depth, with one width in both.

    Block 0, the embedding, is compared whatever the depth. Rows of unit length are parted by 2-means, of several starts
    the one with the smallest squared distances. Separate towers are compared too, though nothing makes their spaces
    one: they show what sharing is held against.
    """
    alike = max(image) == max(text)
    common = [b for b in image if b in text and image[b].shape[1] == text[b].shape[1] and (alike or b == 0)]
    rows = []
    for block in common:
        states = F.normalize(torch.cat((image[block], text[block])).double(), dim=1)
        modality = torch.arange(len(states)) // len(image[block])
        generator = torch.Generator().manual_seed(0)
        cluster = two_means(states, generator)
        orders = [torch.randperm(len(states), generator=generator) for _ in range(SHUFFLES)]
        shuffled = sum(mutual_information(cluster, modality[order]) for order in orders) / SHUFFLES
        rows.append(
            ModalityClusters(block=block, nmi=mutual_information(cluster, modality), nmi_shuffled=float(shuffled))
        )
    return rows


def two_means(states: Float[Tensor, "m D"], generator: torch.Generator) -> Int[Tensor, " m"]:
    """The cluster of each row, 0 or 1, by Lloyd's iterations from the best of several random pairs of rows."""
    best, lowest = torch.zeros(len(states), dtype=torch.long), math.inf
    for _ in range(_RESTARTS):
        centres = states[torch.randperm(len(states), generator=generator)[:2]]
        cluster = best
        for _ in range(_ITERATIONS):
            distances = torch.cdist(states, centres)
            cluster = distances.argmin(dim=1)
            parts = [states[cluster == number] for number in (0, 1)]
            moved = torch.stack([part.mean(dim=0) if len(part) else centres[n] for n, part in enumerate(parts)])
            if torch.equal(moved, centres):
                break
            centres = moved
        spread = float(torch.cdist(states, centres).amin(dim=1).square().sum())
        if spread < lowest:
            best, lowest = cluster, spread
    return best


def mutual_information(one: Int[Tensor, " m"], other: Int[Tensor, " m"]) -> float:
    """Normalised mutual information of two labels 0 or 1: ``2 I / (H1 + H2)``, as scikit-learn's with its arithmetic
    mean; 0 where one of them has one value only."""
    joint = torch.bincount(2 * one + other, minlength=4).double().view(2, 2) / len(one)
    of_one, of_other = (float(torch.special.entr(joint.sum(dim=side)).sum()) for side in (1, 0))
    if min(of_one, of_other) == 0:
        return 0.0
    shared = of_one + of_other - float(torch.special.entr(joint).sum())
    return max(0.0, 2 * shared / (of_one + of_other))
