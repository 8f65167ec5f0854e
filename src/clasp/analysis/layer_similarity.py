"""Similarity of the layers of two towers: linear CKA and mutual k-nearest neighbours, with a shuffled baseline.

Input: for every block of either tower the features of the same pairs, row by row. Output: a ``LayerSimilarity`` for
each combination of blocks. Note: both measures are above zero for unrelated features; the baseline is their mean over
random pairings of the rows (the same pairings for every combination), and only what exceeds it is similarity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clasp.analysis.similarity import nearest_rows

SHUFFLES = 10
"""Random pairings that the baseline is the mean of"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSimilarity:
    """The similarity of the states after one block of each tower, blocks counted from 1; 0 is the embedding in the
    joint space. ``…_shuffled``: the same for images paired with texts of other pairs."""

    image_block: int
    text_block: int
    cka: float
    cka_shuffled: float
    mutual_knn: float
    mutual_knn_shuffled: float


def layer_similarity(
    image: Mapping[int, Float[Tensor, "n _"]], text: Mapping[int, Float[Tensor, "n _"]], *, neighbours: int
) -> list[LayerSimilarity]:
    """A row for every combination of image block and text block, as ``linear_cka`` and ``mutual_knn`` compute them.

    ``neighbours``: K of the mutual k-nearest neighbours. Memory: 9 n² bytes for each text block.
    """
    count = len(next(iter(image.values())))
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(count, generator=generator) for _ in range(SHUFFLES)]
    prepared = {block: _Prepared.of(features, neighbours) for block, features in text.items()}
    rows = []
    for image_block, features in image.items():
        one = _Prepared.of(features, neighbours)
        shuffled = [one.in_order(order) for order in orders]
        for text_block, other in prepared.items():
            rows.append(
                LayerSimilarity(
                    image_block=image_block,
                    text_block=text_block,
                    cka=one.cka(other),
                    cka_shuffled=sum(each.cka(other) for each in shuffled) / SHUFFLES,
                    mutual_knn=one.overlap(other),
                    mutual_knn_shuffled=sum(each.overlap(other) for each in shuffled) / SHUFFLES,
                )
            )
    return rows


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one block contributes to both measures: its centred Gram matrix, of norm 1, and who is near to whom."""

    gram: Float[Tensor, "n n"]
    near: Bool[Tensor, "n n"]

    @classmethod
    def of(cls, features: Float[Tensor, "n _"], neighbours: int) -> _Prepared:
        centred = features.double() - features.double().mean(dim=0)
        gram = centred @ centred.T
        nearest = nearest_rows(features, neighbours)
        near = torch.zeros(gram.shape, dtype=torch.bool).scatter_(1, nearest, True)
        norm = gram.norm()
        return cls(gram / norm if norm > 0 else torch.full_like(gram, math.nan), near)

    def in_order(self, order: Int[Tensor, " n"]) -> _Prepared:
        """The same features with their rows in another order."""
        return _Prepared(self.gram[order][:, order], self.near[order][:, order])

    def cka(self, other: _Prepared) -> float:
        return float(self.gram.flatten() @ other.gram.flatten())

    def overlap(self, other: _Prepared) -> float:
        return int((self.near & other.near).sum()) / int(self.near.sum())
