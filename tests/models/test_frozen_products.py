"""Products of frozen layers in a step in bfloat16: those of autocast, bitwise or to rounding, and nothing is saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clasp.models.frozen_casts import FrozenCasts
from clasp.models.frozen_products import frozen_feed_forward, frozen_products
from clasp.models.low_rank_forward import project_together

X = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))


def layers(*, bias: bool = True) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(48, 32 + 16 * n, bias=bias) for n in range(2)]).requires_grad_(False)


def run(call, lower: bool = True) -> tuple[list[Tensor], Tensor, int]:
    """Outputs, the gradient of the input, and the bytes saved for it."""
    x, kept = X.clone().requires_grad_(), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.detach(), lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=lower),
    ):
        outputs = call(x)
    (gradient,) = torch.autograd.grad(sum(out.float().square().sum() for out in outputs), x)
    return [out.detach().float() for out in outputs], gradient, sum(t.nbytes for t in kept if t.ndim == 2)


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_autocast(bias: bool) -> None:
    given = layers(bias=bias)
    exact, autocast = (run(lambda x: [layer(x) for layer in given], lower) for lower in (False, True))
    with FrozenCasts(given)():
        ours = run(lambda x: project_together(x, tuple(given)))
    for one, other, whole in zip((*ours[0], ours[1]), (*autocast[0], autocast[1]), (*exact[0], exact[1]), strict=True):
        assert (one - other).norm() <= 0.01 * other.norm() and (one - whole).norm() <= 0.01 * whole.norm()


def test_the_feed_forward_part_is_that_of_its_layers() -> None:
    given = nn.ModuleList([nn.Linear(48, 96), nn.Linear(96, 48)]).requires_grad_(False)
    plain = run(lambda x: [given[1](nn.functional.gelu(given[0](x)))])
    with FrozenCasts(given)():
        ours = run(lambda x: [frozen_feed_forward(x, *given)])
    for one, other in zip((*ours[0], ours[1]), (*plain[0], plain[1]), strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
    assert ours[2] == 3 * 7 * 96 * 2, "the input of GELU alone is kept"


@pytest.mark.parametrize("change", ["outside", "float32", "trained", "a trained bias", "a hook", "a subclass"])
def test_other_layers_are_called(change: str) -> None:
    given = layers()
    first = given[0]
    if change == "trained":
        first.requires_grad_(True)
    elif change == "a trained bias":
        first.bias.requires_grad_(True)
    elif change == "a hook":
        first.register_forward_hook(lambda *_: None)
    elif change == "a subclass":
        given[0] = type("Scaled", (nn.Linear,), {})(48, 32).requires_grad_(False)
    casts = FrozenCasts(given)
    with torch.autocast("cpu", torch.bfloat16, enabled=change != "float32"):
        if change != "outside":
            with casts():
                assert frozen_products(X, tuple(given)) is None
        else:
            assert frozen_products(X, tuple(given)) is None
