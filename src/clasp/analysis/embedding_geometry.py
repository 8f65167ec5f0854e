"""The geometry of the joint embedding space: modality gap, alignment, uniformity, effective rank, cosines.

Input: unit vectors of images and texts, row i of both of one pair; every other combination of rows is a non-pair.
Output: Python floats, computed in float64. Note: values depend on the number of pairs, the effective rank most; compare
models on the same pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingGeometry:
    """The measures of one set of pairs; each is explained at the function that computes it."""

    modality_gap: float
    pair_cosine: float
    """mean cosine similarity of an image and its text"""
    non_pair_cosine: float
    """mean cosine similarity of an image and the text of another pair"""
    alignment: float
    image_uniformity: float
    text_uniformity: float
    image_effective_rank: float
    text_effective_rank: float


def embedding_geometry(image: Float[Tensor, "B E"], text: Float[Tensor, "B E"]) -> EmbeddingGeometry:
    """All measures of these pairs; at least two pairs."""
    count = len(image)
    assert count == len(text) > 1, f"{count} images and {len(text)} texts"
    image, text = image.double(), text.double()
    cosines = image @ text.T
    return EmbeddingGeometry(
        modality_gap=modality_gap(image, text),
        pair_cosine=float(cosines.diagonal().mean()),
        non_pair_cosine=float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))),
        alignment=alignment(image, text),
        image_uniformity=uniformity(image),
        text_uniformity=uniformity(text),
        image_effective_rank=effective_rank(image),
        text_effective_rank=effective_rank(text),
    )


def modality_gap(image: Float[Tensor, "B E"], text: Float[Tensor, "B E"]) -> float:
    """Euclidean distance between the mean image and the mean text embedding, 0 to 2 (Liang et al., NeurIPS 2022)."""
    return float((image.double().mean(dim=0) - text.double().mean(dim=0)).norm())


def alignment(image: Float[Tensor, "B E"], text: Float[Tensor, "B E"]) -> float:
    """Mean squared distance of the two vectors of a pair, 0 (equal) to 4 (Wang & Isola, ICML 2020, section 4.1.1, with
    alpha = 2); the positives are image and text instead of two views."""
    return float((image.double() - text.double()).square().sum(dim=1).mean())


def uniformity(vectors: Float[Tensor, "B E"]) -> float:
    """Log of the mean of ``exp(-2 d²)`` over all pairs of different rows, ``d`` their distance: 0 where all are equal,
    lower where they are spread more evenly, -4 for independent directions in many dimensions (Wang & Isola, ICML 2020,
    section 4.1.2, with t = 2)."""
    squared = torch.pdist(vectors.double()).square()
    return float((-2 * squared).exp().mean().log())


def effective_rank(vectors: Float[Tensor, "B E"]) -> float:
    """``exp(H(p))``, ``H`` the entropy of the singular values divided by their sum (Roy & Vetterli, EUSIPCO 2007,
    definition 1). Ours is of centred columns, so that the mean vector is not counted as a dimension: at most
    ``min(B - 1, E)``. NaN where all rows are equal."""
    rows = vectors.double()
    singular = torch.linalg.svdvals(rows - rows.mean(dim=0))
    if singular[0] <= 1e-12 * rows.norm():
        return math.nan
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())
