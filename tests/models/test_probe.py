"""What a tower is tried out for when it is built, and which nets it turns away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.models.backbone import Backbone
from clasp.models.probe import reached_parameters
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.zoo.registry import load_backbone
from clasp.types import Pixels, Tokens, UserError
from toyfamilies import save_family
from toytowers import base, inputs


def says(what: str, call: Callable[[], object]) -> None:
    """One line, with ``what`` in it."""
    with pytest.raises(UserError) as caught:
        call()
    assert what in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


# --- features depend on their own input alone ------------------------------------------------------------------------


def test_vit_mae_hides_no_patch(tmp_path: Path):
    save_family("vit_mae", tmp_path)
    tower = Tower(load_backbone(ImageTowerSettings(tower=f"file:{tmp_path}")))
    given = inputs("vit")
    with torch.no_grad():
        assert torch.equal(tower.pooled(given), tower.pooled(given))
        assert tower(given).shape == (2, 17, 32)  # the class token and all 16 patches


@pytest.mark.parametrize("name", ["convbert", "fnet", "mobilebert", "nystromformer", "yoso"])
def test_texts_that_depend_on_padding_are_refused(tmp_path: Path, name: str):
    save_family(name, tmp_path)
    base = load_backbone(TextTowerSettings(tower=f"file:{tmp_path}"))
    says("features of a caption that depend on its padding", lambda: Tower(base))
    meta = load_backbone(TextTowerSettings(tower=f"file:{tmp_path}"), meta=True)
    assert Tower(meta).width == 32  # shapes cannot be tried out


class Pooled(nn.Module):
    """A net of one map, with something wrong with it."""

    def __init__(self, wrong: Callable[[Tensor], Tensor]):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12)) for _ in range(2))
        self.wrong = wrong

    def forward(self, pixels: Tensor) -> Tensor:
        states = nn.functional.avg_pool2d(pixels, 8).flatten(1)[:, :12]
        for block in self.blocks:
            states = block(states)
        return self.wrong(states)


def of(net: nn.Module, **facts: Any) -> Backbone:
    transform = ImageTransform(16, (0.5,) * 3, (0.5,) * 3)
    return Backbone("a net", "image", net.eval(), "toy", "mean", transform, **facts)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda states: states + torch.randn(states.shape), "other features each time for the same input"),
        (lambda states: states - states.mean(0), "depend on the others in its batch"),
        (lambda states: states / 0.0, "numbers that are not finite"),
    ],
    ids=["random", "batch", "infinite"],
)
def test_images_that_depend_on_more_than_themselves_are_refused(wrong: Callable, what: str):
    says(what, lambda: Tower(of(Pooled(wrong))))


# --- what a net may return -------------------------------------------------------------------------------------------


def test_a_net_may_return_vectors_tokens_or_maps():
    for wrong, shape in (
        (lambda states: states, (2, 12)),
        (lambda states: states.unflatten(1, (3, 4)), (2, 4)),
        (lambda states: states.unflatten(1, (3, 2, 2)), (2, 3)),
        (lambda states: {"last_hidden_state": states[:, None]}, None),
    ):
        net = of(Pooled(wrong))
        if shape is None:
            says("its net returns a dict of last_hidden_state, not states", lambda net=net: Tower(net))
        else:
            assert Tower(net).pooled(Pixels(torch.randn(2, 3, 16, 16))).shape == shape


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (
            lambda states: (states, states),
            "its net returns a tuple, not states; give its clasp.Backbone a forward_features",
        ),
        (lambda states: {"x": states}, "its net returns a dict of x, not states"),
        (lambda states: states.unflatten(1, (3, 2, 2, 1)), "a tensor of shape [1, 3, 2, 2, 1], not states"),
        (lambda states: states @ states.new_ones(5, 2), "cannot read an input of 16 px a side (RuntimeError"),
    ],
    ids=["tuple", "dict", "five axes", "crash"],
)
def test_what_is_no_state_is_refused_by_name(wrong: Callable, what: str):
    says(what, lambda: Tower(of(Pooled(wrong))))
    says("forward_features", lambda: Tower(of(Pooled(wrong))))


def test_forward_features_reads_what_a_net_hides():
    net = of(Pooled(lambda states: (states, {"x": states[:, None]})), forward_features=lambda net, x: net(x)[1]["x"])
    assert Tower(net).pooled(Pixels(torch.randn(2, 3, 16, 16))).shape == (2, 12)


class Words(nn.Module):
    """A text net that spells its arguments in its own way."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        states = self.table(ids)
        for block in self.blocks:
            states = block(states) + (states * real[..., None]).sum(1, keepdim=True)
        return states


@pytest.mark.parametrize("reads", [None, lambda net, tokens: net(tokens.ids, tokens.mask)], ids=["called", "told"])
def test_a_text_net_of_ones_own(reads: Any):
    tower = Tower(Backbone("a net", "text", Words().eval(), "toy", "mean", forward_features=reads))
    tokens = inputs("bert")
    assert isinstance(tokens, Tokens) and tower.pooled(tokens).shape == (2, 8)
    pooled = Backbone(
        "a net", "text", Words().eval(), "toy", "mean", forward_features=lambda net, t: net(t.ids, t.mask)[:, 0]
    )
    says("forward_features", lambda: Tower(pooled))


# --- what tuning reaches ---------------------------------------------------------------------------------------------


def test_reached_parameters_are_those_that_a_backward_pass_fills():
    net = base("bert").net
    out = net(**{"input_ids": inputs("bert").ids}).last_hidden_state
    reached = reached_parameters(out)
    out.sum().backward()
    assert reached == {id(p) for p in net.parameters() if p.grad is not None}
    assert len(reached) < len(list(net.parameters()))  # the pooler stands beside


@pytest.mark.parametrize(
    ("name", "spare"),
    [("xlnet", ["mask_emb", "seg_embed"]), ("big_bird", ["pooler"]), ("longformer", ["pooler", "query_global"])],
)
def test_what_takes_no_part_does_not_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, spare: list[str]
):
    save_family(name, tmp_path)
    towers = [Tower(load_backbone(TextTowerSettings(tower=f"file:{tmp_path}"), meta=meta)) for meta in (False, True)]
    names, counted = (tower.tune(["full"], seed=0) for tower in towers)
    assert names == counted and not any(part in name for part in spare for name in names)
    if name == "xlnet":
        assert "take no part in its output, and stay frozen" in caplog.text


def test_tuning_that_reaches_nothing_is_refused(tmp_path: Path):
    save_family("xlnet", tmp_path)
    tower = Tower(load_backbone(TextTowerSettings(tower=f"file:{tmp_path}")))
    says("nothing that it trains takes part in XLNetModel", lambda: tower.tune(["match('mask_emb')"], seed=0))


def test_a_net_that_comes_out_otherwise_is_not_cut(tmp_path: Path):
    """XLM keeps its attention beside the modules that look like its blocks, and adds what they give to its states."""
    save_family("xlm", tmp_path)
    tower = Tower(load_backbone(TextTowerSettings(tower=f"file:{tmp_path}")))
    tower.requires_grad_(False)
    assert tower.frozen_blocks == 0
