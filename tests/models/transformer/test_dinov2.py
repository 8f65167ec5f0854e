"""The DINOv2 of the packaged image tower: bitwise ``transformers``' model, in output and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
import transformers as hf

from clasp.models.backbone import Backbone
from clasp.models.frozen import FrozenTower
from clasp.models.frozen_casts import FrozenCasts
from clasp.models.packed_weights import packed_weights
from clasp.models.plain_attention import plain_attention_everywhere
from clasp.models.tower import Tower
from clasp.models.transformer.dinov2 import Dinov2Encoder, Dinov2EncoderSettings
from clasp.models.tuning.spec import freeze_except
from clasp.types import Pixels

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


def test_hooks_see_branches_before_the_layer_scale():
    """Which packed weights have in them, where nothing watches."""
    ours, _ = _pair()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    block, seen = ours.encoder.layer[0], {}
    with torch.inference_mode(), packed_weights(at_once=True), torch.autocast("cpu", torch.bfloat16):
        plain = ours(pixel_values=pixels).last_hidden_state
        for name in ("attention", "layer_scale1", "mlp", "layer_scale2"):
            block.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: out.clone()})
            )
        watched = ours(pixel_values=pixels).last_hidden_state
    for branch, scale in (("attention", "layer_scale1"), ("mlp", "layer_scale2")):
        assert torch.equal(seen[scale], seen[branch] * block.get_submodule(scale).lambda1.detach())
    assert (plain - watched).norm() <= 0.02 * watched.norm()


TUNINGS = ("lora(rank=2)", "adapters", "adapters(place='input')", "norms", "prompts(2)", "deep(1)", "last(1)")


def tuned_tower(*specs: str, pool: str = "cls") -> Tower:
    """A tower whose new parts are no longer at their start, where half of its gradients would be zeros."""
    tower = Tower(Backbone("tiny", "image", _pair()[0], "", pool))
    names = tower.tune(specs, seed=0) if specs else set()
    freeze_except(tower, names)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return tower


PIXELS = Pixels(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def gradients(tower: Tower, states: torch.Tensor) -> list[torch.Tensor]:
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    return [states, *torch.autograd.grad(states.float().square().sum(), trained)]


@pytest.mark.parametrize("spec", TUNINGS)
@pytest.mark.parametrize("depth", [0, 1], ids=["whole", "resumed"])
def test_the_class_token_alone_is_that_of_the_whole_net(spec: str, depth: int) -> None:
    tower = tuned_tower(spec)
    if depth > tower.frozen_blocks:
        pytest.skip("nothing is frozen below")
    inputs = tower.prefix_states(PIXELS, depth) if depth else PIXELS
    alone, whole = tower(inputs, class_token_only=True), tower(inputs)[:, :1]
    assert alone.shape == whole.shape
    for one, other in zip(gradients(tower, alone), gradients(tower, whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_bfloat16_leaves_out_what_is_not_pooled(pool: str) -> None:
    tower, seen = tuned_tower("lora(rank=2)", pool=pool), []
    tower.net.encoder.layer[-1].register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            tower.pooled(PIXELS)
            with torch.inference_mode():
                tower.pooled(PIXELS)
    few = 1 if pool == "cls" else 17
    assert seen == [17, 17, few, few]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert tower.layer_states(PIXELS)[0].shape[1] == 17  # maps of patches read them all


@pytest.mark.parametrize("spec", TUNINGS)
def test_a_step_with_frozen_weights_in_bfloat16_is_within_its_rounding(spec: str) -> None:
    """Norms, layer scales, attention and products round where autocast does not, and are no further from float32."""
    tower, found = tuned_tower(spec), {}
    for name, context in (("exact", None), ("autocast", nullcontext()), ("casts", FrozenCasts(tower)())):
        with (
            context or nullcontext(),
            plain_attention_everywhere(),
            torch.autocast("cpu", torch.bfloat16, enabled=context is not None),
        ):
            found[name] = [each.float().flatten() for each in gradients(tower, tower.pooled(PIXELS))]
    exact = torch.cat(found["exact"][1:])
    theirs, ours = ((torch.cat(found[name][1:]) - exact).norm() / exact.norm() for name in ("autocast", "casts"))
    assert ours < max(1.5 * theirs, 0.02), (ours, theirs)
    assert (found["casts"][0] - found["exact"][0]).norm() < 0.02 * found["exact"][0].norm()


def test_features_are_keyed_by_how_they_attend():
    tower = Tower(Backbone("tiny", "image", _pair()[0].requires_grad_(False), "", "cls"))
    before = FrozenTower(tower, precision="bfloat16").fingerprint
    with plain_attention_everywhere():
        assert FrozenTower(tower, precision="bfloat16").fingerprint == before and before.endswith(
            ":scaled-products:class-token"
        )
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
