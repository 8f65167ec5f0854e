"""Features: encoded once, replayed as if live, never half a file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clasp.data.feature_cache import arrays as cache_module
from clasp.data.feature_cache.arrays import ArrayWriter, load_or_compute
from clasp.data.feature_cache.features import ImageReadSettings, image_features, text_features
from clasp.data.feature_cache.replay import CachedFeatures, CachedImageReader, CachedTextReader
from clasp.data.feature_cache.requests import ImageFeatureRequest, TextFeatureRequest
from clasp.data.images import Augment
from clasp.data.loader import BatchReader, PairLoader, iter_image_batches, philox_integers
from clasp.data.pairs import Pairs
from clasp.data.readers import LiveImageReader, LiveTextReader, PairIndex
from clasp.types import Batch, Pair, Pixels, PooledFeatures, SkippedSample, Tokens, UserError
from toypairs import TRANSFORM, word_tokenizer
from toypairs import small_pairs as pairs_of

AUGMENT = Augment(crop_scale=(0.3, 0.9), flip=0.5)


class ImageTower(nn.Module):
    """A linear map of the pixels; counts what it is asked."""

    width, depth, tokens, layers = 5, 0, 1, ()

    def __init__(self, fingerprint: str = "image tower") -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.calls: list[int] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(3 * 8 * 8, self.width)

    def forward(self, inputs: Pixels) -> PooledFeatures:
        return PooledFeatures(self.pooled(inputs))

    def pooled(self, inputs: Pixels) -> Tensor:
        self.calls.append(len(inputs.values))
        assert torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
        return self.linear(inputs.values.flatten(1))


class TextTower(nn.Module):
    """The mean of the words that are there."""

    width, depth, tokens, layers = 6, 0, 1, ()
    fingerprint = "text tower"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.words = nn.Embedding(50, self.width)

    def forward(self, inputs: Tokens) -> PooledFeatures:
        return PooledFeatures(self.pooled(inputs))

    def pooled(self, inputs: Tokens) -> Tensor:
        self.calls.append(tuple(inputs.ids.shape))
        mask = inputs.mask.unsqueeze(-1)
        return (self.words(inputs.ids) * mask).sum(1) / mask.sum(1)


def small_pairs(count: int, **settings) -> Pairs:
    return Pairs("small", [pairs_of(count, **settings)])


def images(
    tower: ImageTower, pairs: Pairs, cache: Path, *, batch_size: int = 4, workers: int = 0, progress=None, **views
) -> CachedFeatures:
    reading = ImageReadSettings(batch_size=batch_size, workers=workers)
    return image_features(
        ImageFeatureRequest(tower, pairs, TRANSFORM, **views), reading, cache_folder=cache, progress=progress
    )


def texts(tower: TextTower, said: Sequence[str], cache: Path, **settings) -> CachedFeatures:
    return text_features(TextFeatureRequest(tower, word_tokenizer(), said), cache_folder=cache, **settings)


def pooled(batch_side) -> Tensor:
    assert isinstance(batch_side, PooledFeatures)
    return batch_side.values


def the_file(cache: Path) -> Path:
    (path,) = (cache / "features").glob("*.npy")
    return path


# --- images ----------------------------------------------------------------------------------------------------------


def test_image_features_are_what_the_tower_says(tmp_path: Path):
    pairs, tower = small_pairs(10), ImageTower()
    features = images(tower, pairs, tmp_path)
    with torch.no_grad():
        live = [
            tower.pooled(inputs)
            for _, inputs in iter_image_batches([(p.id, p.image) for p in pairs], TRANSFORM, batch_size=4)
        ]
    assert torch.equal(pooled(features.read(np.arange(10))), torch.cat(live)), "same shapes, same bits"
    assert (len(features), features.views, features.kept.width) == (10, 1, 5) and features.unreadable == {}


def test_a_second_call_computes_nothing(tmp_path: Path):
    pairs, tower = small_pairs(10), ImageTower()
    done: list[tuple[int, int]] = []
    first = images(tower, pairs, tmp_path, progress=lambda *at: done.append(at))
    assert done == [(4, 10), (8, 10), (10, 10)] and tower.calls == [4, 4, 2]
    stamp = the_file(tmp_path).stat().st_mtime_ns
    second = images(tower, pairs, tmp_path, progress=lambda *at: done.append(at), batch_size=3)
    assert len(done) == len(tower.calls) == 3 and the_file(tmp_path).stat().st_mtime_ns == stamp
    assert np.array_equal(first.kept.stored, second.kept.stored)


def test_the_note_says_what_the_file_is(tmp_path: Path):
    pairs = small_pairs(200, damaged={3, 5})
    images(ImageTower(), pairs, tmp_path)
    about = json.loads(the_file(tmp_path).with_suffix(".json").read_text())
    assert about["key"]["what"] == "images" and about["key"]["part"] == "image tower"
    assert about["key"]["transform"] == TRANSFORM.fingerprint and about["key"]["pairs"] == pairs.version
    assert about["key"]["shape"] == [200, 5] and about["storage"] == "float32" and about["bytes"] == 4000
    assert [(row, name) for row, name, _ in about["skipped"]] == [(3, "pair 3"), (5, "pair 5")]
    assert "not an image" in about["skipped"][0][2]


def test_whatever_decides_the_values_has_its_own_file(tmp_path: Path):
    pairs, newer = small_pairs(4), small_pairs(4, version="2")
    images(ImageTower(), pairs, tmp_path)
    images(ImageTower(), newer, tmp_path)
    images(ImageTower("retrained"), pairs, tmp_path)
    images(ImageTower(), pairs, tmp_path, views=2, augment=AUGMENT)
    images(ImageTower(), pairs, tmp_path, views=3, augment=AUGMENT)
    images(ImageTower(), pairs, tmp_path, views=2, augment=AUGMENT, seed=1)
    images(ImageTower(), pairs, tmp_path, views=2, augment=Augment(flip=0.1))
    texts(TextTower(), ["a"], tmp_path)
    texts(TextTower(), ["a", "a cat"], tmp_path)
    assert len(list((tmp_path / "features").glob("*.npy"))) == 9
    # these decide nothing
    images(ImageTower(), pairs, tmp_path, batch_size=2, augment=AUGMENT, seed=9)
    texts(TextTower(), ["a cat", "a", "a"], tmp_path)
    assert len(list((tmp_path / "features").glob("*.npy"))) == 9


def test_views_are_the_plain_image_and_seeded_others(tmp_path: Path):
    pairs, tower = small_pairs(6, damaged={2}), ImageTower()
    done: list[tuple[int, int]] = []
    features = images(tower, pairs, tmp_path, views=3, augment=AUGMENT, seed=7, progress=lambda *at: done.append(at))
    assert done[-1] == (18, 18) and features.views == 3
    for view in range(3):
        for number, seed in enumerate(philox_integers((7, view, 3), 6).tolist()):
            got = pooled(features.read(np.array([number]), view))
            if number == 2:
                assert got.isnan().all()
                continue
            encoded = pairs[number].image.read()
            image = TRANSFORM.augmented(encoded, AUGMENT, seed) if view else TRANSFORM(encoded)
            with torch.no_grad():
                assert torch.allclose(got, tower.pooled(Pixels(image.unsqueeze(0))), atol=1e-6)
    assert len(np.unique(features.kept.stored[:3], axis=0)) == 3


def test_workers_change_nothing(tmp_path: Path):
    pairs = small_pairs(9, damaged={4})
    here = images(ImageTower(), pairs, tmp_path / "here", views=2, augment=AUGMENT)
    there = images(ImageTower(), pairs, tmp_path / "there", views=2, augment=AUGMENT, workers=1)
    assert here.kept.stored.tobytes() == there.kept.stored.tobytes() and here.unreadable == there.unreadable


def test_too_many_bad_images_stop_with_the_list_and_leave_nothing(tmp_path: Path):
    with pytest.raises(UserError, match=r"of 100 images cannot be read.*pair 0 \(not an image"):
        images(ImageTower(), small_pairs(100, damaged=set(range(20))), tmp_path)
    assert list((tmp_path / "features").iterdir()) == []


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_that_repeat_are_encoded_once_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tower = TextTower()
    said = ["a cat", "the red dog", "a cat", "a", "the red dog", "cat", "two cat", "dog"]
    done: list[tuple[int, int]] = []
    monkeypatch.setattr("clasp.data.feature_cache.features.TOKENS_PER_FORWARD", 6)
    features = texts(tower, said, tmp_path, progress=lambda *at: done.append(at))
    assert tower.calls == [(2, 3), (3, 2), (1, 1)] or tower.calls == [(1, 3), (2, 2), (3, 1)], tower.calls
    assert done[-1] == (6, 6)
    with torch.no_grad():
        slow = torch.cat([tower.pooled(word_tokenizer()([text])) for text in said])
    assert len(features) == 8 and torch.allclose(pooled(features.read(np.arange(8))), slow, atol=1e-6)


# --- replay ----------------------------------------------------------------------------------------------------------


def sides(pairs: Pairs, cache: Path):
    listing = PairIndex(pairs)
    image = CachedImageReader(images(ImageTower(), pairs, cache), pairs)
    text = CachedTextReader(texts(TextTower(), listing.texts, cache), listing)
    return listing, image, text


@pytest.mark.parametrize("captions", ["sample", "all"])
def test_replay_equals_encoding_live_whichever_side_is_cached(tmp_path: Path, captions):
    pairs = small_pairs(30, damaged={3, 11})
    listing, cached_image, cached_text = sides(pairs, tmp_path)
    live_image, live_text = LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer())
    image_tower, text_tower = ImageTower(), TextTower()

    def embedded(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            image = batch.image.values if isinstance(batch.image, PooledFeatures) else image_tower.pooled(batch.image)
            text = batch.text.values if isinstance(batch.text, PooledFeatures) else text_tower.pooled(batch.text)
        return image, text

    settings = {"batch_size": 6, "seed": 1, "captions": captions}
    live = PairLoader(BatchReader(pairs, live_image, live_text), **settings)
    replays = [
        PairLoader(BatchReader(listing, cached_image, cached_text), **settings),
        PairLoader(BatchReader(pairs, cached_image, cached_text), **settings),
        PairLoader(BatchReader(pairs, cached_image, live_text), **settings),
        PairLoader(BatchReader(pairs, live_image, cached_text), **settings),
    ]
    for replay in replays:
        for epoch in (0, 5):
            for one, two in zip(live.epoch(epoch), replay.epoch(epoch), strict=True):
                assert (one.ids, one.skipped) == (two.ids, two.skipped)
                assert torch.equal(one.groups, two.groups)
                for expected, got in zip(embedded(one), embedded(two), strict=True):
                    assert torch.allclose(expected, got, atol=1e-6)
        assert set(replay.bad_samples.found) == {"pair 3", "pair 11"}


def test_replay_is_bitwise_where_the_batches_have_the_same_shape(tmp_path: Path):
    pairs = small_pairs(8)
    listing, image, text = sides(pairs, tmp_path)
    tower = ImageTower()
    live = next(
        PairLoader(
            BatchReader(pairs, LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer())), batch_size=4, seed=0
        ).epoch(0)
    )
    cached = next(PairLoader(BatchReader(listing, image, text), batch_size=4, seed=0).epoch(0))
    assert isinstance(live.image, Pixels)
    with torch.no_grad():
        assert torch.equal(tower.pooled(live.image), pooled(cached.image))


def test_replay_reads_neither_images_nor_pairs(tmp_path: Path):
    in_memory = pairs_of(8)
    listing, image, text = sides(Pairs("small", [in_memory]), tmp_path)
    stream = PairLoader(BatchReader(listing, image, text), batch_size=4, seed=0)
    del in_memory[:]
    assert [len(batch.ids) for batch in stream.epoch(0)] == [4, 4]


def test_views_take_turns(tmp_path: Path):
    pairs = small_pairs(4)
    features = images(ImageTower(), pairs, tmp_path, views=3, augment=AUGMENT)
    stream = PairLoader(
        BatchReader(pairs, CachedImageReader(features, pairs), LiveTextReader(word_tokenizer())), batch_size=4, seed=0
    )
    number = {pair.id: at for at, pair in enumerate(pairs)}
    seen = set()
    for epoch in range(30):
        batch = next(stream.epoch(epoch))
        for id_, row in zip(batch.ids, pooled(batch.image), strict=True):
            views = torch.from_numpy(np.array(features.kept.stored[3 * number[id_] : 3 * number[id_] + 3]))
            seen.add((id_, int((views == row).all(dim=1).nonzero())))
    assert len(seen) == 12


def test_replay_in_workers(tmp_path: Path):
    pairs = small_pairs(8)
    _, image, text = sides(pairs, tmp_path)
    here = PairLoader(BatchReader(pairs, LiveImageReader(TRANSFORM), text), batch_size=4, seed=0)
    there = PairLoader(BatchReader(pairs, LiveImageReader(TRANSFORM), text), batch_size=4, seed=0, workers=1)
    for one, two in zip(here.epoch(0), there.epoch(0), strict=True):
        assert one.ids == two.ids and torch.equal(pooled(one.text), pooled(two.text))
    there.close()
    assert len(pickle.dumps(image)) < 2000 + len(pickle.dumps(np.arange(8))), "the map is not copied"


def test_features_of_other_pairs_or_texts_are_refused(tmp_path: Path):
    pairs = small_pairs(6)
    features = images(ImageTower(), pairs, tmp_path)
    with pytest.raises(ValueError, match="other pairs"):
        CachedImageReader(features, pairs.subset([1, 0, 2, 3, 4, 5]))
    with pytest.raises(ValueError, match="other texts"):
        CachedTextReader(texts(TextTower(), ["a"], tmp_path), PairIndex(pairs))
    with pytest.raises(ValueError, match="other texts"):
        CachedTextReader(features, PairIndex(pairs))
    # all the captions with their repeats, in any order, are the same texts
    listing = PairIndex(pairs)
    said = [caption.text for pair in reversed(pairs) for caption in pair.captions] * 2
    one = CachedTextReader(texts(TextTower(), said, tmp_path), listing)
    two = CachedTextReader(texts(TextTower(), listing.texts, tmp_path), listing)
    settings = {"batch_size": 6, "seed": 0}
    for a, b in zip(
        PairLoader(BatchReader(listing, CachedImageReader(features, pairs), one), **settings).epoch(0),
        PairLoader(BatchReader(listing, CachedImageReader(features, pairs), two), **settings).epoch(0),
        strict=True,
    ):
        assert torch.equal(pooled(a.text), pooled(b.text))


def test_replay_is_fast(tmp_path: Path):
    few = pairs_of(64)
    many = [Pair(str(number), few[number % 64].image, few[number % 64].captions, "") for number in range(5000)]
    pairs = Pairs("many", [many])
    listing, distinct = PairIndex(pairs), pairs.images
    key = {"pairs": distinct.pairs.version}
    kept = load_or_compute(tmp_path, key, (64, 128), lambda writer: writer.notes.update(skipped=[], depth=0))
    image = CachedImageReader(CachedFeatures(kept, distinct.entry, np.arange(65)), pairs)
    text = CachedTextReader(texts(TextTower(), listing.texts, tmp_path), listing)
    stream = PairLoader(BatchReader(listing, image, text), batch_size=256, seed=0)
    started = time.process_time()  # not the clock on the wall: the machine may be busy
    rows = sum(len(batch.ids) for epoch in range(4) for batch in stream.epoch(epoch))
    assert rows / (time.process_time() - started) > 20_000


# --- files -----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4)


def zeroed(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(200)
        file.write(bytes(40))


def foreign(path: Path) -> None:
    np.save(path, np.zeros((10, 1, 5), dtype=np.float32))


def text_file(path: Path) -> None:
    path.write_text("hello")


def no_note(path: Path) -> None:
    path.with_suffix(".json").unlink()


def broken_note(path: Path) -> None:
    path.with_suffix(".json").write_text('{"key": ')


def note_of_another(path: Path) -> None:
    note = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**note, "key": {}}))


@pytest.mark.parametrize("harm", [cut, zeroed, foreign, text_file, no_note, broken_note, note_of_another])
def test_a_damaged_or_foreign_file_is_computed_again_and_said_so(tmp_path: Path, caplog, harm):
    pairs, tower = small_pairs(10), ImageTower()
    before = np.array(images(tower, pairs, tmp_path).kept.stored)
    harm(the_file(tmp_path))
    assert caplog.text == ""
    after = images(tower, pairs, tmp_path)
    again = "10 of 10 rows are damaged; computing them again" if harm is zeroed else "computing it again"
    assert again in caplog.text and the_file(tmp_path).name in caplog.text
    assert np.array_equal(before, after.kept.stored) and len(tower.calls) == 6
    images(tower, pairs, tmp_path)
    assert len(tower.calls) == 6


def test_a_disk_without_space_is_found_before_any_compute(tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage._replace(free=199))
    tower = ImageTower()
    with pytest.raises(UserError, match=f"200 bytes in {tmp_path / 'features'}: No space left"):
        images(tower, small_pairs(10), tmp_path)
    assert tower.calls == [] and list((tmp_path / "features").iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_partial_file(tmp_path: Path, monkeypatch):
    write = ArrayWriter.write

    def full(self: ArrayWriter, rows: np.ndarray, values: Tensor) -> None:
        if rows[0] > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, rows, values)

    monkeypatch.setattr(ArrayWriter, "write", full)
    with pytest.raises(UserError, match=r"cannot keep 200 bytes in .*features: No space left on device"):
        images(ImageTower(), small_pairs(10), tmp_path)
    assert list((tmp_path / "features").iterdir()) == []


def interrupted_after(images_done: int):
    def interrupt(done: int, total: int) -> None:
        if done >= images_done:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("views", [1, 3])
def test_a_build_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int):
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 0.0)
    pairs, tower = small_pairs(20, damaged={1, 17}), ImageTower()
    settings = {"views": views, "augment": AUGMENT if views > 1 else None}
    whole = images(ImageTower(), pairs, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        images(tower, pairs, tmp_path, progress=interrupted_after(8 * views), **settings)
    assert not list((tmp_path / "features").glob("*.npy")), "there is never half a file under its name"
    before = sum(tower.calls)
    resumed = images(tower, pairs, tmp_path, **settings)
    assert sum(tower.calls) - before == 20 * views - 8 * views - views, "17 is damaged; what was done is not done again"
    assert np.array_equal(resumed.kept.stored, whole.kept.stored, equal_nan=True)
    assert resumed.unreadable == whole.unreadable and set(resumed.unreadable) == {1, 17}
    assert sorted(path.suffix for path in (tmp_path / "features").iterdir()) == [".json", ".npy"]


def test_a_part_that_lost_its_end_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 0.0)
    pairs, tower = small_pairs(20), ImageTower()
    with pytest.raises(KeyboardInterrupt):
        images(tower, pairs, tmp_path, progress=interrupted_after(12))
    (part,) = (tmp_path / "features").glob("*.part")
    os.truncate(part, 100)
    tower.calls.clear()
    images(tower, pairs, tmp_path)
    assert sum(tower.calls) == 20


def test_the_progress_of_a_part_that_is_gone_is_not_that_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As after a kill while a build of several seconds was given up."""
    pairs, tower = small_pairs(20), ImageTower()
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(KeyboardInterrupt):
        images(tower, pairs, tmp_path, progress=interrupted_after(12))
    (part,) = (tmp_path / "features").glob("*.part")
    part.unlink()
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 100.0)
    with pytest.raises(KeyboardInterrupt):
        images(tower, pairs, tmp_path, progress=interrupted_after(4))
    whole = images(ImageTower(), pairs, tmp_path / "whole")
    assert np.array_equal(images(tower, pairs, tmp_path).kept.stored, whole.kept.stored)


