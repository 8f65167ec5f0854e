"""Images that are the same to the byte run through a frozen part once, whatever pairs they are in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clasp.data.feature_cache.features import ImageReadSettings, image_features
from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.feature_cache.requests import ImageFeatureRequest
from clasp.data.images import Augment
from clasp.data.pairs import Pairs
from clasp.types import Pair, Pixels, PooledFeatures
from toypairs import TRANSFORM, small_pairs


class CountingPart(nn.Module):
    """A linear map of the pixels."""

    width, depth, tokens, layers = 5, 0, 1, ()

    def __init__(self, fingerprint: str = "part") -> None:
        super().__init__()
        self.fingerprint, self.encoded = fingerprint, 0
        self.map = torch.randn(192, self.width, generator=torch.Generator().manual_seed(0))

    def forward(self, inputs: Pixels) -> PooledFeatures:
        self.encoded += len(inputs.values)
        return PooledFeatures(inputs.values.flatten(1) @ self.map)


def features(part: CountingPart, pairs: list[Pair], cache: Path, *, reuse: bool = True, **views) -> CachedFeatures:
    request = ImageFeatureRequest(part, Pairs("small", [pairs]), TRANSFORM, **views)
    return image_features(request, ImageReadSettings(batch_size=4), cache_folder=cache, reuse=reuse)


def rows(found: CachedFeatures) -> Tensor:
    inputs = found.read(np.arange(len(found)))
    assert isinstance(inputs, PooledFeatures)
    return inputs.values


def copies(pairs: list[Pair]) -> list[Pair]:
    """The same images under other ids, with another time, in another order."""
    return [
        replace(pair, id=f"copy of {pair.id}", image=replace(pair.image, name="elsewhere.png", version="2"))
        for pair in reversed(pairs)
    ]


PAIRS = small_pairs(10)
REQUESTS = {
    "copies": (copies(PAIRS), 0),
    "a part of them": (PAIRS[3:8], 0),
    "with others": (small_pairs(12), 2),
    "twice": (copies(PAIRS) + PAIRS, 0),
    "others twice": ([*small_pairs(12)[10:], *copies(small_pairs(12)[10:])], 2),
    "with a damaged one": (small_pairs(12, damaged={11}) + 5 * copies(PAIRS), 1),  # one in fifty may be
}


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("first_reuse", [True, False])
def test_images_are_encoded_once(what: str, first_reuse: bool, tmp_path: Path):
    part, (pairs, new) = CountingPart(), REQUESTS[what]
    pairs = [replace(pair, id=f"{number} {pair.id}") for number, pair in enumerate(pairs)]
    features(part, PAIRS, tmp_path, reuse=first_reuse)
    assert part.encoded == len(PAIRS)
    found = rows(features(part, pairs, tmp_path))
    assert part.encoded == len(PAIRS) + new
    fresh = rows(features(CountingPart(), pairs, tmp_path / "fresh", reuse=False))
    torch.testing.assert_close(found, fresh, atol=1e-5, rtol=0, equal_nan=True)


def test_training_encodes_its_own_and_other_parts_are_not_mixed_up(tmp_path: Path):
    part, other = CountingPart(), CountingPart("another")
    features(part, PAIRS, tmp_path)
    features(part, copies(PAIRS), tmp_path, reuse=False)
    assert part.encoded == 2 * len(PAIRS), "the same bits, whatever was evaluated before"
    features(other, copies(PAIRS), tmp_path)
    assert other.encoded == len(PAIRS)
    features(part, PAIRS[:4], tmp_path, augment=Augment(crop_scale=(0.3, 0.9), flip=0.5), views=3)
    assert part.encoded == 2 * len(PAIRS) + 12


@pytest.mark.parametrize("file", ["*.npy", "*.images", "*.json"])
def test_a_damaged_file_costs_another_pass_and_no_error(file: str, tmp_path: Path):
    part = CountingPart()
    expected = rows(features(part, PAIRS, tmp_path))
    (damaged,) = (tmp_path / "features").glob(file)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    found = rows(features(part, copies(PAIRS), tmp_path))
    torch.testing.assert_close(found.flip(0), expected, atol=1e-5, rtol=0)
