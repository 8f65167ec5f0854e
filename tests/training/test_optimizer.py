"""The optimizer against worked answers: who decays, how far a step goes, and that its state returns to its names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clasp.training import optimizer as optim
from clasp.training.settings import TrainSettings
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
def test_matrices_decay_by_name_and_shape(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert optim.DECAY_FILTERS["matrices"](name, shape) is expected


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("temp", (), True),
        ("image.cls_token", (1, 1, 8), True),
        ("image.pos_embed", (1, 17, 8), True),
        ("text.position_embeddings.weight", (32, 8), True),
        ("image.blocks.0.attn.qkv.weight", (24, 8), True),
        ("image.blocks.0.norm1.weight", (8,), False),
        ("image.blocks.0.attn.qkv.bias", (24,), False),
        ("image.attention.bias", (8, 8), False),
    ],
)
def test_lilt_spares_flat_vectors_and_biases_only(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert optim.DECAY_FILTERS["lilt"](name, shape) is expected


def test_every_row_is_a_choice_of_the_settings() -> None:
    for name in optim.DECAY_FILTERS:
        assert TrainSettings(decay_filter=name).decay_filter == name
    for name in optim.SCHEDULES:
        assert TrainSettings(schedule=name).schedule == name


def toy() -> nn.ModuleDict:
    model = nn.ModuleDict({"tower": nn.Linear(3, 4), "head": nn.Linear(4, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    return model


SELECTION = frozenset({"tower.weight", "tower.bias", "head.weight", "head.bias"})


def test_groups_hold_the_selection_once_each_with_its_factor() -> None:
    weights = optim.select_parameters(dict(toy().named_parameters()), SELECTION)
    factors = {"tower.weight": 0.5, "tower.bias": 0.25, "frozen.weight": 9.0}
    groups = optim.build_parameter_groups(weights, weight_decay=0.1, lr_factors=factors)
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
        optim.select_parameters(named, SELECTION - {"head.bias"})
    with pytest.raises(AssertionError, match="not in the model"):
        optim.select_parameters(named, SELECTION | {"nothing"})


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    weights = optim.select_parameters(dict(model.named_parameters()), SELECTION)
    groups = optim.build_parameter_groups(
        weights, weight_decay=0.1, lr_factors={"tower.weight": 0.5, "tower.bias": 0.5}
    )
    return optim.build_adamw(groups, lr=0.1, betas=(0.9, 0.99), eps=0.0, device=torch.device("cpu"))


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


def test_lilt_decay_of_a_scale_moves_it_though_its_gradient_is_zero() -> None:
    scale = nn.Parameter(torch.tensor(2.0))
    for decay, expected in (("lilt", 2.0 * (1 - 0.2 * 0.1)), ("matrices", 2.0)):
        groups = optim.build_parameter_groups({"log_scale": scale}, weight_decay=0.1, decay_filter=decay)
        optimizer = optim.build_adamw(groups, lr=0.2, betas=(0.9, 0.99), eps=1e-8, device=torch.device("cpu"))
        scale.data.fill_(2.0)
        scale.grad = torch.tensor(0.0)
        optimizer.step()
        assert scale.item() == pytest.approx(expected)


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    return optim.SCHEDULES["cosine"](step, optim.ScheduleContext(steps, 1, warmup, floor))


def test_warmup_and_cosine_by_hand() -> None:
    factors = [warmup_cosine(step, steps=8, warmup=4) for step in range(9)]
    half = 0.5**0.5
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert factors == pytest.approx(expected)
    assert warmup_cosine(8, steps=8, warmup=0, floor=0.2) == pytest.approx(0.2)
    assert warmup_cosine(4, steps=8, warmup=0, floor=0.2) == pytest.approx(0.6)
    assert warmup_cosine(0, steps=1, warmup=0) == 1.0
    assert warmup_cosine(0, steps=1, warmup=1) == 1.0


def lilt(step: int, epochs: int = 15, steps_an_epoch: int = 1155) -> float:
    """LilT's learning rate, in units of 1e-5: lr 1e-4 with floor 0.1, on COCO unless said otherwise."""
    return 10 * optim.SCHEDULES["lilt"](step, optim.ScheduleContext(epochs * steps_an_epoch, epochs, 7, 0.1))


