"""Layers as columns of one cache file: a tower with some of the layers reads the bits that it would compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clasp.data.feature_cache.features import ImageReadSettings, image_features, text_features
from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.feature_cache.requests import ImageFeatureRequest, TextFeatureRequest
from clasp.data.images import ImageTransform
from clasp.data.pairs import Pairs
from clasp.models.cache_policy import CachePolicy
from clasp.models.frozen import FrozenTower
from clasp.models.tower import Tower
from clasp.models.tuning.spec import freeze_except
from clasp.plain_types import StorageDtype
from toypairs import small_pairs, word_tokenizer
from toytowers import base

PAIRS = Pairs("small", [small_pairs(9)])
TEXTS = ["a cat", "the red dog", "a", "two dog"]
TRANSFORM = ImageTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def tower(name: str, layers: Any = "all", **settings: Any) -> Tower:
    made = Tower(base(name), extra_layers=layers, **settings)
    freeze_except(made, [])
    return made


def request(made: Tower) -> ImageFeatureRequest | TextFeatureRequest:
    part = FrozenTower(made)
    if made.modality == "image":
        return ImageFeatureRequest(part, PAIRS, TRANSFORM)
    return TextFeatureRequest(part, word_tokenizer(), TEXTS)


def cached(made: Tower, cache: Path, storage: StorageDtype = "float32") -> CachedFeatures:
    asked = request(made)
    if isinstance(asked, ImageFeatureRequest):
        return image_features(asked, ImageReadSettings(batch_size=4), cache_folder=cache, storage=storage)
    return text_features(asked, cache_folder=cache, storage=storage)


def values(features: CachedFeatures) -> torch.Tensor:
    return features.read(np.arange(len(features))).values


def files(cache: Path) -> int:
    return len(list((cache / "features").glob("*.npy")))


@pytest.mark.parametrize(
    ("name", "some"), [("convnext", [1, 3]), ("convnext", [2]), ("convnext", []), ("vit", []), ("bert", [])]
)
def test_some_layers_are_columns_of_the_file_of_all(name: str, some: list[int], tmp_path: Path):
    fresh = values(cached(tower(name, some), tmp_path / "alone"))
    cached(tower(name), tmp_path / "all")
    replayed = cached(tower(name, some), tmp_path / "all")
    assert files(tmp_path / "all") == 1, "the tower ran again"
    assert torch.equal(values(replayed), fresh) and replayed.kept.width == fresh.shape[1]
    plan = CachePolicy(tmp_path / "all").plan(request(tower(name, some)))
    assert plan.file == replayed.kept.path and plan.bytes_to_write == 0


@pytest.mark.parametrize("settings", [{"pool": "cls"}, {"layer": 1, "layers": []}])
def test_another_pooling_or_depth_is_computed(settings: dict[str, Any], tmp_path: Path):
    cached(tower("vit"), tmp_path)
    cached(tower("vit", **settings), tmp_path)
    assert files(tmp_path) == 2


def test_more_layers_than_the_file_has_are_computed(tmp_path: Path):
    cached(tower("convnext", [1]), tmp_path)
    cached(tower("convnext", [1, 2]), tmp_path)
    cached(tower("convnext", [-1]), tmp_path)
    assert files(tmp_path) == 3
    assert CachePolicy(tmp_path).plan(request(tower("convnext"))).file is None


def test_rows_quantised_as_a_whole_are_not_cut(tmp_path: Path):
    cached(tower("convnext"), tmp_path, "int8")
    cached(tower("convnext", [1]), tmp_path, "int8")
    assert files(tmp_path) == 2


def test_a_damaged_file_of_all_layers_is_not_read(tmp_path: Path):
    whole = cached(tower("convnext"), tmp_path)
    fresh = values(cached(tower("convnext", [1]), tmp_path / "alone"))
    whole.kept.path.write_bytes(whole.kept.path.read_bytes()[:-1])
    assert torch.equal(values(cached(tower("convnext", [1]), tmp_path)), fresh) and files(tmp_path) == 2


def test_all_is_every_block_below_the_last():
    made = tower("convnext")
    assert made.extra_layers == (1, 2, 3, 4)[: len(made.pooled_layers) - 1]
    assert sum(width for _, width in made.pooled_layers) == made.width
    assert made.pooled_layers[0] == (len(made.pooled_layers), tower("convnext", []).width)
