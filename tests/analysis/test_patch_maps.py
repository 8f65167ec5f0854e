"""Patch maps: pooled vectors of patches add up to that of the image; attention is what the native blocks record."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clasp.analysis.attention_maps import attention_maps
from clasp.analysis.patch_maps import attention_rollout, patch_vectors
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.types import Pixels, UserError
from toytowers import base, inputs


def one_image(name: str) -> Pixels:
    given = inputs(name, rows=1)
    assert isinstance(given, Pixels)
    return given


def vectors(tower: Tower, image: Pixels) -> Tensor:
    with torch.inference_mode():
        return patch_vectors(tower, image).pooled


@pytest.mark.parametrize("name", ["vit", "siglip-image", "efficientnet", "own-image", "own-stem"])
def test_the_mean_over_patches_is_the_vector_of_the_image(name: str):
    tower, image = Tower(base(name)), one_image(name)
    found = vectors(tower, image)
    assert found.shape == (4, 4, tower.width)
    torch.testing.assert_close(found.flatten(0, 1).mean(dim=0), tower.pooled(image)[0].detach(), rtol=1e-4, atol=1e-5)


def test_a_patch_takes_the_place_of_the_class_token():
    tower, image = Tower(base("vit", "cls+mean")), one_image("vit")
    states = tower(image)[0, 1:].detach()
    torch.testing.assert_close(vectors(tower, image).flatten(0, 1), torch.cat((states, states), dim=1))


def test_lower_feature_maps_are_averaged_over_the_cells_of_the_last():
    tower, image = Tower(base("efficientnet"), extra_layers=[1]), one_image("efficientnet")
    found, (last, first) = vectors(tower, image), tower.layer_states(image)
    assert first.shape[1] == 16 * last.shape[1] and found.shape == (4, 4, tower.width)
    width = last.shape[2]
    cells = first[0].detach().unflatten(0, (4, 4, 4, 4)).mean(dim=(1, 3))
    torch.testing.assert_close(found[..., width:], cells)


def test_rollout_by_hand():
    one, other = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    found = attention_rollout([one, other])
    assert found.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert attention_rollout([one.expand(3, 2, 2)]).tolist() == [[0.5, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize("name", ["own-image", "own-stem", "deit3"])
def test_attention_is_that_of_the_blocks(name: str):
    tower, image = Tower(base(name, "cls")), one_image(name)
    with torch.inference_mode():
        found = patch_vectors(tower, image).attention
        maps = attention_maps(tower.net, lambda: tower(image))
    assert found is not None and float(found.sum()) == pytest.approx(1)
    shares = attention_rollout([block[0] for _, block in sorted(maps.items())])[0, 1:]
    torch.testing.assert_close(found.flatten(), shares / shares.sum())


@pytest.mark.parametrize(
    ("name", "recorded"), [("vit", True), ("dinov3", True), ("siglip-image", False), ("efficientnet", False)]
)
def test_attention_needs_a_class_token(name: str, recorded: bool):
    tower = Tower(base(name))
    found = patch_vectors(tower, one_image(name)).attention
    assert (found is not None) == recorded == find_structure(tower.net).class_token


def test_registers_are_no_class_token():
    backbone = base("own-image")
    token = backbone.net._parameters.pop("cls_token")
    backbone.net.register_parameter("reg_token", token)
    vars(backbone.net)["cls_token"] = token  # what forward reads
    structure = find_structure(backbone.net)
    assert structure.prefix_tokens == 1 and not structure.class_token
    found = patch_vectors(Tower(backbone), one_image("own-image"))
    assert found.attention is None and found.pooled.shape[:2] == (4, 4)
    with pytest.raises(UserError, match="own-image has no class token; choose mean or attention"):
        Tower(backbone, pool="cls")


def test_a_tower_without_patches_is_refused():
    with pytest.raises(UserError, match="convnext has no patches to map: its output is 1 tokens"):
        patch_vectors(Tower(base("convnext")), one_image("convnext"))
