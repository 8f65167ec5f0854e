"""The geometry of embeddings: each number worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from clasp.analysis.embedding_geometry import (
    alignment,
    effective_rank,
    embedding_geometry,
    modality_gap,
    uniformity,
)

AXES = torch.eye(2)


def test_modality_gap_by_hand():
    assert modality_gap(AXES, -AXES) == pytest.approx(math.sqrt(2))  # the means are (½, ½) and (-½, -½)
    assert modality_gap(AXES, AXES.flip(0)) == 0


def test_alignment_by_hand():
    assert alignment(AXES, AXES) == 0
    assert alignment(AXES, AXES.flip(0)) == 2  # orthogonal unit vectors
    assert alignment(AXES, -AXES) == 4


def test_uniformity_by_hand():
    assert uniformity(torch.ones(3, 2) / math.sqrt(2)) == pytest.approx(0)
    assert uniformity(AXES) == pytest.approx(-4)  # one pair of rows, at squared distance 2
    square = torch.cat((AXES, -AXES))  # four pairs at squared distance 2, two at 4
    assert uniformity(square) == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6))


def test_effective_rank_by_hand():
    square = torch.cat((AXES, -AXES))  # centred, singular values √2 and √2
    assert effective_rank(square) == pytest.approx(2)
    assert effective_rank(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(1)
    stretched = square * torch.tensor([3.0, 1.0])  # shares ¾ and ¼
    assert effective_rank(stretched) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(square + 5) == pytest.approx(2), "the mean is not a dimension"
    assert math.isnan(effective_rank(torch.ones(4, 3)))


def test_cosines_of_pairs_and_of_non_pairs():
    geometry = embedding_geometry(AXES, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert geometry.pair_cosine == pytest.approx((0.6 + 1) / 2)
    assert geometry.non_pair_cosine == pytest.approx((0 + 0.8) / 2)


def test_independent_directions_are_uniform_and_without_a_gap():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(400, 256, generator=generator), dim=1) for _ in range(2))
    geometry = embedding_geometry(image, text)
    assert geometry.image_uniformity == pytest.approx(-4, abs=0.1)
    assert abs(geometry.pair_cosine) < 0.02 and abs(geometry.non_pair_cosine) < 0.01
    assert geometry.alignment == pytest.approx(2 - 2 * geometry.pair_cosine)
    assert geometry.image_effective_rank > 200
