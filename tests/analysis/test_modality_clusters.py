"""Clusters of two modalities: apart and mixed by hand, mutual information beside scikit-learn's, blocks in common."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from clasp.analysis.modality_clusters import modality_clusters, mutual_information, two_means


def states(seed: int, *, at: float = 0.0) -> torch.Tensor:
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(seed)) + at


def test_modalities_apart_are_one_and_mixed_ones_are_none():
    apart, mixed = states(0, at=4), states(1, at=-4)
    rows = modality_clusters({1: apart, 2: states(2), 3: states(3)}, {1: mixed, 2: states(4), 3: states(3)})
    assert [row.block for row in rows] == [1, 2, 3]
    assert rows[0].nmi == pytest.approx(1)
    assert rows[1].nmi < 0.1 and rows[2].nmi == pytest.approx(0), "equal states cannot be told apart"
    assert all(0 <= row.nmi_shuffled < 0.05 for row in rows)


def test_blocks_of_other_widths_and_towers_of_other_depths_are_left_out():
    wide = torch.randn(60, 12)
    assert [row.block for row in modality_clusters({1: states(0), 2: states(1)}, {1: wide, 2: states(2)})] == [2]
    deeper = {0: states(3), 1: states(4), 2: states(5)}
    assert [row.block for row in modality_clusters({0: states(0), 1: states(1)}, deeper)] == [0]
    assert modality_clusters({1: states(0)}, {2: states(0)}) == []


def test_mutual_information_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9):
        one = (torch.rand(80, generator=generator) < share).long()
        other = torch.where(torch.rand(80, generator=generator) < 0.7, one, 1 - one)
        assert mutual_information(one, other) == pytest.approx(normalized_mutual_info_score(one, other))
    assert mutual_information(torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0, 1])) == 0


def test_the_clusters_are_those_of_least_squares():
    """Beside every way to part nine points."""
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(5)).double()

    def spread(cluster: torch.Tensor) -> float:
        parts = [points[cluster == number] for number in (0, 1)]
        return sum(float((part - part.mean(dim=0)).square().sum()) for part in parts if len(part))

    every = [torch.tensor([code >> row & 1 for row in range(9)]) for code in range(1, 256)]
    found = two_means(points, torch.Generator().manual_seed(0))
    assert spread(found) == pytest.approx(min(map(spread, every)))
    assert two_means(torch.ones(5, 2), torch.Generator().manual_seed(0)).unique().numel() == 1
