"""The way between a base and a tuned tower: exact at both ends, straight between, and refused where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clasp.analysis.weight_drift import measure_drift, merge_drift
from clasp.analysis.weight_interpolation import WeightInterpolation, interpolation_obstacles
from clasp.models.tower import Tower
from clasp.models.tuning.spec import freeze_except
from toytowers import base, inputs

BRANCHED = ("deit3", "conv_branch(before=(1,))")
TOWERS = ("vit", "convnext", "efficientnet", "bert", "llama")
WITH_A_WAY = (
    "full", "norms", "biases", "attention", "mlp", "last(1)", "match('*.1.*')", "adapters", "adapters(init='random')",
    "adapters(place='input')", "lora(rank=2)", "lora(rank=2, targets='all')", "rslora(rank=2)", "ia3", "loha(rank=2)",
    "lokr(rank=2)",
)  # fmt: skip
WITHOUT = {
    "deep(1)": "1 appended block",
    "deep(2)": "2 appended blocks",
    "prompts(3)": "prompts",
    "dora(rank=2)": "dora",
    "oft": "oft",
    "hra(rank=2)": "hra",
}
CANNOT = {  # the tower rightly refuses the method
    *((cnn, "attention") for cnn in ("convnext", "efficientnet")),
    ("efficientnet", "mlp"),
    ("efficientnet", "adapters(place='input')"),
    ("llama", "biases"),
}


def tuned(name: str, *specs: str) -> Tower:
    """A tower whose trained parameters are all somewhere else than they started."""
    tower = Tower(base(name))
    chosen = tower.tune(specs, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in tower.named_parameters():
        parameter.requires_grad_(parameter_name in chosen)
        if parameter_name in chosen:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tower


@torch.no_grad()
def said(tower: Tower, name: str) -> torch.Tensor:
    return tower.pooled(inputs(name))


@pytest.mark.parametrize(
    ("name", "spec"),
    [(name, spec) for name in TOWERS for spec in WITH_A_WAY if (name, spec) not in CANNOT] + [BRANCHED],
)
def test_both_ends_are_exact(name: str, spec: str):
    own, tower = Tower(base(name)), tuned(name, spec)
    at_rest = said(tower, name)
    assert interpolation_obstacles(tower, own) == []
    way = WeightInterpolation(tower, own)
    assert not way.is_identity
    with way.at(0.0):
        assert torch.equal(said(tower, name), said(own, name))
    with way.at(0.5):
        between = said(tower, name)
    with way.at(1.0):
        assert torch.equal(said(tower, name), at_rest)
    assert torch.equal(said(tower, name), at_rest)
    assert not torch.equal(between, at_rest) and not torch.equal(between, said(own, name))


def test_methods_together():
    own, tower = Tower(base("vit")), tuned("vit", "adapters", "norms", "lora(rank=2)")
    with WeightInterpolation(tower, own).at(0.0):
        assert torch.equal(said(tower, "vit"), said(own, "vit"))


def test_a_way_comes_back_after_an_error():
    own, tower = Tower(base("vit")), tuned("vit", "full")
    at_rest = said(tower, "vit")
    with pytest.raises(RuntimeError, match="on the way"), WeightInterpolation(tower, own).at(0.25):
        raise RuntimeError("on the way")
    assert torch.equal(said(tower, "vit"), at_rest)


def test_weights_are_interpolated():
    """WiSE-FT's equation, by hand."""
    own, tower = Tower(base("bert")), tuned("bert", "full")
    then = {name: p.detach().clone() for name, p in own.named_parameters()}
    now = {name: p.detach().clone() for name, p in tower.named_parameters()}
    with WeightInterpolation(tower, own).at(0.25):
        for name, parameter in tower.named_parameters():
            torch.testing.assert_close(parameter.data, 0.75 * then[name] + 0.25 * now[name])


@pytest.mark.parametrize("spec", ["lora(rank=2)", "rslora(rank=2)", "loha(rank=2)", "lokr(rank=2)"])
def test_what_is_added_to_a_weight_grows_in_proportion(spec: str):
    own, tower = Tower(base("vit")), tuned("vit", spec)
    layers = [m for m in tower.net.modules() if type(m).__name__ == "Linear" and type(m).__module__.startswith("peft")]
    layers += [m for m in tower.net.modules() if type(m).__module__.startswith("peft.tuners.lo") and _adds(m)]
    assert layers
    way = WeightInterpolation(tower, own)
    added = []
    for alpha in (0.25, 1.0):
        with way.at(alpha):
            added.append([m.get_delta_weight("default").detach().clone() for m in layers])
    for quarter, full in zip(*added, strict=True):
        torch.testing.assert_close(quarter, full / 4)
        assert full.abs().max() > 0


def _adds(module: torch.nn.Module) -> bool:
    return callable(vars(type(module)).get("get_delta_weight"))


def test_nothing_tuned_is_no_way_to_go():
    assert WeightInterpolation(tuned("vit", "none"), Tower(base("vit"))).is_identity


@pytest.mark.parametrize(("spec", "reason"), WITHOUT.items())
def test_methods_without_a_way_say_so(spec: str, reason: str):
    assert interpolation_obstacles(tuned("vit", spec, "norms"), Tower(base("vit"))) == [reason]


def test_statistics_that_move_are_no_way():
    tower = Tower(replace(base("own-stem"), from_seed=True))
    freeze_except(tower, tower.tune(["full"], seed=0))
    assert interpolation_obstacles(tower, Tower(base("own-stem"))) == ["running statistics of BatchNorm"]


# --- drift -----------------------------------------------------------------------------------------------------------


def test_untouched_towers_have_not_moved():
    for part in measure_drift(tuned("vit", "none"), Tower(base("vit"))):
        assert part.change == 0 and part.new_fraction == 0


@pytest.mark.parametrize("name", TOWERS)
def test_every_parameter_is_in_one_part(name: str):
    own, tower = Tower(base(name)), tuned(name, "lora(rank=2, targets='all')", "norms")
    parts = measure_drift(tower, own)
    assert sum(len(part.after) + len(part.new) for part in parts) == len(list(tower.parameters()))
    assert [part.title for part in parts[1:-1]] == [f"block {n}" for n in range(1, len(parts) - 1)]
    assert len(merge_drift(parts).before) == len(list(own.parameters()))


def test_drift_by_hand():
    """One block's norms are doubled; the other parts stay."""
    own, tower = Tower(base("vit")), tuned("vit", "none")
    block = tower.net.get_submodule("layers.1")
    with torch.no_grad():
        block.layernorm_before.weight.mul_(2)
    moved = own.net.get_parameter("layers.1.layernorm_before.weight").detach().norm()
    size = torch.cat([p.detach().flatten() for p in own.net.get_submodule("layers.1").parameters()]).norm()
    changes = {part.title: part.change for part in measure_drift(tower, own)}
    assert changes.pop("block 2") == pytest.approx(float(moved / size), rel=1e-5)
    assert set(changes) == {"input", "block 1", "output"} and not any(changes.values())


def test_new_parts_are_told_apart():
    own, tower = Tower(base("vit")), tuned("vit", "adapters", "deep(1)")
    parts = {part.title: part for part in measure_drift(tower, own)}
    new = sum(p.numel() for p in tower.parameters()) - sum(p.numel() for p in own.parameters())
    assert sum(p.numel() for part in parts.values() for p in part.new) == new
    assert parts["block 3"].new_fraction == 1 and not parts["block 3"].before
    assert 0 < parts["block 1"].new_fraction < 1 and parts["block 1"].change == 0
