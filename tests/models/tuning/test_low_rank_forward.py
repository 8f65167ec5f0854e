"""LoRA with its update added in a product: peft's layer, to rounding in bfloat16 and bitwise in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clasp.models.tuning.low_rank_forward import LowRankForward
from clasp.models.tuning.peft_methods import inject_peft


def layer(method: str = "lora", **options: Any) -> nn.Sequential:
    """A wrapped layer whose update is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(48, 32))
        inject_peft(net, method, ["0"], {"rank": 4, **options})
        for parameter in net.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape)
    return net.eval()


def as_in_peft(net: nn.Sequential) -> nn.Sequential:
    net = copy.deepcopy(net)
    vars(net[0]).pop("forward", None)
    return net


def run(net: nn.Module, *, lower: bool, seed: int = 1) -> list[Tensor]:
    """The output and the gradients of input, A and B."""
    torch.manual_seed(seed)
    x = torch.randn(3, 7, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=lower):
        out = net(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = [out.detach(), x.grad, *(p.grad for name, p in net.named_parameters() if "lora_" in name)]
    net.zero_grad()
    return [each for each in found if each is not None]


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_in_bfloat16_it_is_peft_within_rounding(method: str) -> None:
    net = layer(method)
    exact, theirs = run(as_in_peft(net), lower=False), run(as_in_peft(net), lower=True)
    ours = run(net, lower=True)
    assert len(ours) == 4 and [each.dtype for each in ours] == [each.dtype for each in theirs]
    for one, other, whole in zip(ours, theirs, exact, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
        assert (one - whole).norm() <= 0.01 * whole.norm()


def test_in_float32_it_is_peft_bitwise() -> None:
    net = layer()
    assert isinstance(vars(net[0])["forward"], LowRankForward)
    assert all(
        torch.equal(*each) for each in zip(run(net, lower=False), run(as_in_peft(net), lower=False), strict=True)
    )


@pytest.mark.parametrize("lower", [False, True], ids=["float32", "autocast"])
def test_with_and_without_gradients_it_computes_the_same(lower: bool) -> None:
    """Both passes of gradient caching; and inference, where the product is in place."""
    net, x = layer(), torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))
    outputs = []
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=lower):
            outputs.append(net(x).detach())
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_dropout_is_on_the_update_only() -> None:
    net = layer(lora_dropout=0.5).train()
    ours, theirs = run(net, lower=True), run(as_in_peft(net), lower=True)
    assert all((one - other).norm() <= 0.01 * other.norm() for one, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], run(net.eval(), lower=True)[0])


def test_a_deep_copy_runs_its_own_layer() -> None:
    net = layer()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not run(other, lower=True)[0].any() and run(net, lower=True)[0].any()


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_other_layers_of_peft_are_left_alone(options: dict[str, bool]) -> None:
    assert "forward" not in vars(layer(**options)[0])
