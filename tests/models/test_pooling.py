"""Poolings by hand, the adapter's two starts, and our vision transformer's positions against recorded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clasp.models.pooling import POOLING_FUNCTIONS, AttentionPool
from clasp.models.transformer.deit import VisionTransformer, resize_pos_embed
from clasp.models.tuning.bottleneck import Adapter

STATES = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [5.0, 2.0]], [[2.0, 4.0], [8.0, 0.0], [99.0, 99.0]]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("pool", "prefix", "first", "second"),
    [
        ("cls", 0, [1, 10], [2, 4]),
        ("mean", 0, [3, 14], [5, 2]),
        ("mean", 1, [4, 16], [8, 0]),
        ("last", 0, [5, 2], [8, 0]),
        ("cls+mean", 1, [1, 10, 4, 16], [2, 4, 8, 0]),
        ("mean+max", 0, [3, 14, 5, 30], [5, 2, 8, 4]),
        ("mean+max", 1, [4, 16, 5, 30], [8, 0, 8, 0]),
    ],
)
def test_poolings_by_hand(pool: str, prefix: int, first: list[int], second: list[int]):
    pooled = POOLING_FUNCTIONS[pool](STATES, MASK, prefix)
    assert torch.equal(pooled, torch.tensor([first, second], dtype=torch.float32))


def test_attention_pooling_starts_as_the_mean_of_real_tokens():
    torch.testing.assert_close(AttentionPool(2)(STATES, MASK), POOLING_FUNCTIONS["mean"](STATES, MASK, 0))


@pytest.mark.parametrize("channels_first", [False, True])
def test_adapter_starts(channels_first: bool):
    x = torch.randn(2, 8, 3, 3) if channels_first else torch.randn(2, 5, 8)
    assert torch.equal(Adapter(8, 2, "identity", channels_first)(x), x)
    torch.manual_seed(0)
    adapter = Adapter(8, 2, "random", channels_first)
    moved = adapter(x) - x
    assert 0 < moved.abs().max() < 0.1
    rows = x.movedim(1, -1) if channels_first else x
    slow = adapter.up(torch.nn.functional.gelu(adapter.down(rows)))
    torch.testing.assert_close(moved, slow.movedim(-1, 1) if channels_first else slow, atol=1e-6, rtol=1e-4)


def test_positions_resize_as_recorded_from_the_reference():
    path = Path(__file__).parents[1] / "golden" / "lilt_position_resize.golden.pt"
    cases = torch.load(path, weights_only=True)["cases"]
    assert cases
    for case in cases:
        resized = resize_pos_embed(case["source"], case["target_grid"], case["extra_rows"])
        torch.testing.assert_close(resized, case["target"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer_scale", [None, 1e-4])
def test_vision_transformer_shapes(layer_scale: float | None):
    net = VisionTransformer(size=32, patch=8, width=16, blocks=2, heads=2, layer_scale=layer_scale)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 17, 16)
    assert net.pos_embed.shape[1] == (17 if layer_scale is None else 16)
