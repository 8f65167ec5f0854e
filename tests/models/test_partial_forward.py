"""A tower cut anywhere and put together again is the tower, for every family, every depth and both kinds of inputs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from clasp.models.length_buckets import optimal_bucket_bounds, split_by_length
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tuning.spec import freeze_except
from clasp.training.memory import ActivationMemory
from clasp.types import HiddenStates, Pixels, Tokens, UserError
from toytowers import IMAGE_NETS, NETS, TEXT_NETS, base, inputs

CUTTABLE = [name for name in NETS if name != "t5"]


def blocks(tower: Tower) -> int:
    return len(find_structure(tower.net).blocks)


@pytest.mark.parametrize("name", CUTTABLE)
def test_going_on_from_the_trunk_is_the_whole_tower_bitwise(name: str):
    tower, read = Tower(base(name)), inputs(name)
    freeze_except(tower, [])
    assert tower.frozen_blocks == blocks(tower)
    with torch.no_grad():
        whole = tower(read)
        for depth in range(1, blocks(tower) + 1):
            left = tower.prefix_states(read, depth)
            assert (left.depth, left.size) == (depth, 32 if name in IMAGE_NETS else 0)
            assert torch.equal(tower(left), whole), depth
            assert torch.equal(tower(read), whole), "the net is as it was"


@pytest.mark.parametrize("name", CUTTABLE)
@pytest.mark.parametrize(
    "method", ["last(1)", "deep(1)", "adapters(blocks='-1:')", "norms(blocks='-1:')", "lora(blocks='-1:')"]
)
def test_the_gradient_from_the_cut_is_that_of_the_whole(name: str, method: str):
    tower = Tower(base(name))
    try:
        names = tower.tune([method], seed=0)
    except UserError:
        pytest.skip("this family cannot be tuned so")
    freeze_except(tower, names)
    depth = tower.frozen_blocks
    assert depth == blocks(tower) - 1
    read = inputs(name, rows=4)
    gradients = []
    for given in (read, tower.prefix_states(read, depth)):
        tower.zero_grad()
        tower.pooled(given).square().sum().backward()
        gradients.append({n: p.grad for n, p in tower.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == names
    for one, other in zip(*(g.values() for g in gradients), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CUTTABLE)
def test_nothing_below_the_cut_is_kept_for_backward(name: str):
    """Autograd keeps no activation of the trunk: as much as when the trunk's states are given."""
    tower = Tower(base(name))
    freeze_except(tower, tower.tune(["last(1)"], seed=0))
    read = inputs(name)
    left = tower.prefix_states(read, tower.frozen_blocks)
    assert not left.values.requires_grad
    assert kept_bytes(tower, read) == pytest.approx(kept_bytes(tower, left), rel=0.01)  # masks and other crumbs
    freeze_except(tower, tower.tune(["full"], seed=0))
    assert kept_bytes(tower, read) > kept_bytes(tower, left)


def kept_bytes(tower: Tower, given: Pixels | Tokens | HiddenStates) -> int:
    with ActivationMemory(tower.parameters()) as kept:
        out = tower.pooled(given)
    assert out.requires_grad
    return kept.bytes


@pytest.mark.parametrize(
    ("method", "depth"),
    [
        *[("none", 2), ("last(1)", 1), ("last(2)", 0), ("deep(1)", 2), ("norms", 0), ("norms(blocks='1:')", 1)],
        *[("lora(blocks='1:')", 1), ("prompts", 0), ("match('layernorm.*')", 2), ("match('embeddings.*')", 0)],
    ],
)
def test_the_cut_lies_below_everything_that_trains(method: str, depth: int):
    tower = Tower(base("vit"))
    freeze_except(tower, tower.tune([method], seed=0))
    assert tower.frozen_blocks == depth
    assert tower.fully_frozen == (method == "none")


def test_a_net_that_hands_on_more_than_states_is_not_cut():
    tower = Tower(base("t5"))
    freeze_except(tower, tower.tune(["last(1)"], seed=0))
    assert tower.frozen_blocks == 0


def test_what_states_depend_on_has_its_own_fingerprint():
    one, other = Tower(base("vit")), Tower(base("deit"))
    prints = {tower.prefix_fingerprint(depth) for tower in (one, other) for depth in (1, 2)}
    assert len(prints) == 4
    assert Tower(base("vit"), pool="cls").prefix_fingerprint(1) in prints, "pooling comes after the trunk"