@pytest.mark.parametrize("views", [1, 2])
def test_a_build_goes_on_in_batches_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int):
    """The order of views depends on the size of batches, and they end elsewhere."""
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 0.0)
    pairs, settings = small_pairs(20), {"views": views, "augment": AUGMENT if views > 1 else None}
    for batch_size, done in ((4, 12 * views), (5, 0)):
        with pytest.raises(KeyboardInterrupt):
            images(ImageTower(), pairs, tmp_path, batch_size=batch_size, progress=interrupted_after(done), **settings)
    found = images(ImageTower(), pairs, tmp_path, batch_size=1, **settings)
    whole = images(ImageTower(), pairs, tmp_path / "whole", **settings)
    assert np.allclose(found.kept.stored, whole.kept.stored, atol=1e-5)


def test_texts_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr("clasp.data.feature_cache.features.TOKENS_PER_FORWARD", 2)
    tower, said = TextTower(), ["a cat", "the red dog", "a", "cat", "two cat", "dog"]
    with pytest.raises(KeyboardInterrupt):
        texts(tower, said, tmp_path, progress=interrupted_after(3))
    before = len(tower.calls)
    features = texts(tower, said, tmp_path)
    assert len(tower.calls) - before < before + 2
    whole = texts(TextTower(), said, tmp_path / "whole")
    assert torch.allclose(pooled(features.read(np.arange(6))), pooled(whole.read(np.arange(6))), atol=1e-6)


