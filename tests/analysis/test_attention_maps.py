"""Attention maps beside an obvious walk through the net; nothing stays on it, and nothing changes in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clasp.analysis.attention_maps import attention_maps
from clasp.models.tower import Tower
from clasp.models.tuning.spec import freeze_except
from clasp.types import Pixels, Tokens, UserError
from toytowers import IMAGE_NETS, OURS, base, inputs


def given(name: str) -> Pixels | Tokens:
    return inputs(name if name in IMAGE_NETS else "bert")


def walked(tower: Tower, read: Pixels | Tokens) -> list[Tensor]:
    """The attention maps of every block, by hand."""
    net: Any = tower.net
    mask = read.mask if isinstance(read, Tokens) else None
    if isinstance(read, Tokens):
        x = net.token_map(net.token_embed(read.ids)) + net.pos_embed[:, : read.ids.shape[1]]
    else:
        x = net.patch_embed(read.values)
        cls = net.cls_token.expand(len(x), -1, -1)
        own = net.settings.class_position
        x = torch.cat((cls, x), 1) + net.pos_embed if own else torch.cat((cls, x + net.pos_embed), 1)
    x = net.norm_pre(x)
    found: list[Tensor] = []
    for block in net.blocks:
        gammas = [1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2)]
        seen = block.norm1(x) if block.norm_position == "pre" else x
        found.append(block.attn.attention_weights(seen, mask))
        x = x + gammas[0] * block.attn(seen, mask)
        if block.norm_position == "pre":
            x = x + gammas[1] * block.mlp(block.norm2(x))
        else:
            x = block.norm1(x)
            x = block.norm2(x + gammas[1] * block.mlp(x))
    torch.testing.assert_close(net.norm(x), tower(read))
    return found


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@pytest.mark.parametrize("name", OURS)
def test_maps_are_those_of_the_attention(name: str):
    tower, read = Tower(base(name)), given(name)
    first = 1 if name == "own-stem" else 0  # a stem is layer 0
    with torch.no_grad():
        before = tower(read)
        maps = attention_maps(tower.net, lambda: tower(read))
        assert [*maps] == [*range(first, first + 2)]
        for one, other in zip(maps.values(), walked(tower, read), strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(tower(read), before)
    for each in maps.values():
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))


def test_a_map_made_by_hand():
    """Two tokens, one head, queries and keys that are the states: the map is a softmax of their products."""
    tower = Tower(base("own-text"))
    net: Any = tower.net
    block = net.blocks[0]
    with torch.no_grad():
        block.attn.qkv.weight.copy_(torch.eye(32).repeat(3, 1))
        block.attn.qkv.bias.zero_()
        read = Tokens(torch.tensor([[5, 9]]), torch.ones(1, 2, dtype=torch.bool))
        states = net.token_map(net.token_embed(read.ids)) + net.pos_embed[:, :2]
        first, second = block.norm1(net.norm_pre(states))[0, :, :16]  # of the first of two heads
        seen = attention_maps(net, lambda: tower(read))[0][0, 0]
    scores = torch.stack([first @ second, second @ second]) / 4
    torch.testing.assert_close(seen, torch.stack([torch.tensor([1.0, 0.0]), scores.softmax(0)]))


def replaced_forwards(net: nn.Module) -> dict[str, object]:
    """The modules whose ``forward`` is not that of their class, as that of low-rank layers."""
    return {name: vars(module)["forward"] for name, module in net.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("name", OURS)
def test_nothing_stays_on_the_net(name: str):
    tower, read = Tower(base(name)), given(name)
    tower.tune(["adapters", "lora(rank=2)", "prompts(2)"], seed=0)
    were, state = hooks(tower.net), {n: t.clone() for n, t in tower.state_dict().items()}
    replaced = replaced_forwards(tower.net)
    with torch.no_grad():
        before = tower(read)
        attention_maps(tower.net, lambda: tower(read))
        assert hooks(tower.net) == were
        assert torch.equal(tower(read), before)

        def broken() -> None:
            tower(read)
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            attention_maps(tower.net, broken)
        assert hooks(tower.net) == were
    assert all(torch.equal(tensor, state[n]) for n, tensor in tower.state_dict().items())
    assert replaced_forwards(tower.net) == replaced


@pytest.mark.parametrize("name", OURS)
def test_what_tuning_put_in_is_seen(name: str):
    tower, read = Tower(base(name)), given(name)
    plain = attention_maps(tower.net, lambda: tower(read))
    names = tower.tune(["adapters", "lora(rank=2)", "prompts(2)"], seed=0)
    with torch.no_grad():
        for each in names:
            tower.get_parameter(each).add_(0.3)
        maps = attention_maps(tower.net, lambda: tower(read))
    for layer, each in maps.items():
        tokens = plain[layer].shape[-1]
        assert each.shape[-2:] == (tokens + 2, tokens + 2)
        assert not torch.allclose(each[:, :, 2:, 2:], plain[layer])
    assert tower(read).shape[1] == tokens, "prompts are taken out at the end"


def test_layers_below_a_cut_are_left_out():
    tower, read = Tower(base("own-image")), given("own-image")
    with torch.no_grad():
        freeze_except(tower, [])
        assert tower.frozen_blocks == 2  # the first who asks makes the net run
        left = tower.prefix_states(read, 1)
        assert [*attention_maps(tower.net, lambda: tower(left))] == [1]


def test_a_net_that_runs_twice_is_a_mistake_of_ours():
    tower, read = Tower(base("own-image")), given("own-image")
    with pytest.raises(AssertionError, match="once, not 2 times"):
        attention_maps(tower.net, lambda: [tower(read), tower(read)])
    with pytest.raises(AssertionError, match="once, not 0 times"):
        attention_maps(tower.net, lambda: None)


def test_a_foreign_net_is_refused():
    with pytest.raises(UserError, match=r"BertModel is not a native encoder.*to_native converts"):
        attention_maps(base("bert").net, lambda: None)
