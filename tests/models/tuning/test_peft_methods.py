"""Low-rank updates: several of them in one tower, with counts to the unit, and a start from the gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import nn

from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tuning.peft_methods import PEFT_METHODS, initialize_lora_from_gradient, wrapped_layers
from clasp.models.tuning.spec import apply_tuning, freeze_except, gradient_initialized_layers
from clasp.types import UserError
from toymethods import SEVERAL
from toytowers import NETS, base, inputs


def linears(net: nn.Module, path: str) -> list[nn.Module]:
    """Linear layers and 1x1 convolutions below a path, found by hand."""
    return [
        m
        for m in net.get_submodule(path).modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1)
    ]


# --- several in one tower --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_ranks_by_block_count_to_the_unit(name: str):
    """rank * (in + out) for each layer, whatever the family: another rank in the first block than above it."""
    untouched, net = base(name).net, base(name).net
    names = apply_tuning(
        net, ["lora(rank=1, blocks=':1', targets='all')", "lora(rank=3, blocks='1:', targets='all')"], seed=0
    )
    expected = 0
    for number, block in enumerate(find_structure(untouched).blocks):
        expected += sum((3 if number else 1) * sum(m.weight.shape[:2]) for m in linears(untouched, block.path))
    trained = {n: p for n, p in net.named_parameters() if n in names}
    assert sum(p.numel() for p in trained.values()) == expected
    assert all(n.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for n in trained)
    first = find_structure(net).blocks[0].path + "."
    ranks = {(n.startswith(first), p.shape[0]) for n, p in trained.items() if ".lora_A." in n}
    assert ranks == {(True, 1), (False, 3)}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("methods", SEVERAL, ids=" ".join)
def test_several_are_as_good_as_one(name: str, methods: Sequence[str]):
    """The tower begins as what it was; the selection, and nothing else, gets gradients; the list's order is nothing."""
    tower, other = Tower(base(name)), Tower(base(name))
    given = inputs(name)
    with torch.no_grad():
        before = tower.pooled(given)
    try:
        names = tower.tune(methods, seed=0)
    except UserError as refused:
        assert "matches nothing" in str(refused)  # no attention, or no MLP that the family names
        pytest.skip(str(refused))
    assert other.tune(methods[::-1], seed=0) == names
    assert all(torch.equal(p, q) for p, q in zip(tower.parameters(), other.parameters(), strict=True))
    freeze_except(tower, names)
    after = tower.pooled(given)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    after.square().sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is not None} == names


def test_halora_ranks():
    """Ranks 1 1 1 1 1 1 3 3 3 3 3 3 of HALoRA's image tower, 3 1 1 1 1 1 1 3 3 3 3 3 of its text tower."""
    image = ["lora(rank=1, blocks=':6')", "lora(rank=3, blocks='6:')"]
    text = ["lora(rank=3, blocks='0')", "lora(rank=1, blocks='1:7')", "lora(rank=3, blocks='7:')"]
    for methods, ranks in ((image, [1] * 6 + [3] * 6), (text, [3] + [1] * 6 + [3] * 5)):
        net = base("bert").net
        net.encoder.layer.extend([copy.deepcopy(net.encoder.layer[0]) for _ in range(10)])
        net.config.num_hidden_layers = 12
        names = apply_tuning(net, methods, seed=0)
        shapes = {n: p.shape for n, p in net.named_parameters() if n in names and ".lora_A." in n}
        found = [{s[0] for n, s in shapes.items() if n.startswith(f"encoder.layer.{i}.")} for i in range(12)]
        assert found == [{rank} for rank in ranks]
        assert sum(p.numel() for n, p in net.named_parameters() if n in names) == sum(ranks) * 4 * (32 + 32)


@cache
def bottleneck_shapes(name: str, place: str) -> dict[str, torch.Size]:
    """Of bottlenecks alone; empty where the family refuses them."""
    net = base(name).net
    try:
        return {n: net.get_parameter(n).shape for n in apply_tuning(net, [f"adapters(place='{place}')"], seed=0)}
    except UserError:
        return {}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("place", "method"), [("input", "lora"), *(("output", method) for method in PEFT_METHODS)])
