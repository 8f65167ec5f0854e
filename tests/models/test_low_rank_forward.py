"""LoRA with its update added in a product: peft's layer, to rounding in bfloat16 and bitwise in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clasp.models.low_rank_forward import LowRankForward, project_together
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


# --- layers of one input ---------------------------------------------------------------------------------------------

RANKS = {"query": 4, "key": 4, "value": 2}


def three_layers() -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.ModuleDict({name: nn.Linear(48, 32, bias=name != "value") for name in RANKS})
        for name, rank in RANKS.items():
            inject_peft(net, "lora", [name], {"rank": rank, "alpha": 2 * len(name)})
        for parameter in net.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return net


def run_three(net: nn.ModuleDict, *, together: bool, lower: bool = True, needs_input: bool = True) -> list[Tensor]:
    """Outputs, and the gradients of the input, of A and of B."""
    x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1)).requires_grad_(needs_input)
    layers = list(net.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=lower):
        outputs = project_together(x, layers) if together else [type(layer).forward(layer, x) for layer in layers]
    weights = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
    sum((each.float() * weights.roll(place, -1)).sum() for place, each in enumerate(outputs)).backward()
    found = [*(each.detach() for each in outputs), x.grad, *(p.grad for p in net.parameters())]
    net.zero_grad()
    return [each for each in found if each is not None]


def test_queries_keys_and_values_share_the_products_of_their_input() -> None:
    net = three_layers()
    exact = run_three(net, together=False, lower=False)
    theirs, ours = run_three(net, together=False), run_three(net, together=True)
    assert len(ours) == 3 + 1 + 6 and [each.dtype for each in ours] == [each.dtype for each in theirs]
    for one, other, whole in zip(ours, theirs, exact, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
        assert (one - whole).norm() <= 0.01 * whole.norm()
    first_block = run_three(net, together=True, needs_input=False)
    assert all(torch.equal(*each) for each in zip(first_block, [*ours[:3], *ours[4:]], strict=True))
    plain, in_float32 = exact, run_three(net, together=True, lower=False)
    assert all(torch.equal(*each) for each in zip(plain, in_float32, strict=True)), "float32 is peft's, bitwise"


@pytest.mark.parametrize("change", ["a trained bias", "a hook", "dropout", "a plain layer"])
def test_layers_that_cannot_share_are_called(change: str) -> None:
    net = three_layers()
    key: Any = net["key"]
    seen: list[str] = []
    if change == "a trained bias":
        key.base_layer.bias.requires_grad_(True)
    elif change == "a hook":
        key.register_forward_hook(lambda *_: seen.append("key"))
    elif change == "dropout":
        key.lora_dropout["default"] = nn.Dropout(0.5).eval()
    else:
        net["key"] = key.base_layer
    x = torch.randn(3, 7, 48)
    with torch.autocast("cpu", torch.bfloat16):
        together, apart = project_together(x, list(net.values())), [layer(x) for layer in net.values()]
    assert all(torch.equal(*each) for each in zip(together, apart, strict=True))
    assert len(seen) == (2 if change == "a hook" else 0)
    sum(each.float().sum() for each in together).backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)
