"""What is put into a tower, where it is put to work: in bfloat16, and in blocks that are computed twice."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from clasp.models.frozen_casts import FrozenCasts
from clasp.models.tower import Tower
from clasp.models.tuning.spec import freeze_except
from clasp.types import UserError
from toytowers import NETS, base, inputs

METHODS = (
    "adapters",
    "adapters(place='input')",
    "prompts(3)",
    "deep(1)",
    "lora(rank=2, targets='all')",
    "dora(rank=2)",
)


@cache
def tuned(name: str, method: str) -> Tower:
    """A tower with a part in it that is no longer at its start: there, half of its gradients would be zeros.

    One for all that leave its parameters as they are.
    """
    tower = Tower(base(name))
    try:
        names = tower.tune([method], seed=0)
    except UserError:
        pytest.skip("this family cannot be tuned so")
    freeze_except(tower, names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return tower


def gradients(tower: Tower, name: str) -> dict[str, Tensor]:
    tower.zero_grad()
    tower.pooled(inputs(name)).float().square().sum().backward()
    return {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16(name: str, method: str):
    tower = tuned(name, method)
    exact, whole = gradients(tower, name), tower.pooled(inputs(name)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        half = tower.pooled(inputs(name)).detach().float()
        rounded = gradients(tower, name)
    assert (half - whole).norm() < 0.03 * whole.norm()
    assert rounded.keys() == exact.keys() == {n for n, p in tower.named_parameters() if p.requires_grad}
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    one, other = (torch.cat([g.flatten() for g in each.values()]) for each in (exact, rounded))
    assert (one - other).norm() < 0.1 * one.norm()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_cast_once_are_those_of_autocast(name: str, method: str):
    tower = tuned(name, method)
    casts = FrozenCasts(tower)
    before = {n: (p.data_ptr(), p.dtype) for n, p in tower.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(tower, name)
        for _ in range(2):
            with casts():
                ours = gradients(tower, name)
            assert all(torch.equal(gradient, ours[n]) for n, gradient in theirs.items())
    assert {n: (p.data_ptr(), p.dtype) for n, p in tower.named_parameters()} == before


def test_only_frozen_products_are_cast():
    def cast(method: str) -> set[str]:
        tower = tuned("vit", method)
        with FrozenCasts(tower)():
            return {n for n, p in tower.named_parameters() if p.dtype == torch.bfloat16}

    frozen, low_rank, dora = cast("adapters"), cast("lora(rank=2, targets='all')"), cast("dora(rank=2)")
    assert frozen and not any("norm" in n or "adapter" in n or "embeddings.position" in n for n in frozen)
    assert any("base_layer" in n for n in low_rank) and not any("lora_" in n for n in low_rank)
    assert dora and not any("base_layer" in n for n in dora), "its norm is that of the float32 weight"


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_in_blocks_that_are_computed_twice(name: str, method: str):
    tower = tuned(name, method)
    again = copy.deepcopy(tower)
    again.enable_activation_checkpointing()
    once, twice = gradients(tower, name), gradients(again, name)
    assert once.keys() == twice.keys()
    assert all(torch.equal(gradient, twice[n]) for n, gradient in once.items())
