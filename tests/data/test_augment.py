"""RandAugment, each operation on a picture made by hand, and its luck; the other changes are in ``test_images``."""

from __future__ import annotations

import random
from collections import Counter
from math import tan

import numpy as np
import pytest
import torch
from PIL import Image

from clasp.data.augment import RANDAUGMENT_OPS, Augment, RandAugmentParams, apply_randaugment
from clasp.data.images import ImageTransform
from clasp.types import UserError

TRANSFORM = ImageTransform(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def grey(values: np.ndarray | list) -> Image.Image:
    """A picture with the same levels in all three channels."""
    return Image.fromarray(np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=2))


def levels(picture: Image.Image) -> np.ndarray:
    """Back to ``[h w]``; the channels must agree."""
    values = np.asarray(picture).astype(int)
    assert (values == values[..., :1]).all()
    return values[..., 0]


def noise(side: int = 32) -> Image.Image:
    values = np.random.default_rng(0).integers(40, 200, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def red_column(side: int, wide: int = 1) -> Image.Image:
    picture = Image.new("RGB", (side, side))
    picture.paste((255, 0, 0), (side // 2 - wide // 2, 0, side // 2 - wide // 2 + wide, side))
    return picture


def middle(picture: Image.Image) -> np.ndarray:
    """Where in each row the red is, as the centre of its weight; what was uncovered is grey, with no red of its own."""
    red = np.asarray(picture).astype(float)
    weight = red[..., 0] - red[..., 1]
    return (weight * (np.arange(picture.width) + 0.5)).sum(axis=1) / weight.sum(axis=1)


# --- each operation --------------------------------------------------------------------------------------------------


def test_identity() -> None:
    assert RANDAUGMENT_OPS["identity"](noise(), 0.7).tobytes() == noise().tobytes()


def test_autocontrast_stretches_each_channel() -> None:
    assert levels(RANDAUGMENT_OPS["autocontrast"](grey([[50, 100, 150]]), 0.7)).tolist() == [[0, 127, 255]]
    colours = Image.fromarray(np.array([[[50, 0, 7], [150, 255, 7]]], dtype=np.uint8))
    assert np.asarray(RANDAUGMENT_OPS["autocontrast"](colours, 0.7)).tolist() == [[[0, 0, 7], [255, 255, 7]]]


def test_equalize_makes_levels_equally_frequent() -> None:
    quarters = grey(np.repeat([10, 11, 12, 200], 256).reshape(32, 32))
    assert Counter(levels(RANDAUGMENT_OPS["equalize"](quarters, 0.7)).flatten()) == {
        0: 256,
        85: 256,
        171: 256,
        255: 256,
    }


@pytest.mark.parametrize("strength", [0.7, -0.7])
def test_brightness_goes_one_way(strength: float) -> None:
    assert levels(RANDAUGMENT_OPS["brightness"](grey([[0, 100, 200]]), strength)).tolist() == [[0, 136, 255]]
    assert levels(RANDAUGMENT_OPS["brightness"](grey([[0, 100, 200]]), 0.5)).tolist() == [[0, 100, 200]]
    assert levels(RANDAUGMENT_OPS["brightness"](grey([[0, 100, 200]]), 0.1)).tolist() == [[0, 28, 56]]


def test_sharpness_lifts_a_dot_from_its_ring() -> None:
    """Smoothed by a kernel of ones with 5 in the middle, over 13, the dot is 63 and its ring 23; then 1.36 of the way
    back and beyond."""
    dot = np.full((7, 7), 13)
    dot[3, 3] = 143
    out = levels(RANDAUGMENT_OPS["sharpness"](grey(dot), 0.7))
    ring = out[2:5, 2:5].flatten().tolist()
    assert ring.pop(4) == pytest.approx(63 + 1.36 * 80, abs=1) and ring == pytest.approx([23 - 1.36 * 10] * 8, abs=1)
    out[2:5, 2:5] = 13
    assert (out == 13).all()


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.7])
@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shear_moves_a_row_by_its_place(name: str, strength: float) -> None:
    def turned(given: Image.Image) -> Image.Image:
        return given if name == "shear_x" else given.transpose(Image.Transpose.TRANSPOSE)

    out = turned(RANDAUGMENT_OPS[name](turned(red_column(40)), strength))
    expected = 20.5 + 0.3 * strength * (np.arange(40) + 0.5)
    np.testing.assert_allclose(middle(out), expected, atol=0.02)
    below = [out.getpixel((x, 39)) for x in (0, 39)]
    assert below == ([(128,) * 3, (0,) * 3] if strength > 0 else [(0,) * 3, (128,) * 3])


@pytest.mark.parametrize("strength", [1.0, 0.7, -0.7])
@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
def test_translate_by_ten_pixels_of_256_at_most(name: str, strength: float) -> None:
    values = np.random.default_rng(1).integers(0, 256, (256, 256))
    out = levels(RANDAUGMENT_OPS[name](grey(values), strength))
    if name == "translate_y":
        values, out = values.T, out.T
    by = round(10 * strength)
    moved, uncovered = (out[:, by:], out[:, :by]) if by > 0 else (out[:, :by], out[:, by:])
    np.testing.assert_array_equal(moved, values[:, : 256 - by] if by > 0 else values[:, -by:])
    assert (uncovered == 128).all() and uncovered.shape == (256, abs(by))


@pytest.mark.parametrize(("strength", "degrees"), [(1.0, 30), (0.7, 21), (-0.7, -21)])
def test_rotate_against_the_clock_by_thirty_degrees_at_most(strength: float, degrees: float) -> None:
    out = RANDAUGMENT_OPS["rotate"](red_column(65, wide=3), strength)
    top, bottom = (middle(out.crop((0, y, 65, y + 1)))[0] for y in (12, 52))
    assert (bottom - top) / 40 == pytest.approx(tan(np.radians(degrees)), abs=0.01)  # the top goes left
    assert (top + bottom) / 2 == pytest.approx(32.5, abs=0.02) and out.getpixel((0, 0)) == (128,) * 3


# --- how they are drawn ----------------------------------------------------------------------------------------------


def test_which_whether_and_sign() -> None:
    picture = noise()
    for place, (name, operation) in enumerate(RANDAUGMENT_OPS.items()):
        which = (place + 0.5) / len(RANDAUGMENT_OPS)
        for sign, strength in ((0.2, -0.7), (0.8, 0.7)):
            done = apply_randaugment(picture, 7, (RandAugmentParams(which, 0.49, sign),))
            assert done.tobytes() == operation(picture, strength).tobytes(), name
        assert apply_randaugment(picture, 7, (RandAugmentParams(which, 0.5, 0.2),)).tobytes() == picture.tobytes()
    twice = apply_randaugment(picture, 3, (RandAugmentParams(0.35, 0.0, 0.9), RandAugmentParams(0.95, 0.0, 0.1)))
    assert twice.tobytes() == RANDAUGMENT_OPS["rotate"](RANDAUGMENT_OPS["brightness"](picture, 0.3), -0.3).tobytes()


def test_all_ten_come_equally_often_and_half_are_applied() -> None:
    drawn = [chance for seed in range(2000) for chance in Augment(randaugment=(2, 7)).sample_params(seed).operations]
    often = Counter(int(chance.operation * len(RANDAUGMENT_OPS)) for chance in drawn)
    assert len(drawn) == 4000 and sorted(often) == list(range(10))
    assert 320 < min(often.values()) and max(often.values()) < 480
    assert 1880 < sum(chance.application < 0.5 for chance in drawn) < 2120
    assert 1880 < sum(chance.sign < 0.5 for chance in drawn) < 2120


def test_the_seed_decides_and_changes_no_other_luck() -> None:
    plain, more = Augment().sample_params(7), Augment(randaugment=(2, 7)).sample_params(7)
    luck = random.Random(7)
    numbers = [luck.random() for _ in range(17)]
    assert list(plain[:-1]) == list(more[:-1]) == numbers[:11], "as it was drawn before there was RandAugment"
    assert plain.operations == () and [n for chance in more.operations for n in chance] == numbers[11:]

    settings = {"crop_scale": (0.3, 0.9), "flip": 0.5, "rotate": 20.0, "contrast": 0.3}
    off, on = Augment(**settings), Augment(**settings, randaugment=(1, 7))
    picture, same = noise(), 0
    for seed in range(40):
        one, other = TRANSFORM.augmented(picture, off, seed), TRANSFORM.augmented(picture, on, seed)
        assert torch.equal(other, TRANSFORM.augmented(picture, on, seed))
        chance = on.sample_params(seed).operations[0]
        alike = torch.equal(one, other)
        assert alike or chance.application < 0.5, "what is not applied leaves all else as it was"
        same += alike
    assert 12 <= same <= 32, "half are not applied, and a tenth of the rest is the identity"


@pytest.mark.parametrize("value", [(0, 7), (2, 0), (2, 11), (-1, 7), (2, -7)])
def test_impossible_randaugment(value: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"randaugment = .* neither \(0, 0\), for off, nor .* from 1 to 10"):
        Augment(randaugment=value)
