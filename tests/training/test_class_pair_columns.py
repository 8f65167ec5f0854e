"""Columns that a classifier does not read are predicted from those that it reads."""

from __future__ import annotations

import torch

from clasp.training.class_pairs import _whole_rows
from clasp.training.moments import PairMoments

PATTERN = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def moments(images: torch.Tensor) -> PairMoments:
    return PairMoments.of([(images, torch.zeros(len(images), 1))])


def test_a_linear_column_is_recovered_and_a_random_one_is_not():
    read = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))
    images = torch.cat([noise, read, 2 * read[:, :1] - read[:, 1:] + 5], dim=1)  # a mean of 5 is no slope
    rows = _whole_rows(PATTERN, slice(1, 3), moments(images), 1e-4)
    assert torch.equal(rows[:, 1:3], PATTERN)
    torch.testing.assert_close(rows[:, 3], 2 * PATTERN[:, 0] - PATTERN[:, 1], rtol=1e-3, atol=1e-3)
    assert rows[:, 0].abs().max() < 0.2
    assert _whole_rows(PATTERN, slice(1, 3), moments(images), 1e6).abs()[:, [0, 3]].max() < 0.1


def test_nothing_changes_where_the_classifier_reads_every_column():
    assert _whole_rows(PATTERN, slice(0, 2), moments(torch.randn(9, 2)), 1.0) is PATTERN