# --- more layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IMAGE_NETS, *TEXT_NETS])
def test_more_layers_stand_beside_the_last(name: str):
    one, more = Tower(base(name)), Tower(base(name), extra_layers=[1])
    read = inputs(name)
    with torch.no_grad():
        last, both = one.pooled(read), more.pooled(read)
    assert both.shape == (2, more.width) and more.width > one.width
    assert torch.equal(both[:, : one.width], last)
    if name == "t5":
        return
    with torch.no_grad():
        early = one.prefix_states(read, 1)
    expected = (early.values * early.mask[..., None]).sum(1) / early.mask.sum(1)[:, None]
    if name in TEXT_NETS:
        torch.testing.assert_close(both[:, one.width :], expected)
    freeze_except(more, [])
    assert more.frozen_blocks == 1, "the first block's states are read"
    with torch.no_grad():
        torch.testing.assert_close(more.pooled(more.prefix_states(read, 1)), both)


def test_more_layers_that_are_not_there():
    with pytest.raises(UserError, match=r"extra_layers = \[2\]: vit has 2 blocks, .* choose from 1 to 1, or -1 to -1"):
        Tower(base("vit"), extra_layers=[2])


# --- captions of like length -----------------------------------------------------------------------------------------


def test_parts_are_the_cheapest_of_all():
    """Against every way of cutting."""
    lengths = [9, 9, 7, 4, 4, 4, 2, 1]

    def cost(bounds: list[int], call: int) -> int:
        return sum((end - start) * lengths[start] + call for start, end in pairwise(bounds))

    every = [[0, *(n + 1 for n in range(7) if mask >> n & 1), 8] for mask in range(128)]
    for call in (0, 1, 3, 10, 1000):
        assert cost(optimal_bucket_bounds(lengths, call), call) == min(cost(bounds, call) for bounds in every)
    assert optimal_bucket_bounds(lengths, 1000) == [0, 8] and optimal_bucket_bounds([5, 5, 5], 0) == [0, 3]


@pytest.mark.parametrize("name", TEXT_NETS)
def test_a_text_tower_in_parts_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    tower = Tower(base(name))
    ids = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([3, 9, 1, 9, 4, 3])[:, None]
    tokens = Tokens(ids * mask, mask, rows=torch.tensor([5, 0, 1, 1, 2, 3, 4, 0]))
    calls = []
    tower.net.register_forward_pre_hook(
        lambda net, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        whole = tower.pooled(tokens)
        assert calls == [(6, 9)], "six short captions are not worth a second call"
        calls.clear()
        monkeypatch.setattr("clasp.models.length_buckets.TOKENS_PER_CALL", {"cpu": 0})
        parts = tower.pooled(tokens)
    assert calls == [(2, 9), (1, 4), (2, 3), (1, 1)]
    torch.testing.assert_close(parts, whole)
    one_by_one = torch.cat(
        [tower.pooled(Tokens(ids[r : r + 1, :n], mask[r : r + 1, :n])) for r, n in enumerate(mask.sum(1))]
    )
    torch.testing.assert_close(whole, one_by_one[tokens.rows])


def test_states_are_cut_to_their_lengths_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clasp.models.length_buckets.TOKENS_PER_CALL", {"cpu": 0})
    tower, read = Tower(base("bert")), inputs("bert", rows=4)
    freeze_except(tower, tower.tune(["last(1)"], seed=0))
    left = tower.prefix_states(read, 1)
    parts, back = split_by_length(replace(left, rows=torch.tensor([0, 0])))
    assert [part.values.shape[:2] for part in parts] == [(2, 7), (2, 4)] and back is not None
    with torch.no_grad():
        torch.testing.assert_close(tower.pooled(left), tower.pooled(read))


def test_a_net_that_trains_is_called_as_often(monkeypatch: pytest.MonkeyPatch):
    """Gradients of a tower in parts are those of the tower in one."""
    tower, read = Tower(base("bert")), inputs("bert", rows=4)
    freeze_except(tower, tower.tune(["full"], seed=0))
    gradients = []
    for call in (0, 1000):
        monkeypatch.setattr("clasp.models.length_buckets.TOKENS_PER_CALL", {"cpu": call})
        tower.zero_grad()
        tower.pooled(read).square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.net.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_blocks_keep_their_own_forward():
    tower = Tower(base("vit"))
    freeze_except(tower, [])
    left = tower.prefix_states(inputs("vit"), 1)
    with pytest.raises(RuntimeError):
        tower(replace(left, values=left.values[..., :5]))
    assert not any("forward" in vars(module) for module in tower.net.modules() if isinstance(module, nn.Module))
