"""Roles of attention heads: by hand from the maps, their agreement, and its baseline."""

from __future__ import annotations

import math

import pytest
import torch

from clasp.analysis.attention_maps import attention_maps
from clasp.analysis.attention_roles import attention_agreement, head_roles
from clasp.models.tower import Tower
from clasp.types import Tokens
from toytowers import base, inputs


@pytest.mark.parametrize("prompts", [0, 3])
def test_roles_are_means_over_real_tokens(prompts: int):
    tower, read = Tower(base("own-text")), inputs("bert")
    if prompts:
        tower.tune([f"prompts({prompts})"], seed=0)
    assert isinstance(read, Tokens) and not read.mask.all(), "some captions are padded"
    roles = head_roles(tower, [([str(row) for row in range(len(read.ids))], read)])
    for layer, found in roles.items():
        rows = []
        for ids, mask in zip(read.ids, read.mask, strict=True):
            count = int(mask.sum())
            with torch.no_grad():
                alone = Tokens(ids[None, :count], mask[None, :count])
                weights = attention_maps(tower.net, lambda alone=alone: tower(alone))[layer][0].double()
            entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean(-1) / math.log(count + prompts)
            rows.append(torch.stack((entropy, weights.diagonal(dim1=-2, dim2=-1).mean(-1)), dim=-1))
        assert torch.allclose(found, torch.stack(rows).mean(0), atol=1e-5)
        assert (found > 0).all() and (found < 1).all()


def test_towers_that_are_not_native_have_none():
    assert head_roles(Tower(base("bert")), [(("a", "b"), inputs("bert"))]) == {}


def test_heads_that_keep_their_role_agree_and_others_do_not():
    generator = torch.Generator().manual_seed(0)
    image = {layer: torch.rand(6, 2, generator=generator).double() for layer in range(4)}
    same = {layer: 0.5 * roles + 0.1 * layer for layer, roles in image.items()}  # other levels, same differences
    found = attention_agreement(image, same)
    assert found is not None and found.heads == 24
    assert found.entropy == pytest.approx(1) and found.own_token == pytest.approx(1)
    assert found.entropy_shuffled[0] < -0.2 and 0.2 < found.entropy_shuffled[1] < 0.7
    other = {layer: torch.rand(6, 2, generator=generator).double() for layer in range(4)}
    unlike = attention_agreement(image, other)
    assert unlike is not None and abs(unlike.entropy) < 0.5 and abs(unlike.own_token) < 0.5


def test_only_what_can_be_paired_is_compared():
    heads = torch.rand(4, 2).double()
    assert attention_agreement({0: heads}, {1: heads}) is None
    assert attention_agreement({0: heads}, {0: heads[:3]}) is None
    assert attention_agreement({0: heads}, {0: torch.ones(4, 2).double()}) is None, "heads that do not differ"
