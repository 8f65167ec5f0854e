"""Linear CKA and relative change: numbers worked by hand, what they must not see, and what leaves them undefined."""

from __future__ import annotations

import math

import pytest
import torch

from clasp.analysis.similarity import linear_cka, relative_change


def test_cka_by_hand():
    # X'X = diag(2, 2), Y'Y = 2, X'Y = (2, 0): 4 / (√8 · 2)
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert linear_cka(x, x[:, :1]) == pytest.approx(1 / math.sqrt(2))
    assert linear_cka(torch.tensor([[1.0], [0], [-1]]), torch.tensor([[1.0], [-2], [1]])) == 0


@pytest.mark.parametrize("shape", [(50, 7), (7, 50)], ids=["many inputs", "many features"])
def test_cka_of_equal_states_is_exactly_one(shape: tuple[int, int]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert linear_cka(x, x.clone()) == 1.0


@pytest.mark.parametrize("n", [9, 40])
def test_cka_sees_no_rotation_no_scale_and_no_shift(n: int):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 20, generator=generator), torch.randn(n, 12, generator=generator)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    assert linear_cka(x @ turn * 3 + 5, x) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x @ turn * 3 + 5, y) == pytest.approx(linear_cka(x, y), abs=1e-6)


def test_cka_is_that_of_the_kernel_matrices():
    """Slow and obvious: centre both kernels, then their cosine."""
    generator = torch.Generator().manual_seed(2)
    for n in (6, 30):
        x, y = torch.randn(n, 10, generator=generator).double(), torch.randn(n, 15, generator=generator).double()
        centre = torch.eye(n, dtype=torch.float64) - 1 / n
        k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
        assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))


def test_cka_of_constant_states_is_undefined():
    assert math.isnan(linear_cka(torch.ones(4, 3), torch.randn(4, 3)))
    assert math.isnan(linear_cka(torch.ones(1, 3), torch.ones(1, 3)))


def test_relative_change_by_hand():
    before = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    after = [torch.tensor([3.0]), torch.tensor([[3.0, 0.0]])]
    assert relative_change(before, after) == 1.0  # |(0, 3, -4)| / |(3, 0, 4)|
    assert relative_change(before, before) == 0.0


def test_relative_change_from_nothing():
    zero, one = [torch.zeros(2)], [torch.ones(2)]
    assert relative_change(zero, zero) == 0.0
    assert math.isnan(relative_change(zero, one))
    assert math.isnan(relative_change([], []))
