"""Bottleneck adapters as one function under autocast: the plain layers' output bitwise, their gradients to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clasp.models.tuning.bottleneck import Adapter


def adapter(*, channels_first: bool = False) -> Adapter:
    """One that is no longer at its start, where half of its gradients would be zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Adapter(32, 8, "random", channels_first)
        for parameter in made.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape)
    return made


def plain(made: Adapter, x: Tensor) -> Tensor:
    return x + made.up(F.gelu(made.down(x)))


def gradients(made: Adapter, x: Tensor, out: Tensor) -> list[Tensor]:
    """Those of the input and of the four parameters."""
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    found = torch.autograd.grad((out.float() * weights).sum(), [x, *made.parameters()])
    return list(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_under_autocast_it_is_the_plain_layers(dtype: torch.dtype) -> None:
    made = adapter()
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    exact = gradients(made, whole := x.detach().float().requires_grad_(), plain(made, whole))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = made(x), plain(made, x)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    for one, other, right in zip(gradients(made, x, ours), gradients(made, x, theirs), exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 0.01 * other.norm()
        assert (one - right).norm() <= 0.02 * right.norm()


def test_without_gradients_it_computes_the_same() -> None:
    """Both passes of gradient caching."""
    made, x, outputs = adapter(), torch.randn(2, 5, 32), []
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode, torch.autocast("cpu", torch.bfloat16):
            outputs.append(made(x).detach())
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_it_keeps_less() -> None:
    """Its input and the output of the first layer; not that of GELU."""

    def kept(run: Tensor) -> int:
        return sum(size.numel() for size in run.grad_fn.saved_tensors)  # type: ignore[union-attr]

    made = adapter()
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(made(x)) == 64 * 32 + 64 * 8 + 2 * 32 * 8


def test_layers_that_are_watched_are_called() -> None:
    made, seen = adapter(channels_first=True), []
    made.up.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.randn(2, 32, 3, 3)).shape == (2, 32, 3, 3)
    assert seen == [(2, 3, 3, 8 * 4)]


def test_its_output_may_be_changed_in_place() -> None:
    """As nets of one's own do after a residual branch."""
    made, x = adapter(), torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        made(x).add_(1).sum().backward()
    assert x.grad is not None