def test_two_processes_compute_once(tmp_path: Path):
    """The second waits for the first, then finds what it wanted."""
    with ThreadPoolExecutor(2) as pool:  # flock is by open file, so threads are as good as processes
        towers = [ImageTower(), ImageTower()]
        pairs = small_pairs(12)
        found = list(pool.map(lambda tower: images(tower, pairs, tmp_path), towers))
    assert sorted(sum(tower.calls) for tower in towers) == [0, 12]
    assert np.array_equal(found[0].kept.stored, found[1].kept.stored)


# --- storage ---------------------------------------------------------------------------------------------------------


ROUNDING = {"float32": 0, "float16": 2e-3, "bfloat16": 8e-3, "int8": 1 / 254}


@pytest.mark.parametrize(("storage", "error"), ROUNDING.items())
def test_each_storage_keeps_rows_to_its_rounding(tmp_path: Path, storage, error: float):
    values = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 50)[:, None]
    kept = load_or_compute(
        tmp_path, {"of": "test"}, (50, 24), lambda w: w.write(np.arange(50), values), storage=storage
    )
    again = load_or_compute(
        tmp_path, {"of": "test"}, (50, 24), lambda w: pytest.fail("computed twice"), storage=storage
    )
    rows = np.array([[3, 49], [0, 7]])
    got = again.take(rows).float()
    assert got.shape == (2, 2, 24) and len(kept) == 50 and kept.width == 24
    largest = values.abs().amax(dim=1)[torch.from_numpy(rows)][..., None]
    assert ((got - values[torch.from_numpy(rows)]).abs() <= error * largest).all()
    sizes = {"float32": 96, "float16": 48, "bfloat16": 48, "int8": 28}
    assert kept.metadata["bytes"] == 50 * sizes[storage] == kept.stored.nbytes


