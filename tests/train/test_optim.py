"""The optimizer against worked answers: who decays, how far a step goes, and that its state returns to its names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clasp.train import optim
from clasp.types import UserError


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("image.blocks.0.mlp.fc1.weight", (8, 4), True),
        ("image.stem.conv.weight", (8, 3, 3, 3), True),
        ("image.blocks.0.adapter.low.weight", (1, 4), True),  # one row, but a matrix
        ("image.relative_position_bias_table", (49, 12), True),
        ("image.blocks.0.mlp.fc1.bias", (8,), False),
        ("image.attention.bias", (8, 8), False),
        ("image.norm1.weight", (8,), False),
        ("text.layer.0.LayerNorm.weight", (8, 8), False),  # a norm over two axes
        ("image.grn.weight", (1, 1, 1, 8), False),
        ("image.cls_token", (1, 1, 8), False),
        ("image.blocks.0.ls1.gamma", (8,), False),
        ("log_scale", (), False),
    ],
)
def test_decay_by_name_and_shape(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert optim.decays(name, shape) is expected


def toy() -> nn.ModuleDict:
    model = nn.ModuleDict({"tower": nn.Linear(3, 4), "head": nn.Linear(4, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    return model


SELECTION = frozenset({"tower.weight", "tower.bias", "head.weight", "head.bias"})


def test_groups_hold_the_selection_once_and_the_longest_prefix_decides() -> None:
    weights = optim.selected(dict(toy().named_parameters()), SELECTION)
    groups = optim.groups(weights, weight_decay=0.1, lr_factors={"tower.": 0.5, "tower.b": 0.25})
    assert sorted(name for group in groups for name in group.names) == sorted(SELECTION)
    found = {name: (group.weight_decay, group.lr_factor) for group in groups for name in group.names}
    assert found == {
        "tower.weight": (0.1, 0.5),
        "tower.bias": (0.0, 0.25),
        "head.weight": (0.1, 1.0),
        "head.bias": (0.0, 1.0),
    }
    assert all(
        weights[name] is parameter for g in groups for name, parameter in zip(g.names, g.parameters, strict=True)
    )


def test_selection_must_be_what_gets_gradients() -> None:
    named = dict(toy().named_parameters())
    with pytest.raises(AssertionError, match=r"disagree on \['head.bias'\]"):
        optim.selected(named, SELECTION - {"head.bias"})
    with pytest.raises(AssertionError, match="not in the model"):
        optim.selected(named, SELECTION | {"nothing"})


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    weights = optim.selected(dict(model.named_parameters()), SELECTION)
    groups = optim.groups(weights, weight_decay=0.1, lr_factors={"tower.": 0.5})
    return optim.adamw(groups, lr=0.1, betas=(0.9, 0.99), eps=0.0, device=torch.device("cpu"))


def test_first_step_is_lr_times_factor_plus_decay() -> None:
    """With eps 0 the first AdamW step is exactly lr times the sign of the gradient, after the decay."""
    model = toy()
    optimizer = optimizer_of(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter) if name in SELECTION else None
    optim.set_lr(optimizer, 0.2)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["head.weight"], before["head.weight"] * (1 - 0.2 * 0.1) - 0.2)
    torch.testing.assert_close(after["head.bias"], before["head.bias"] - 0.2)
    torch.testing.assert_close(after["tower.weight"], before["tower.weight"] * (1 - 0.1 * 0.1) - 0.1)
    assert torch.equal(after["frozen.weight"], before["frozen.weight"])


def test_warmup_and_cosine_by_hand() -> None:
    factors = [optim.warmup_cosine(step, steps=8, warmup=4, floor=0.0) for step in range(9)]
    half = 0.5**0.5
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert factors == pytest.approx(expected)
    assert optim.warmup_cosine(8, steps=8, warmup=0, floor=0.2) == pytest.approx(0.2)
    assert optim.warmup_cosine(4, steps=8, warmup=0, floor=0.2) == pytest.approx(0.6)
    assert optim.warmup_cosine(0, steps=1, warmup=0) == 1.0
    assert optim.warmup_cosine(0, steps=1, warmup=1) == 1.0


def stepped(model: nn.Module, optimizer: torch.optim.AdamW, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def test_state_returns_to_its_names_bitwise() -> None:
    model, other = toy(), toy()
    optimizer, another = optimizer_of(model), optimizer_of(other)
    stepped(model, optimizer, 1)
    weights = optim.selected(dict(model.named_parameters()), SELECTION)
    saved = {key: tensor.clone() for key, tensor in optim.state(optimizer, weights).items()}
    assert sorted(saved) == sorted(f"{name}/{slot}" for name in SELECTION for slot in ("exp_avg", "exp_avg_sq", "step"))
    other.load_state_dict(model.state_dict())
    # the order of the tensors must not matter, only their names
    shuffled = dict(sorted(saved.items(), reverse=True))
    optim.restore(another, optim.selected(dict(other.named_parameters()), SELECTION), shuffled)
    stepped(model, optimizer, 2)
    stepped(other, another, 2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True))
    untouched = optim.state(optimizer, weights)["head.weight/step"]
    assert untouched.item() == 2.0 and shuffled["head.weight/step"].item() == 1.0, "restored state must be a copy"


def test_state_of_another_selection_is_refused() -> None:
    model = toy()
    weights = optim.selected(dict(model.named_parameters()), SELECTION)
    with pytest.raises(UserError, match=r"'other.weight', which this recipe does not train"):
        optim.restore(optimizer_of(model), weights, {"other.weight/exp_avg": torch.zeros(1)})


def test_fused_equals_plain_to_rounding() -> None:
    model, other = toy(), toy()
    other.load_state_dict(model.state_dict())
    fused = optimizer_of(model)
    assert fused.defaults["fused"]
    plain = torch.optim.AdamW(
        [
            {"params": [other["tower"].weight], "weight_decay": 0.1, "lr": 0.05},
            {"params": [other["tower"].bias], "weight_decay": 0.0, "lr": 0.05},
            {"params": [other["head"].weight], "weight_decay": 0.1, "lr": 0.1},
            {"params": [other["head"].bias], "weight_decay": 0.0, "lr": 0.1},
        ],
        betas=(0.9, 0.99),
        eps=0.0,
        foreach=False,
    )
    for seed in range(3):
        stepped(model, fused, seed)
        stepped(other, plain, seed)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
