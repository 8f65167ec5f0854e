"""Mutual k-nearest neighbours and the similarity of layers: by hand, against the plain measures, and at chance."""

from __future__ import annotations

import math

import pytest
import torch

from clasp.analysis.layer_similarity import layer_similarity
from clasp.analysis.similarity import linear_cka, mutual_knn


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def test_mutual_neighbours_by_hand():
    x = directions(0, 10, 90, 100)  # nearest: 1, 0, 3, 2
    y = directions(0, 90, 10, 100)  # nearest: 2, 3, 0, 1
    assert mutual_knn(x, x * 7, 1) == 1
    assert mutual_knn(x, y, 1) == 0
    assert mutual_knn(x, directions(0, 10, 20, 90), 1) == 0.5  # nearest: 1, 0 or 2, 1, 2
    assert mutual_knn(x, y, 3) == 1, "all others are neighbours"


def test_mutual_neighbours_of_unrelated_features_are_at_chance():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 20, generator=generator), torch.randn(300, 30, generator=generator)
    assert mutual_knn(x, y, 10) == pytest.approx(10 / 299, abs=0.01)


def test_layers_are_compared_as_the_plain_measures_do():
    generator = torch.Generator().manual_seed(1)
    image = {1: torch.randn(40, 6, generator=generator), 2: torch.randn(40, 9, generator=generator)}
    text = {1: image[1] @ torch.randn(6, 5, generator=generator), 2: torch.randn(40, 4, generator=generator)}
    rows = layer_similarity(image, text, neighbours=5)
    assert [(row.image_block, row.text_block) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in rows:
        one, other = image[row.image_block], text[row.text_block]
        assert row.cka == pytest.approx(linear_cka(one, other))
        assert row.mutual_knn == pytest.approx(mutual_knn(one, other, 5))
    related = rows[0]
    assert related.cka > 2 * related.cka_shuffled and related.mutual_knn > 2 * related.mutual_knn_shuffled
    for row in rows[1:]:
        assert row.mutual_knn == pytest.approx(row.mutual_knn_shuffled, abs=0.1)
    assert all(abs(row.mutual_knn_shuffled - 5 / 39) < 0.05 for row in rows)


def test_constant_features_have_no_cka():
    row = layer_similarity({1: torch.ones(9, 3)}, {1: torch.randn(9, 3)}, neighbours=2)[0]
    assert math.isnan(row.cka) and math.isnan(row.cka_shuffled)