def test_rows_that_were_never_read_stay_nan_in_every_storage(tmp_path: Path):
    values = torch.full((2, 4), torch.nan)
    for storage in ROUNDING:
        kept = load_or_compute(tmp_path, {}, (2, 4), lambda w: w.write(np.arange(2), values), storage=storage)
        assert kept.take(np.arange(2)).isnan().all(), storage


def test_what_half_precision_cannot_hold_is_an_error(tmp_path: Path):
    values = torch.tensor([[1.0, 70000.0]])
    with pytest.raises(
        UserError, match=r"reach 7e\+04, which float16 cannot hold; set data.feature_cache = 'bfloat16'"
    ):
        load_or_compute(tmp_path, {}, (1, 2), lambda w: w.write(np.arange(1), values), storage="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "features").write_text("")
    with pytest.raises(UserError, match="features: File exists"):
        images(ImageTower(), small_pairs(4), tmp_path)


def test_what_is_skipped_is_known_after_reading_back(tmp_path: Path):
    pairs = small_pairs(10, damaged={6})
    images(ImageTower(), pairs, tmp_path)
    again = images(ImageTower(), pairs, tmp_path)
    assert list(again.unreadable) == [6] and "not an image" in again.unreadable[6]
    batch = next(
        PairLoader(
            BatchReader(pairs, CachedImageReader(again, pairs), LiveTextReader(word_tokenizer())), batch_size=10, seed=0
        ).epoch(0)
    )
    assert len(batch.ids) == 9 and not pooled(batch.image).isnan().any()
    assert batch.skipped == (SkippedSample("pair 6", again.unreadable[6]),)
