"""What ``[loss]`` asks for: positives, parts of a batch, and the two forms in which a scale is learned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from clasp.models.dual_encoder import DualEncoder
from clasp.models.head_settings import HeadSettings
from clasp.models.logit_settings import LogitSettings
from clasp.models.tower import Tower
from clasp.training.loss_settings import LossSettings
from clasp.training.losses import LOSSES, build_loss, info_nce
from clasp.types import Loss, UserError
from reference_losses import NAIVE
from toytowers import base

GOLDEN = Path(__file__).parents[2] / "golden"
HEAD = HeadSettings(width=8)


def example(rows: int = 10, width: int = 6):
    """float64 leaves (image, text, scale, bias) and groups with several positives, some of them across parts."""
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    groups = torch.stack([torch.arange(rows) % 4, torch.randint(rows, (rows,), generator=generator)], dim=1)
    leaves = [F.normalize(image, dim=1), F.normalize(image + noise, dim=1), torch.tensor(9.0), torch.tensor(-2.0)]
    return [leaf.double().requires_grad_() for leaf in leaves], groups


def with_gradients(value, leaves):
    return [value.detach(), *torch.autograd.grad(value, leaves, retain_graph=True)]


@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_asked_for_is_the_loss_itself(kind: str):
    assert build_loss(LossSettings(kind=kind)) is LOSSES[kind]
    assert isinstance(build_loss(LossSettings(kind=kind, positives="diagonal", negatives=4)), Loss)


# --- parts of a batch ------------------------------------------------------------------------------------------------


def test_two_parts_by_hand():
    """Cosines 1 on the diagonal and 0 elsewhere, scale log 3: 3 of 4 among two pairs, 3 of 6 among four."""
    eye, scale = torch.eye(4, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64).log()
    whole, halves = (build_loss(LossSettings(negatives=n))(eye, eye, scale) for n in ("all", 2))
    assert whole.total.item() == pytest.approx(math.log(6 / 3))
    assert halves.total.item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("positives", ["groups", "diagonal"])
@pytest.mark.parametrize("kind", LOSSES)
def test_parts_are_the_mean_of_their_own_losses(kind: str, positives: str):
    leaves, groups = example(12)
    image, text, scale, bias = leaves
    asked = build_loss(LossSettings(kind=kind, positives=positives, negatives=4))
    for number, ours in enumerate(asked(*leaves, groups=groups)):
        theirs = []
        for first in (0, 4, 8):
            part = slice(first, first + 4)
            mates = groups[part] if positives == "groups" else None
            theirs.append(NAIVE[kind](image[part], text[part], scale, bias, groups=mates)[number])
        theirs = sum(theirs) / 3
        for a, b in zip(with_gradients(ours, leaves), with_gradients(theirs, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_remainder_is_shared_out_and_every_pair_counts_alike(kind: str):
    """Ten pairs in parts of at most four: four, three and three."""
    leaves, groups = example(10)
    image, text, scale, bias = leaves
    ours = build_loss(LossSettings(kind=kind, negatives=4))(*leaves, groups=groups).total
    theirs = 0
    for part in (slice(0, 4), slice(4, 7), slice(7, 10)):
        rows = part.stop - part.start
        theirs = theirs + rows / 10 * NAIVE[kind](image[part], text[part], scale, bias, groups=groups[part])[0]
    for a, b in zip(with_gradients(ours, leaves), with_gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_of_one_part_is_the_whole(kind: str):
    leaves, groups = example(10)
    whole, part = (build_loss(LossSettings(kind=kind, negatives=n))(*leaves, groups=groups) for n in ("all", 10))
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("value", [1, 0, -4, 2.5, "some"])
def test_parts_that_are_none(value):
    with pytest.raises(ValidationError, match="negatives"):
        LossSettings(negatives=value)


def test_parts_larger_than_the_batch_are_refused():
    LossSettings(negatives=64).require_batch_size(64)
    LossSettings().require_batch_size(2)
    with pytest.raises(UserError, match=r"loss.negatives = 64 is more than the 32 pairs .*; at most 32, or 'all'"):
        LossSettings(negatives=64).require_batch_size(32)


# --- positives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_on_the_diagonal_another_caption_of_the_image_is_a_negative(kind: str):
    """Raising the score of a group-mate raises the loss, and lowers it where groups are known."""
    image, text = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).requires_grad_()
    groups, scale = torch.tensor([[0, 0], [0, 1], [2, 2]]), torch.tensor(1.0, dtype=torch.float64)
    slopes = {}
    for positives in ("groups", "diagonal"):
        total = build_loss(LossSettings(kind=kind, positives=positives))(image, text, scale, groups=groups).total
        (slopes[positives],) = torch.autograd.grad(total, text)
    assert slopes["groups"][1, 0] < 0 < slopes["diagonal"][1, 0]


@pytest.mark.parametrize("kind", LOSSES)
def test_the_diagonal_is_the_loss_without_groups(kind: str):
    leaves, groups = example()
    ours = build_loss(LossSettings(kind=kind, positives="diagonal"))(*leaves, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(ours, LOSSES[kind](*leaves), strict=True))


# --- the scale -------------------------------------------------------------------------------------------------------


def model(**logits) -> DualEncoder:
    made = DualEncoder(Tower(base("vit")), Tower(base("bert")), HEAD, seed=0, logits=LogitSettings(**logits))
    made.select(made.new_parameter_names["scale"])
    return made


def put(parameter, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


def test_a_scale_is_clips_unless_said_otherwise():
    made = model()
    assert made.log_scale.item() == pytest.approx(math.log(1 / 0.07)) and made.temperature is None
    assert made.scale_and_bias()[0].item() == pytest.approx(1 / 0.07)
    put(made.log_scale, 7.0)
    assert made.scale_and_bias()[0].item() == pytest.approx(math.exp(7)), "in range after a step, not before"
    made.after_step()
    assert made.log_scale.item() == pytest.approx(math.log(100))
    put(made.log_scale, -50.0)
    made.after_step()
    assert made.log_scale.item() == -50


def test_a_log_scale_without_limits_as_ms_clip_has_it():
    made = model(init_logit_scale=math.e, scale_range=(0, math.inf))
    assert made.log_scale.item() == pytest.approx(1)
    put(made.log_scale, 9.0)
    made.after_step()
    assert made.log_scale.item() == 9


def test_a_log_scale_with_a_floor():
    made = model(scale_range=(1, 50))
    put(made.log_scale, -1.0)
    made.after_step()
    assert made.log_scale.item() == 0


LILT = {"scale": "temperature", "scale_range": (2, 1000)}


def test_a_temperature_divides():
    made = model(**LILT)
    assert made.log_scale is None and made.temperature.item() == pytest.approx(0.07)
    assert made.delta().keys() == made.new_parameter_names["scale"] == {"temperature"}
    scale, _ = made.scale_and_bias()
    assert scale.item() == pytest.approx(1 / 0.07)
    scale.backward()
    assert made.temperature.grad.item() == pytest.approx(-1 / 0.07**2, rel=1e-6)


@pytest.mark.parametrize(("stored", "used"), [(0.62, 0.5), (-0.3, 0.001), (0.0005, 0.001), (0.25, 0.25)])
def test_a_temperature_is_clamped_in_place_and_keeps_its_gradient(stored: float, used: float):
    """By hand: the scale is 1 / t, whose slope at the clamped t is -1 / t squared, and not 0."""
    made = model(**LILT)
    put(made.temperature, stored)
    made.after_step()
    assert made.temperature.item() == pytest.approx(stored), "clamped when it is used, not after the step"
    scale, _ = made.scale_and_bias()
    assert made.temperature.item() == pytest.approx(used) and scale.item() == pytest.approx(1 / used)
    scale.backward()
    assert made.temperature.grad.item() == pytest.approx(-1 / used**2)
    assert made.fingerprint == made.fingerprint


def test_a_temperature_beyond_its_range_gives_the_reference_its_loss_and_gradient():
    """The golden file has 0.62 stored, used as 0.5."""
    golden = torch.load(GOLDEN / "lilt_lwa_ln_bitfit.golden.pt", weights_only=True)
    said = golden["outputs"]
    assert float(said["temperature_stored"]) > 0.5
    made = model(**LILT)
    put(made.temperature, float(said["temperature_stored"]))
    image, text = said["image_embed"], said["text_embed"]
    scale, _ = made.scale_and_bias()
    assert made.temperature.item() == float(said["temperature"]) == 0.5
    torch.testing.assert_close(scale * image @ text.T, said["logits_per_image"], rtol=0, atol=1e-5)
    loss = info_nce(image, text, scale).total
    torch.testing.assert_close(loss, said["loss"].reshape(()), rtol=0, atol=1e-5)
    loss.backward()
    assert made.temperature.grad.abs().item() == pytest.approx(float(golden["grad_norms"]["temp"]), rel=1e-3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scale_range": (5, 1)}, r"scale_range = \[5, 1\] is not a least and a greatest"),
        ({"scale_range": (-1, 5)}, "greater than or equal to 0"),
        ({"scale_range": (0, math.nan)}, "greater than or equal to 0"),
        ({"init_logit_scale": 500}, r"init_logit_scale = 500 is outside scale_range = \[0, 100\]"),
        ({"init_logit_scale": 0}, "greater than 0"),
        ({"init_logit_scale": math.inf, "scale_range": (0, math.inf)}, "finite"),
        ({"scale": "temperature", "scale_range": (0, math.inf)}, "needs a greatest scale"),
    ],
)
def test_scales_that_cannot_be(wrong: dict, says: str):
    with pytest.raises(ValidationError, match=says):
        LogitSettings(**wrong)
