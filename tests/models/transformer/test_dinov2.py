"""The DINOv2 of the packaged image tower: bitwise ``transformers``' model, in output and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
import transformers as hf

from clasp.models.backbone import Backbone
from clasp.models.frozen import FrozenTower
from clasp.models.plain_attention import plain_attention_everywhere
from clasp.models.tower import Tower
from clasp.models.transformer.dinov2 import Dinov2Encoder, Dinov2EncoderSettings

SETTINGS = Dinov2EncoderSettings(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, layerscale_value=0.3
)


def _pair() -> tuple[Dinov2Encoder, hf.Dinov2Model]:
    torch.manual_seed(0)
    theirs = hf.Dinov2Model(hf.Dinov2Config(**asdict(SETTINGS), use_mask_token=False)).eval()
    ours = Dinov2Encoder(SETTINGS).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_names_are_those_of_transformers():
    ours, theirs = _pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("size", [(32, 32), (24, 24), (40, 16)], ids=["native", "smaller", "not square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_output_and_gradients_are_those_of_transformers(dtype, size):
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    found = []
    for net in _pair():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = net(pixel_values=pixels).last_hidden_state
        (states.float() * torch.linspace(-1, 1, 48)).square().sum().backward()
        found.append((states, {name: p.grad for name, p in net.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert torch.equal(ours, theirs)
    if dtype == torch.float32:
        assert all(torch.equal(our_gradients[name], gradient) for name, gradient in their_gradients.items())
    else:  # queries, keys and values share one cast of their input, so its gradient is summed in bfloat16
        one, other = (torch.cat([g.flatten() for g in each.values()]) for each in (our_gradients, their_gradients))
        assert our_gradients.keys() == their_gradients.keys()
        assert (one - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_inference_mode_changes_no_bit(dtype):
    """It computes GELU in place; in bfloat16 it attends as the plain attention kernel does."""
    ours, _ = _pair()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = plain_attention_everywhere if dtype == torch.bfloat16 else nullcontext
    found = []
    for mode, kernel in ((torch.no_grad, plain), (torch.inference_mode, plain), (torch.inference_mode, nullcontext)):
        with mode(), kernel(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(ours(pixel_values=pixels).last_hidden_state)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_features_are_keyed_by_how_they_attend():
    tower = Tower(Backbone("tiny", "image", _pair()[0].requires_grad_(False), "", "cls"))
    before = FrozenTower(tower, precision="bfloat16").fingerprint
    with plain_attention_everywhere():
        assert FrozenTower(tower, precision="bfloat16").fingerprint == before and before.endswith(":products")
    assert FrozenTower(tower).fingerprint == tower.layer_fingerprint


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_net_takes_other_batches():
    """As the graphs that ``clasp export --to onnx`` traces."""
    net, pixels = _pair()[0].requires_grad_(False), torch.randn(3, 3, 32, 32)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return net(pixel_values=pixels).last_hidden_state

    with torch.no_grad():
        traced = torch.jit.trace(run, (pixels[:2],), check_trace=False)
        assert all(torch.equal(traced(pixels[:rows]), run(pixels[:rows])) for rows in (1, 3))