def test_bottlenecks_are_the_same_beside_any_of_them(name: str, place: str, method: str):
    """As wide as without, and at the end of a branch behind what the method adds to its last layer."""
    shapes, net = bottleneck_shapes(name, place), base(name).net
    if not shapes:
        pytest.skip("this family has no known places for bottlenecks")
    names = apply_tuning(net, [f"adapters(place='{place}')", f"{method}(targets='all')"], seed=0)
    assert {n: net.get_parameter(n).shape for n in names if ".adapter" in n} == shapes
    assert not any(m._forward_hooks for n, m in net.named_modules() if n.endswith(".base_layer"))


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (["lora(rank=1)", "lora(rank=3, blocks='1:')"], r"1\.attention.* is wrapped by another method already"),
        (["lora(rank=1)", "ia3"], "is wrapped by another method already"),
        (["lora(targets='all')", "oft(targets='mlp', blocks=0)"], "is wrapped by another method already"),
        (["adapters", "adapters(place='input', blocks='1:')"], r"1 is given adapters twice"),
        (["prompts(2)", "prompts(3)"], "prompts: given twice"),
    ],
)
@pytest.mark.parametrize("name", ["vit", "bert", "distilbert"])
def test_two_in_one_place_are_refused(name: str, methods: list[str], says: str):
    for order in (methods, methods[::-1]):
        with pytest.raises(UserError, match=says) as refused:
            apply_tuning(base(name).net, order, seed=0)
        assert "\n" not in str(refused.value)


# --- a start from the gradient ---------------------------------------------------------------------------------------


def test_which_layers_start_from_the_gradient():
    net = base("bert").net
    methods = ["norms", "ia3(targets='mlp')", "lora(blocks='1:', init='gradient')", "dora(blocks=':1')"]
    apply_tuning(net, methods, seed=0)
    found = gradient_initialized_layers(net, methods)
    assert len(found) == 4 and all(path.startswith("encoder.layer.1.attention.") for path in found)
    assert set(found) < wrapped_layers(net)
    assert gradient_initialized_layers(base("bert").net, ["norms", "adapters"]) == []


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_a_takes_the_largest_directions_at_its_own_length(method: str):
    """Of a gradient made by hand: 5 along the sum of inputs 0 and 1, 3 along input 7, 1 along input 2."""
    net = base("vit").net
    apply_tuning(net, [f"{method}(rank=2, init='gradient')"], seed=0)
    path = "layers.1.attention.q_proj"
    a = net.get_parameter(f"{path}.lora_A.default.weight")
    drawn, rest = a.detach().clone(), {n: p.detach().clone() for n, p in net.named_parameters() if p is not a}
    gradient = torch.zeros(32, 32)
    gradient[4, :2], gradient[9, 7], gradient[0, 2] = 5 / 2**0.5, -3.0, 1.0
    initialize_lora_from_gradient(net, path, gradient)
    directions = torch.zeros(2, 32)
    directions[0, :2], directions[1, 7] = 0.5**0.5, 1.0
    torch.testing.assert_close(a.abs(), directions * drawn.norm() / 2**0.5, rtol=1e-5, atol=1e-6)
    assert a[0, 0] * a[0, 1] > 0, "the sum of both, not their difference"
    assert all(torch.equal(p, rest[n]) for n, p in net.named_parameters() if n in rest), "and nothing else moved"


def test_a_rank_above_that_of_the_gradient_keeps_what_it_drew():
    net = base("convnext").net
    apply_tuning(net, ["lora(rank=24, init='gradient')"], seed=0)
    path = next(path for path in sorted(wrapped_layers(net)) if path.endswith("pwconv1"))
    a = net.get_parameter(f"{path}.lora_A.default.weight")
    drawn, width = a.detach().clone(), a.shape[1]
    assert width < 24
    initialize_lora_from_gradient(net, path, torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(a[:width].norm(), drawn[:width].norm())
    assert torch.equal(a[width:], drawn[width:]) and not torch.equal(a[:width], drawn[:width])


def test_a_convolution_starts_so_too():
    net = base("efficientnet").net
    apply_tuning(net, ["lora(rank=2, targets='all', init='gradient')"], seed=0)
    path = next(path for path in sorted(wrapped_layers(net)) if "project_conv" in path)
    a = net.get_parameter(f"{path}.lora_A.default.weight")
    gradient = torch.zeros_like(net.get_parameter(f"{path}.base_layer.weight"))
    gradient[3, 1], gradient[2, 4] = 2.0, 1.0
    length = a.norm()
    initialize_lora_from_gradient(net, path, gradient)
    assert a.ndim == 4 and {int(row.argmax()) for row in a.flatten(1).abs()} == {1, 4}
    torch.testing.assert_close(a.norm(), length)
