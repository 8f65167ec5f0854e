"""Unit length: the rows and gradients of ``F.normalize``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clasp.models.heads import to_unit_length


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows, the last of them zero, and a gradient."""
    rows, gradient = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    rows[-1] = 0
    return rows.to(dtype), gradient


def test_float32_is_bit_by_bit_that_of_torch() -> None:
    rows, gradient = example(torch.float32)
    found = []
    for normalize in (to_unit_length, lambda x: F.normalize(x, dim=-1)):
        x = rows.clone().requires_grad_()
        unit = normalize(x)
        unit.backward(gradient)
        found.append((unit, x.grad))
    assert all(map(torch.equal, *found))


def test_gradients_of_bfloat16_are_those_of_autograd_within_rounding() -> None:
    rows, gradient = example(torch.bfloat16)
    ours, theirs, exact = rows.clone().requires_grad_(), rows.clone().requires_grad_(), rows.double().requires_grad_()
    unit = to_unit_length(ours)
    unit.backward(gradient)
    F.normalize(theirs.float(), dim=-1).backward(gradient)
    F.normalize(exact, dim=-1).backward(gradient.double())
    assert unit.dtype == torch.float32 and torch.equal(unit, F.normalize(rows.float(), dim=-1))
    assert ours.grad is not None and theirs.grad is not None and exact.grad is not None
    assert ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.01, atol=1e-4)
    assert (ours.grad - exact.grad)[:-1].norm() <= 1.05 * (theirs.grad - exact.grad)[:-1].norm()