def test_lilt_climbs_ten_stairs_and_holds_to_the_end_of_the_epoch() -> None:
    assert lilt(0) == pytest.approx(1.0)
    for stair in range(10):  # the learning rate moves after steps 100, 200, ... have been taken
        edge = 100 * (stair + 1)
        assert lilt(edge) == pytest.approx(1.0 + 0.9 * stair) and lilt(edge + 1) == pytest.approx(1.9 + 0.9 * stair)
    rates = [lilt(step) for step in range(1155)]
    assert rates == sorted(rates) and len(set(rates)) == 11 and set(rates[1001:]) == {10.0}


def test_lilt_then_falls_once_an_epoch_as_published() -> None:
    published = "9.90 9.61 9.14 8.51 7.75 6.89 5.97 5.03 4.11 3.25 2.49 1.86 1.39 1.10"  # e = 1 to 14
    first, last = ([f"{lilt(1155 * epoch + at):.2f}" for epoch in range(1, 15)] for at in (0, 1154))
    assert first == last == published.split()


def test_a_short_first_epoch_cuts_the_warm_up_of_lilt_and_nothing_else() -> None:
    assert [f"{lilt(step, 3, 250):.2f}" for step in (0, 101, 249, 250, 500, 749)] == [
        "1.00", "1.90", "2.80", "7.75", "3.25", "3.25"
    ]  # fmt: skip
    assert [f"{lilt(step, 4, 1):.2f}" for step in range(4)] == ["1.00", "8.68", "5.50", "2.32"]


def stepped(model: nn.Module, optimizer: torch.optim.AdamW, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def test_state_returns_to_its_names_bitwise() -> None:
    model, other = toy(), toy()
    optimizer, another = optimizer_of(model), optimizer_of(other)
    stepped(model, optimizer, 1)
    weights = optim.select_parameters(dict(model.named_parameters()), SELECTION)
    saved = {key: tensor.clone() for key, tensor in optim.optimizer_state(optimizer, weights).items()}
    assert sorted(saved) == sorted(f"{name}/{slot}" for name in SELECTION for slot in ("exp_avg", "exp_avg_sq", "step"))
    other.load_state_dict(model.state_dict())
    # the order of the tensors must not matter, only their names
    shuffled = dict(sorted(saved.items(), reverse=True))
    optim.load_optimizer_state(another, optim.select_parameters(dict(other.named_parameters()), SELECTION), shuffled)
    stepped(model, optimizer, 2)
    stepped(other, another, 2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True))
    untouched = optim.optimizer_state(optimizer, weights)["head.weight/step"]
    assert untouched.item() == 2.0 and shuffled["head.weight/step"].item() == 1.0, "restored state must be a copy"


def test_state_returns_with_the_strides_of_its_parameter() -> None:
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "device": torch.device("cpu")}
    gradients = [torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last) for _ in range(2)]

    def stepped(optimizer: torch.optim.AdamW, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient.clone()
        optimizer.step()

    first = optim.build_adamw(optim.build_parameter_groups({"kernel": kernel}, weight_decay=0.0), **options)
    stepped(first, kernel, gradients[0])
    written = {name: t.contiguous().clone() for name, t in optim.optimizer_state(first, {"kernel": kernel}).items()}
    copy = nn.Parameter(kernel.detach().clone())
    second = optim.build_adamw(optim.build_parameter_groups({"kernel": copy}, weight_decay=0.0), **options)
    optim.load_optimizer_state(second, {"kernel": copy}, written)
    stepped(first, kernel, gradients[1])
    stepped(second, copy, gradients[1])
    assert torch.equal(kernel, copy)


def test_state_of_another_selection_is_refused() -> None:
    model = toy()
    weights = optim.select_parameters(dict(model.named_parameters()), SELECTION)
    with pytest.raises(UserError, match=r"'other.weight', which this recipe does not train"):
        optim.load_optimizer_state(optimizer_of(model), weights, {"other.weight/exp_avg": torch.zeros(1)})


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
