"""Gradients of two ways into one weight: worked by hand, against two plain backward passes, and what is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clasp.analysis.gradient_agreement import WHOLE_LAYER, gradient_agreement
from clasp.models.backbone import Backbone
from clasp.models.dual_encoder import DualEncoder
from clasp.models.head_settings import HeadSettings
from clasp.models.sharing.policy import SharingSettings
from clasp.models.sharing.tie import TiedEncoders
from clasp.models.tower import Tower
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer, init_weights
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings
from clasp.training.losses import LOSSES
from clasp.types import Batch, LossParts, Pixels, PooledFeatures, Tokens, UserError

SIZES = {"width": 32, "heads": 2, "layers": 3, "qk_norm": True, "layer_scale": 0.5}
SHARED = SharingSettings(attention="shared", ffn="shared", norm2="shared", qk_norm="shared", layer_scale="shared")


def model(policy: SharingSettings, loss: str = "infonce", **image: Any) -> DualEncoder:
    nets = (
        ImageTransformer(ImageTransformerSettings(**SIZES, size=32, patch=8, **image)),
        TextTransformer(TextTransformerSettings(**SIZES, vocabulary=40, context=9)),
    )
    for seed, net in enumerate(nets):
        init_weights(net, seed=seed)
    pair = TiedEncoders(*nets, policy, seed=2).eval()
    towers = (
        Tower(Backbone("views", "image", pair.image, "0", "cls")),
        Tower(Backbone("views", "text", pair.text, "0", "last")),
    )
    made = DualEncoder(*towers, HeadSettings(width=16), seed=0, init_logit_bias=LOSSES[loss].init_logit_bias)
    made.select(name for name, _ in made.named_parameters())
    return made


def batch(rows: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (rows, 8), generator=generator)
    tokens = Tokens(ids, torch.arange(8) < torch.randint(2, 9, (rows, 1), generator=generator))
    pixels = Pixels(torch.randn(rows, 3, 32, 32, generator=generator))
    return Batch(tuple("abcdefgh"[:rows]), pixels, tokens, torch.arange(rows)[:, None].expand(-1, 2))


def one_way(made: DualEncoder, given: Batch, loss: str, fixed: str) -> dict[str, Tensor]:
    """Gradients of the loss with one side's embeddings detached, by a plain backward pass."""
    made.zero_grad()
    out = made(given)
    sides = {"image": out.image, "text": out.text}
    sides[fixed] = sides[fixed].detach()
    LOSSES[loss](sides["image"], sides["text"], out.scale, out.bias, groups=given.groups).total.backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_beside_two_plain_backward_passes(loss: str):
    made, given = model(SHARED, loss), batch()
    image, text = one_way(made, given, loss, "text"), one_way(made, given, loss, "image")
    made.zero_grad()
    rows = gradient_agreement(made, given, LOSSES[loss])
    parts = {
        WHOLE_LAYER: ("attn.", "mlp.", "norm2.", "gamma_"),
        "attention": ("attn.qkv.", "attn.proj."),
        "qk_norm": ("attn.q_norm.", "attn.k_norm."),
        "ffn": ("mlp.",),
        "norm2": ("norm2.",),
        "layer_scale": ("gamma_",),
    }
    assert {(row.layer, row.part) for row in rows} == {(layer, part) for layer in range(3) for part in parts}
    assert [row.layer for row in rows] == sorted(row.layer for row in rows) and rows[0].part == WHOLE_LAYER
    for row in rows:
        begins = tuple(f"image.net.blocks.{row.layer}.{begin}" for begin in parts[row.part])
        one, other = (
            torch.cat([g.flatten() for n, g in grads.items() if n.startswith(begins)]) for grads in (image, text)
        )
        assert row.cosine == pytest.approx(cosine(one, other), abs=1e-5)
        assert row.image_norm == pytest.approx(float(one.norm()), rel=1e-4)
        assert row.text_norm == pytest.approx(float(other.norm()), rel=1e-4)


def test_both_ways_are_the_gradient_of_training():
    made, given = model(SHARED), batch()
    image, text = one_way(made, given, "infonce", "text"), one_way(made, given, "infonce", "image")
    made.zero_grad()
    out = made(given)
    LOSSES["infonce"](out.image, out.text, out.scale, groups=given.groups).total.backward()
    for name in (f"image.net.blocks.{layer}.mlp.fc1.weight" for layer in range(3)):
        torch.testing.assert_close(made.get_parameter(name).grad, image[name] + text[name], atol=1e-6, rtol=1e-4)


class Blind(Tower):
    """Sees one picture's states whatever it is shown."""

    seen: Pixels

    def pooled(self, inputs: Any) -> Tensor:
        return super().pooled(self.seen)


