"""Patch dropout: the tower with dropped patches is the masked tower, exactly so many stay; what cannot is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clasp.models.backbone import Backbone
from clasp.models.patch_dropout import PatchDropout
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.transformer.blocks import Attention
from clasp.models.transformer.encoders import ImageTransformer, init_weights
from clasp.models.transformer.settings import ImageTransformerSettings, ParallelBranchSettings
from clasp.models.tuning.spec import freeze_except
from clasp.models.zoo.registry import load_backbone
from clasp.types import HiddenStates, Pixels, UserError
from toyfamilies import save_family
from toytowers import base, inputs

VALID = ["vit", "deit", "dinov2", "clip-image", "siglip-image", "beit", "deit3", "own-image", "own-stem"]
PREFIX = {"deit": 2, "siglip-image": 0}
PATCHES = 16
ALIKE = dict(rtol=1e-5, atol=1e-6)


def tower_of(backbone: Backbone, method: str = "full", rate: float = 0.5, pool: str = "mean") -> Tower:
    tower = Tower(backbone, pool=pool)
    freeze_except(tower, tower.tune([method], seed=0))
    tower.enable_patch_dropout(rate)
    return tower.train()


def drawn(rows: int, kept: int, prefix: int) -> Tensor:
    """The indices of the tokens that stay after ``torch.manual_seed``, class tokens included."""
    chosen = torch.rand(rows, PATCHES).argsort(dim=1)[:, :kept].sort(dim=1).values + prefix
    return torch.cat((torch.arange(prefix).expand(rows, -1), chosen), dim=1)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize(("method", "first"), [("full", 0), ("last(1)", 1)])
def test_it_is_the_tower_with_the_dropped_patches_masked(
    name: str, method: str, first: int, monkeypatch: pytest.MonkeyPatch
):
    """The slow obvious way: all tokens, of which those dropped are no keys of any attention and are not pooled."""
    tower, images, prefix = tower_of(base(name), method), inputs(name, rows=3), PREFIX.get(name, 1)
    torch.manual_seed(5)
    ours = tower.pooled(images)
    torch.manual_seed(5)
    index = drawn(3, PATCHES // 2, prefix)
    keys = torch.zeros(3, prefix + PATCHES, dtype=torch.bool).scatter(1, index, True)
    calls = []

    def masked(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        scores = query @ key.mT * (options.get("scale") or query.shape[-1] ** -0.5)
        if len(calls) >= first:
            scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
        calls.append(name)
        return scores.softmax(-1) @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    states = tower(images)
    assert len(calls) == 2
    kept = states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))
    torch.testing.assert_close(ours, tower.pool(kept, torch.ones(kept.shape[:2], dtype=torch.bool)), **ALIKE)


@pytest.mark.parametrize("name", VALID)
def test_cached_states_of_the_frozen_prefix_lose_the_same_patches(name: str):
    tower, images = tower_of(base(name), "last(1)"), inputs(name, rows=3)
    cached = tower.prefix_states(images, tower.frozen_blocks)
    assert isinstance(cached, HiddenStates) and cached.depth == 1
    assert cached.values.shape[1] == PATCHES + PREFIX.get(name, 1), "the cache has all of them"
    torch.manual_seed(5)
    live = tower.pooled(images)
    torch.manual_seed(5)
    assert torch.equal(tower.pooled(cached), live)


def test_only_training_drops_and_every_draw_is_another():
    plain, images = Tower(base("vit")), inputs("vit")
    tower = tower_of(base("vit"))
    assert not torch.equal(tower.pooled(images), tower.pooled(images))
    state = torch.random.get_rng_state()
    tower.eval()
    assert torch.equal(tower.pooled(images), plain.pooled(images))
    assert torch.equal(torch.random.get_rng_state(), state), "and draws nothing"
    assert not any(module._forward_pre_hooks for module in tower.net.modules()), "the net is as it was"
    assert tower.state_dict().keys() == plain.state_dict().keys() and tower.fingerprint == plain.fingerprint
    twin = copy.deepcopy(tower).train()
    torch.manual_seed(1)
    one = twin.pooled(images)
    torch.manual_seed(1)
    assert torch.equal(tower.train().pooled(images), one)


@pytest.mark.parametrize(("rate", "kept"), [(0.01, 16), (0.25, 12), (0.5, 8), (0.9, 2), (0.99, 1)])
def test_as_many_stay_in_every_image(rate: float, kept: int, monkeypatch: pytest.MonkeyPatch):
    tower = tower_of(base("vit"), rate=rate)
    seen, pool = [], tower.pool
    monkeypatch.setattr(tower, "pool", lambda states, mask: (seen.append(tuple(states.shape)), pool(states, mask))[1])
    tower.pooled(inputs("vit", rows=5))
    assert seen == [(5, 1 + kept, 32)]
    assert PatchDropout(rate, "", 1).kept_patches(256) == max(1, round(256 * (1 - rate)))


@pytest.mark.parametrize("pool", ["cls", "cls+mean", "attention"])
def test_the_class_token_stays_first(pool: str):
    tower, images = tower_of(base("deit3"), "last(1)", pool=pool), inputs("deit3")
    prefix = tower.prefix_states(images, 1)
    torch.manual_seed(3)
    ours = tower.pooled(images)
    torch.manual_seed(3)
    index = drawn(2, 8, 1)
    fewer = prefix.values.gather(1, index[:, :, None].expand(-1, -1, 32))
    states = tower.net.norm(tower.net.blocks[1](fewer))
    torch.testing.assert_close(ours, tower.pool(states, torch.ones(2, 9, dtype=torch.bool)), **ALIKE)


def test_lower_layers_below_it_are_pooled_whole():
    tower = Tower(base("vit"), extra_layers=[1])
    freeze_except(tower, tower.tune(["last(1)"], seed=0))
    images = inputs("vit")
    whole = tower.pooled(images)
    tower.enable_patch_dropout(0.5)
    fewer = tower.train().pooled(images)
    assert torch.equal(fewer[:, 32:], whole[:, 32:]) and not torch.allclose(fewer[:, :32], whole[:, :32])


def test_prompts_are_no_patches():
    tower = tower_of(base("vit"), "prompts(3)", rate=0.75)
    seen = []
    tower.net.get_submodule("layers.1").register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    tower.pooled(inputs("vit")).sum().backward()
    assert seen == [1 + 3 + 4]
    assert tower.net.prompts.tokens.grad.abs().sum(1).all(), "each prompt is read"


@pytest.mark.parametrize("method", ["full", "last(1)", "lora(rank=2)", "adapters", "norms"])
def test_activation_checkpointing_recomputes_the_same_patches(method: str):
    gradients = []
    for checkpointed in (False, True):
        tower = tower_of(base("vit"), method)
        if checkpointed:
            tower.enable_activation_checkpointing()
        torch.manual_seed(2)
        tower.pooled(inputs("vit", rows=4)).square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


# --- where it would be wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov3", "convnext", "efficientnet"])
def test_towers_that_cannot_lose_patches(name: str):
    with pytest.raises(UserError, match=rf"image.patch_dropout = 0.5: {name} \(.*\) .* choose a ViT with absolute"):
        tower_of(base(name))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("swin", "fixes the number of patches"),
        ("hiera", "fixes the number of patches"),
        ("mlcd_vision_model", "fixes the number of patches"),
        ("mobilevit", "returns other states|fixes the number of patches"),
        ("poolformer", "does not run its blocks"),
        ("pvt_v2", "computes on feature maps"),
        ("vitdet", "computes on feature maps"),
        ("yolos", "tokens that are not patches beside the first 1"),
    ],
)
def test_families_found_out_by_what_they_compute(family: str, why: str, tmp_path: Path):
    backbone = load_backbone(ImageTowerSettings(tower=f"file:{save_family(family, tmp_path / family)}"))
    with pytest.raises(UserError, match=why) as caught:
        tower_of(backbone, "full")
    assert family in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["dinov2_with_registers", "vit_mae", "ijepa"])
def test_families_that_nobody_listed(family: str, tmp_path: Path):
    backbone = load_backbone(ImageTowerSettings(tower=f"file:{save_family(family, tmp_path / family)}"))
    tower = tower_of(backbone, "full")
    tower.pooled(inputs("vit"))


class RotaryAttention(nn.Module):
    """Attention that numbers the tokens it is given: any number of them is accepted, and their order matters."""

    def __init__(self, inner: Attention):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        q, k, v = self.inner._split(x)
        angles = torch.arange(x.shape[1])[:, None] * 100.0 ** -(torch.arange(q.shape[-1] // 2) / (q.shape[-1] // 2))

        def rotate(t: Tensor) -> Tensor:
            one, other = t[..., ::2], t[..., 1::2]
            cos, sin = angles.cos(), angles.sin()
            return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1)

        return self.inner.proj(F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["deit3", "own-image"])
def test_rotary_positions_that_no_shape_betrays(name: str):
    backbone = base(name)
    for block in backbone.net.blocks:
        block.attn = RotaryAttention(block.attn)
    with pytest.raises(UserError, match="reads the positions of its patches inside its blocks"):
        tower_of(backbone)


def test_above_a_parallel_branch_but_not_below_it():
    settings = ImageTransformerSettings(
        width=32, heads=2, layers=3, size=32, patch=8, branch=ParallelBranchSettings(kind="gated", before=(0, 1))
    )
    net = ImageTransformer(settings)
    init_weights(net, seed=0)
    backbone = replace(base("own-image"), net=net.eval())
    with pytest.raises(UserError, match="fixes the number of patches"):
        tower_of(replace(backbone, net=copy.deepcopy(net)), "full")
    tower_of(backbone, "last(1)").pooled(Pixels(torch.randn(2, 3, 32, 32)))


def test_nothing_that_trains():
    with pytest.raises(UserError, match=r"no block of vit trains.*tune.image"):
        tower_of(base("vit"), "none")
