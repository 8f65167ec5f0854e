"""Pairs that name one image: its features are computed and stored once, and every pair has the bits it had alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clasp.data.feature_cache import arrays as cache_module
from clasp.data.feature_cache.arrays import load_or_compute
from clasp.data.feature_cache.features import ImageReadSettings, image_features
from clasp.data.feature_cache.replay import CachedFeatures, CachedImageReader
from clasp.data.feature_cache.requests import ImageFeatureRequest
from clasp.data.images import Augment
from clasp.data.loader import BatchReader, PairLoader
from clasp.data.pairs import Pairs
from clasp.data.readers import LiveImageReader, LiveTextReader, PairIndex
from clasp.types import Caption, HiddenStates, Pair, Pixels, PooledFeatures, UserError
from toypairs import TRANSFORM, MemorySource, png, word_tokenizer

AUGMENT = Augment(crop_scale=(0.3, 0.9), flip=0.5)
IMAGES, CAPTIONS = 7, 5


class Part(nn.Module):
    """A linear map of the pixels: pooled, or the states of two tokens."""

    width, layers, fingerprint = 5, (), "part"

    def __init__(self, depth: int = 0) -> None:
        super().__init__()
        self.depth, self.tokens, self.seen = depth, 2 if depth else 1, 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(3 * 8 * 8, self.width * self.tokens)

    def forward(self, inputs: Pixels) -> PooledFeatures | HiddenStates:
        self.seen += len(inputs.values)
        values = self.linear(inputs.values.flatten(1))
        if not self.depth:
            return PooledFeatures(values)
        states = values.unflatten(1, (self.tokens, self.width))
        return HiddenStates(states, torch.ones(states.shape[:2], dtype=torch.bool), self.depth, 8)


def row(image: int, caption: int, *, damaged: Sequence[int] = ()) -> Pair:
    source = MemorySource(f"{image}.png", b"damaged" if image in damaged else png(image))
    return Pair(f"{image}#{caption}", source, (Caption(f"a w{image} " + "red " * caption),), f"{image}")


def table(*, captions: int = CAPTIONS, images: int = IMAGES, damaged: Sequence[int] = ()) -> Pairs:
    """A row for each caption; the rows of an image are apart."""
    rows = [row(image, caption, damaged=damaged) for caption in range(captions) for image in range(images)]
    return Pairs("table", [rows])


def features(part: Part, pairs: Pairs, cache: Path, *, batch_size: int = 4, progress=None, **views) -> CachedFeatures:
    request = ImageFeatureRequest(part, pairs, TRANSFORM, **views)
    reading = ImageReadSettings(batch_size, max_bad_fraction=0.5)
    return image_features(request, reading, cache_folder=cache, progress=progress)


def values(features: CachedFeatures, items: Sequence[int], view: int) -> Tensor:
    return features.read(np.array(items), view).values


def files(cache: Path) -> list[Path]:
    return sorted((cache / "features").glob("*.npy"))


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("views", [1, 3])
def test_each_image_once_to_the_bits_of_each_row_alone(tmp_path: Path, depth: int, views: int):
    settings = {"views": views, "augment": AUGMENT if views > 1 else None}
    part, done = Part(depth), list[tuple[int, int]]()
    pairs = table(damaged=[2])
    whole = features(part, pairs, tmp_path, progress=lambda *at: done.append(at), **settings)
    assert part.seen == views * (IMAGES - 1) and done[-1] == (views * IMAGES, views * IMAGES)
    once = features(Part(depth), table(captions=1, damaged=[2]), tmp_path / "once", **settings)
    for view in range(views):
        for number, pair in enumerate(pairs):
            image = int(pair.id[0])
            assert np.array_equal(values(whole, [number], view), values(once, [image], view), equal_nan=True)
    one_by_one = features(Part(depth), pairs, tmp_path / "single", batch_size=1, **settings)
    for number, pair in enumerate(pairs):
        alone = features(Part(depth), Pairs("p", [[pair, row(6, 0)]]), tmp_path / pair.id, batch_size=1)
        assert np.array_equal(values(one_by_one, [number], 0), values(alone, [0], 0), equal_nan=True)


def test_the_first_rows_and_any_order_of_the_others_read_one_file(tmp_path: Path):
    """As an evaluation asks, which takes an image once."""
    pairs = table()
    features(Part(), pairs, tmp_path)
    shuffled = pairs.subset([*range(IMAGES), *np.random.default_rng(0).permutation(np.arange(IMAGES, len(pairs)))])
    for others in (pairs.subset(range(IMAGES)), shuffled):
        part = Part()
        found = features(part, others, tmp_path)
        reader = CachedImageReader(features(part, pairs, tmp_path), others)
        assert part.seen == 0 and len(files(tmp_path)) == 1
        for number, pair in enumerate(others):
            expected = values(found, [int(pair.id[0])], 0)
            assert torch.equal(values(found, [number], 0), expected)
            assert torch.equal(values(reader.features, [number], 0), expected)
    features(Part(), pairs.subset(range(len(pairs) - 1, -1, -1)), tmp_path)
    assert len(files(tmp_path)) == 2, "other images come first"


def test_a_file_with_a_row_for_each_pair_is_not_read_as_one_of_images(tmp_path: Path):
    """Such files were written before images were counted."""
    pairs = table()
    request = ImageFeatureRequest(Part(), pairs, TRANSFORM)
    assert (request.count, request.num_bytes("float32")) == (IMAGES, IMAGES * 5 * 4), "what doctor tells"
    folder, key = tmp_path / "features", {**request.key, "pairs": pairs.version}
    load_or_compute(folder, key, (len(pairs), 5), lambda writer: writer.notes.update(skipped=[], depth=0, size=8))
    part = Part()
    found = features(part, pairs, tmp_path)
    assert part.seen == IMAGES and len(files(tmp_path)) == 2 and values(found, range(len(pairs)), 0).all()


def test_a_table_of_other_images_has_its_own_file(tmp_path: Path):
    """Even where ids, sizes and times of all files are the same."""
    rows = list(table(captions=2, images=3))
    renamed = [Pair(pair.id, MemorySource(f"other {pair.image.name}", png(9)), pair.captions, "") for pair in rows]
    before, after = Pairs("p", [rows]), Pairs("p", [[*rows[:5], renamed[5]]])
    assert before.version == after.version, "the image of one row is another, its id and stamp are not"
    first, second = features(Part(), before, tmp_path), features(Part(), after, tmp_path)
    assert torch.equal(values(first, [2], 0), values(first, [5], 0))
    assert not torch.equal(values(second, [2], 0), values(second, [5], 0))


@pytest.mark.parametrize("views", [1, 3])
def test_a_build_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int):
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 0.0)
    pairs, settings = table(damaged=[0, 5]), {"views": views, "augment": AUGMENT if views > 1 else None}
    whole, part = features(Part(), pairs, tmp_path / "whole", **settings), Part()

    def interrupt(done: int, total: int) -> None:
        if done >= 4 * views:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(part, pairs, tmp_path, progress=interrupt, **settings)
    resumed = features(part, pairs, tmp_path, **settings)
    assert part.seen == views * (IMAGES - 2)
    assert np.array_equal(resumed.kept.stored, whole.kept.stored, equal_nan=True)
    assert resumed.unreadable == whole.unreadable
    assert set(resumed.unreadable) == {at for at, pair in enumerate(pairs) if pair.id[0] in "05"}


def test_replay_skips_every_row_of_an_unreadable_image_as_live_reading_does(tmp_path: Path):
    pairs = table(damaged=[3])
    text = LiveTextReader(word_tokenizer())
    settings = {"batch_size": 6, "seed": 1, "max_bad_fraction": 0.5}
    cached = CachedImageReader(features(Part(), pairs, tmp_path), pairs)
    replays = [PairLoader(BatchReader(some, cached, text), **settings) for some in (PairIndex(pairs), pairs)]
    for replay in replays:
        live = PairLoader(BatchReader(pairs, LiveImageReader(TRANSFORM), text), **settings)
        for one, two in zip(live.epoch(0), replay.epoch(0), strict=True):
            assert (one.ids, one.skipped) == (two.ids, two.skipped)
            assert isinstance(one.image, Pixels) and isinstance(two.image, PooledFeatures)
            with torch.no_grad():
                assert torch.allclose(Part()(one.image).values, two.image.values, atol=1e-6)


def test_too_many_unreadable_pairs_stop_before_training_as_they_would_in_it(tmp_path: Path):
    pairs = table(images=20, damaged=[4])
    reading = ImageReadSettings(4, max_bad_fraction=0.02)
    with pytest.raises(UserError, match=r"5 of 100 images cannot be read.*4#0 \(not an image.*4#4 \(not an image"):
        image_features(ImageFeatureRequest(Part(), pairs, TRANSFORM), reading, cache_folder=tmp_path)
    with pytest.raises(UserError, match="of 100 images cannot be read"):
        reader = BatchReader(pairs, LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer()))
        list(PairLoader(reader, batch_size=10, seed=0).epoch(0))
