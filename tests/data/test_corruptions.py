"""Corruptions against the formulas of ImageNet-C's ``make_imagenet_c.py``, written out here."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from clasp.data.corruptions import CORRUPTIONS, CorruptedImage, corrupt
from clasp.types import ImageSource
from toydata import draw

SEVERITIES = range(1, 6)


class Drawn:
    name, version = "drawn.png", "7"

    def read(self) -> bytes:
        file = io.BytesIO()
        draw("ring", "purple", size=300).resize((300, 260)).save(file, "PNG")
        return file.getvalue()


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Every value of every channel, some of it black."""
    chance = np.random.default_rng(0)
    found = chance.integers(0, 256, (224, 224, 3)) / 255
    found[:20] = 0
    return found


def as_bytes(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255).astype(np.uint8))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_what_needs_no_chance(severity: int, values: np.ndarray):
    from colorsys import hsv_to_rgb, rgb_to_hsv

    c = [0.4, 0.3, 0.2, 0.1, 0.05][severity - 1]
    means = np.mean(values, axis=(0, 1), keepdims=True)
    np.testing.assert_allclose(corrupt(values, "contrast", severity, 0), np.clip((values - means) * c + means, 0, 1))

    c = [0.1, 0.2, 0.3, 0.4, 0.5][severity - 1]
    found = corrupt(values, "brightness", severity, 0)
    for row in (0, 30, 200):  # black ones too
        h, s, v = rgb_to_hsv(*values[row, 5])
        np.testing.assert_allclose(found[row, 5], hsv_to_rgb(h, s, min(1.0, v + c)), atol=1e-12)

    c = [0.6, 0.5, 0.4, 0.3, 0.25][severity - 1]
    there = as_bytes(values).resize((int(224 * c), int(224 * c)), Image.Resampling.BOX)
    expected = np.array(there.resize((224, 224), Image.Resampling.BOX)) / 255
    np.testing.assert_array_equal(corrupt(values, "pixelate", severity, 0), expected)

    file = io.BytesIO()
    as_bytes(values).save(file, "JPEG", quality=[25, 18, 15, 10, 7][severity - 1])
    expected = np.array(Image.open(file)) / 255
    np.testing.assert_array_equal(corrupt(values, "jpeg_compression", severity, 0), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_moments_of_its_formula(severity: int):
    grey = np.full((224, 224, 3), 0.5)
    count = grey.size
    deviations = {
        "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38][severity - 1],
        "shot_noise": (0.5 / [60, 25, 12, 5, 3][severity - 1]) ** 0.5,
        "speckle_noise": 0.5 * [0.15, 0.2, 0.35, 0.45, 0.6][severity - 1],
    }
    for name, deviation in deviations.items():
        found = corrupt(grey, name, severity, 1)
        inside = found[(found > 0) & (found < 1)]
        assert abs(np.median(found) - 0.5) < (0.2 if name == "shot_noise" else 5 * deviation / count**0.5 + 0.005)
        if deviation < 0.2:  # clipping changes little
            assert np.std(found) == pytest.approx(deviation, rel=0.03)
        assert len(inside) and 0 <= found.min() and found.max() <= 1
    found = corrupt(grey, "impulse_noise", severity, 1)
    share = [0.03, 0.06, 0.09, 0.17, 0.27][severity - 1]
    assert np.mean(found != 0.5) == pytest.approx(share, rel=0.05)
    assert np.mean(found == 1) == pytest.approx(np.mean(found == 0), rel=0.1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_image_is_a_source_of_its_own(name: str):
    source: ImageSource = CorruptedImage(Drawn(), name, 3)
    picture = Image.open(io.BytesIO(source.read()))
    assert picture.size == (224, 224) and source.read() == source.read()
    others = [CorruptedImage(Drawn(), name, severity) for severity in (1, 5)]
    assert len({source.version, Drawn.version, *(each.version for each in others)}) == 4
    clean = np.array(Image.open(io.BytesIO(Drawn().read())).resize((295, 256)).crop((35, 16, 259, 240)), dtype=float)
    far = [np.abs(np.array(Image.open(io.BytesIO(each.read())), dtype=float) - clean).mean() for each in others]
    assert far[0] < far[1] and source.read() != others[0].read()