def weighed(image: Tensor, text: Tensor, by: float) -> LossParts:
    """A loss in which neither side knows of the other."""
    total = image[:, 0].sum() + by * text[:, 0].sum()
    return LossParts(total, total, total)


@pytest.mark.parametrize(("by", "cosine"), [(1.0, 1.0), (-1.0, -1.0), (3.0, 1.0)])
def test_two_views_that_are_one_agree_and_disagree_as_they_must(by: float, cosine: float):
    """Both sides are the same states under one head, so that only the loss tells them apart."""
    given = batch(4)
    one = model(SharingSettings()).image
    twin = Blind(Backbone("views", "image", one.net, "0", "cls"))
    assert isinstance(given.image, Pixels)
    twin.seen = given.image
    both = DualEncoder(one, twin, HeadSettings(width=16), seed=0)
    both.text_head = both.image_head
    rows = gradient_agreement(both, given, lambda image, text, *more, **groups: weighed(image, text, by))
    assert {row.layer for row in rows} == {0, 1, 2}
    for row in rows:
        assert row.cosine == pytest.approx(cosine, abs=1e-6)
        assert row.text_norm == pytest.approx(abs(by) * row.image_norm, rel=1e-5)


def test_frozen_weights_are_asked_too_and_stay_frozen():
    made, given = model(SHARED), batch()
    all_trained = gradient_agreement(made, given, LOSSES["infonce"])
    made.select(["log_scale"])
    assert gradient_agreement(made, given, LOSSES["infonce"]) == all_trained
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {"log_scale"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stem", [None, "batch"])
def test_nothing_is_left_on_the_model(training: bool, stem: str | None):
    policy = SHARED if stem is None else SHARED.model_copy(update={"layers": "1:"})
    made, given = model(policy, stem=stem).train(training), batch()
    kept = torch.ones_like(made.get_parameter("image.net.cls_token"))
    made.get_parameter("image.net.cls_token").grad = kept
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with torch.no_grad():
        before = made(given)
        gradient_agreement(made, given, LOSSES["infonce"])  # whoever measures may have gradients off
        assert torch.equal(made(given).image, before.image)
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert [*grads] == ["image.net.cls_token"] and grads["image.net.cls_token"] is kept
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in made.modules())
    assert made.training == training


def test_layers_are_counted_as_the_policy_counts():
    made = model(SharingSettings(layers="1:", ffn="shared"), stem="group")
    rows = gradient_agreement(made, batch(), LOSSES["infonce"])
    assert [(row.layer, row.part) for row in rows] == [(1, WHOLE_LAYER), (1, "ffn"), (2, WHOLE_LAYER), (2, "ffn")]
    whole, ffn = rows[:2]
    assert (whole.cosine, whole.image_norm, whole.text_norm) == (ffn.cosine, ffn.image_norm, ffn.text_norm)


def test_only_the_shared_part_of_a_low_rank_difference_is_asked():
    policy = SharingSettings(layers="0", ffn={"low-rank": 2}, k="shared")
    made = model(policy)
    rows = gradient_agreement(made, batch(), LOSSES["infonce"])
    assert {row.part for row in rows} == {WHOLE_LAYER, "attention", "ffn"}
    assert all(row.cosine is not None and abs(row.cosine) <= 1 + 1e-9 for row in rows)


def test_a_gradient_of_nothing_has_no_direction():
    made = model(SHARED)
    for row in gradient_agreement(made, batch(), lambda image, text, *more, **groups: weighed(image, text, 0.0)):
        assert row.cosine is None and row.cosine_shuffled is None and row.text_norm == 0 and row.image_norm > 0


def test_the_baseline_is_of_captions_of_the_next_images():
    made, given = model(SHARED), batch()
    assert isinstance(given.text, Tokens)
    text = Tokens(given.text.ids.roll(-1, 0), given.text.mask.roll(-1, 0))
    rows = gradient_agreement(made, given, LOSSES["infonce"])
    other = gradient_agreement(made, replace(given, text=text), LOSSES["infonce"])
    for row, beside in zip(rows, other, strict=True):
        assert row.cosine_shuffled == pytest.approx(beside.cosine, abs=1e-5)
        assert row.cosine != pytest.approx(beside.cosine, abs=1e-3)


def test_towers_that_share_no_layer_have_no_rows():
    assert gradient_agreement(model(SharingSettings()), batch(), LOSSES["infonce"]) == []


def test_cached_features_are_refused():
    given = batch()
    cached = Batch(given.ids, PooledFeatures(torch.zeros(5, 32)), given.text, given.groups)
    with pytest.raises(UserError, match=r"data\.feature_cache = 'off'"):
        gradient_agreement(model(SHARED), cached, LOSSES["infonce"])
