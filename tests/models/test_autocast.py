"""Nets run on the meta device, where parameters are counted, with whatever asks for autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clasp.models.autocast import is_autocast
from clasp.models.plain_attention import plain_attention_everywhere
from clasp.models.transformer.blocks import LayerNorm, cast_for_products


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "meta"])
def test_every_device_answers(kind: str) -> None:
    assert not is_autocast(torch.device(kind))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_autocast(torch.device(kind)) == (kind == "cpu")


def test_meta_tensors_pass_what_depends_on_autocast() -> None:
    x = torch.ones(1, 2, 3, 4, device="meta", requires_grad=True)
    assert cast_for_products(x) is x and LayerNorm(4, device="meta")(x).shape == x.shape
    with plain_attention_everywhere():
        assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
