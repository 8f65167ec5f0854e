"""Batches: order and choices from (seed, epoch, index) alone, bad samples named, nothing hangs."""

from __future__ import annotations

import gc
import os
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from clasp.data.images import Augment
from clasp.data.loader import (
    BadSampleLimit,
    BatchReader,
    PairLoader,
    PartReader,
    iter_image_batches,
    iter_text_batches,
    philox_integers,
)
from clasp.data.pairs import open_pairs
from clasp.data.readers import ImageBatch, LiveImageReader, LiveTextReader, PairIndex, SampleIndices
from clasp.data.workers import WorkerPool
from clasp.types import Batch, Caption, Pair, Pixels, PooledFeatures, SkippedSample, Tokens, UserError
from toypairs import TRANSFORM, MemorySource, MissingSource, SlowSource, png, small_pairs, word_tokenizer

AUGMENT = Augment(crop_scale=(0.5, 1.0), flip=0.5)
FIRST_DRAWS = [129745503399974868, 2377483205311176162, 4349422948805191298]


def batches(pairs: Sequence[Pair], **settings) -> PairLoader:
    settings = {"batch_size": 4, "seed": 3} | settings
    augment = settings.pop("augment", None)
    return PairLoader(live_reader(pairs, augment), **settings)


def live_reader(pairs: Sequence[Pair], augment: Augment | None = None) -> BatchReader:
    return BatchReader(pairs, LiveImageReader(TRANSFORM, augment), LiveTextReader(word_tokenizer()))


def no_images(picks: SampleIndices, read: Callable[[int], Pair]) -> ImageBatch:
    """Any function is a side."""
    return ImageBatch(PooledFeatures(torch.zeros(len(picks), 1)), list(range(len(picks))), ())


def pixels(batch: Batch) -> torch.Tensor:
    assert isinstance(batch.image, Pixels)
    return batch.image.values


def tokens(batch: Batch) -> Tokens:
    assert isinstance(batch.text, Tokens)
    return batch.text


def same(one: Batch, two: Batch) -> bool:
    return (
        (one.ids, one.skipped) == (two.ids, two.skipped)
        and torch.equal(pixels(one), pixels(two))
        and torch.equal(tokens(one).ids, tokens(two).ids)
        and torch.equal(tokens(one).mask, tokens(two).mask)
        and torch.equal(one.groups, two.groups)
    )


# --- random choices --------------------------------------------------------------------------------------------------


def test_draws_are_the_ones_they_always_were():
    # written down once: a change of these numbers would change every run, and no resumed one would be exact
    assert philox_integers((0, 0, 0), 3).tolist() == FIRST_DRAWS
    assert philox_integers((0, 0, 0), 1000)[:3].tolist() == FIRST_DRAWS
    assert philox_integers((0, 1, 0), 3).tolist() != FIRST_DRAWS
    assert philox_integers((0, 0, 0), 1000).min() >= 0


def test_an_epoch_is_a_shuffle_and_another_epoch_another():
    pairs = small_pairs(12)
    stream = batches(pairs)
    first = [id_ for batch in stream.epoch(0) for id_ in batch.ids]
    second = [id_ for batch in stream.epoch(1) for id_ in batch.ids]
    assert sorted(first) == sorted(second) == sorted(pair.id for pair in pairs)
    assert first != second
    assert first == [id_ for batch in batches(pairs).epoch(0) for id_ in batch.ids]
    assert first != [id_ for batch in batches(pairs, seed=4).epoch(0) for id_ in batch.ids]


def test_every_order_is_equally_likely():
    stream = PairLoader(BatchReader(small_pairs(3), no_images, LiveTextReader(word_tokenizer())), batch_size=3, seed=0)
    orders = Counter(next(stream.epoch(epoch)).ids for epoch in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 expected; 60 is 4.4 deviations below


def test_rows_are_what_the_slow_way_gives():
    pairs = small_pairs(10)
    by_id = {pair.id: pair for pair in pairs}
    tokenizer = word_tokenizer()
    for batch in batches(pairs, batch_size=5).epoch(2):
        for row, id_ in enumerate(batch.ids):
            pair = by_id[id_]
            assert torch.equal(pixels(batch)[row], TRANSFORM(pair.image.read()))
            ids = tokens(batch).ids[row][tokens(batch).mask[row]].tolist()
            assert [ids] in [tokenizer.encode([caption.text]) for caption in pair.captions]
        assert tokens(batch).mask.any(dim=0).all(), "padded to the longest, no further"


def test_a_drawn_caption_changes_with_the_epoch_and_all_come_up():
    pairs = [Pair("0", small_pairs(1)[0].image, tuple(Caption(f"w{i}") for i in range(4)), "0")]
    stream = PairLoader(BatchReader(pairs, no_images, LiveTextReader(word_tokenizer())), batch_size=1, seed=3)
    seen = Counter(int(tokens(batch).ids) for epoch in range(200) for batch in stream.epoch(epoch))
    assert len(seen) == 4 and min(seen.values()) > 25  # 50 expected; 25 is 4.1 deviations below


def test_all_captions_are_samples():
    pairs = small_pairs(7)
    stream = batches(pairs, captions="all", batch_size=5, drop_last=False)
    captions = sum(len(pair.captions) for pair in pairs)
    assert stream.num_samples == captions and len(stream) == -(-captions // 5)
    tokenizer = word_tokenizer()
    expected = Counter((p.id, tuple(tokenizer.encode([c.text])[0])) for p in pairs for c in p.captions)
    got = Counter(
        (id_, tuple(ids[mask].tolist()))
        for batch in stream.epoch(0)
        for id_, ids, mask in zip(batch.ids, tokens(batch).ids, tokens(batch).mask, strict=True)
    )
    assert got == expected


def test_augmentation_differs_between_epochs_and_repeats_with_the_seed():
    pairs = small_pairs(4)

    def by_id(epoch: int) -> dict[str, torch.Tensor]:
        batch = next(batches(pairs, augment=AUGMENT).epoch(epoch))
        return dict(zip(batch.ids, pixels(batch), strict=True))

    zero, one = by_id(0), by_id(1)
    assert all(torch.equal(zero[id_], value) for id_, value in by_id(0).items())
    assert not any(torch.equal(zero[id_], one[id_]) for id_ in zero)


def test_the_number_of_workers_changes_nothing():
    pairs = small_pairs(14, damaged={5})
    settings = {"augment": AUGMENT, "batch_size": 4}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    here, there = batches(pairs, **settings), batches(pairs, **settings, workers=2)
    for epoch in (0, 1):
        expected, got = list(here.epoch(epoch)), list(there.epoch(epoch))
        assert len(expected) == len(got) == len(here)
        assert all(same(one, two) for one, two in zip(expected, got, strict=True))
    # an epoch that was left is no trouble for the next, and workers start in the middle of one too
    assert same(next(there.epoch(2)), next(here.epoch(2)))
    assert same(next(there.epoch(3, start=2)), next(here.epoch(3, start=2)))
    assert here.bad_samples.found == there.bad_samples.found
    assert torch.equal(before, torch.get_rng_state()), "loading must not disturb the dropout of the main process"
    there.close()


def test_a_listing_gives_the_same_batches_as_its_pairs():
    pairs = small_pairs(11, damaged={2})
    for one, two in zip(batches(pairs).epoch(1), batches(PairIndex(pairs)).epoch(1), strict=True):
        assert same(one, two)


def test_start_reads_nothing_of_the_batches_before_it():
    pairs = small_pairs(12)
    whole = list(batches(pairs).epoch(0))
    again = small_pairs(12)
    late = list(batches(again).epoch(0, start=2))
    assert len(late) == 1 and same(late[0], whole[2])
    read = {pair.id for pair in again if isinstance(pair.image, MemorySource) and pair.image.reads}
    assert read == set(whole[2].ids)
    assert list(batches(pairs).epoch(0, start=3)) == []


# --- groups ----------------------------------------------------------------------------------------------------------


def test_groups_number_the_group_and_the_exact_caption():
    def pair(number: int, caption: str, group: str) -> Pair:
        return Pair(str(number), small_pairs(1)[0].image, (Caption(caption),), group)

    pairs = [pair(0, "a cat", "x"), pair(1, "a cat", "y"), pair(2, "A cat", "x"), pair(3, "dog", "z")]
    batch = next(batches(pairs, batch_size=4).epoch(0))
    rows = {int(id_): row.tolist() for id_, row in zip(batch.ids, batch.groups, strict=True)}
    assert rows[0][0] == rows[2][0] and len({rows[number][0] for number in (0, 1, 3)}) == 3
    assert rows[0][1] == rows[1][1] and len({rows[number][1] for number in (0, 2, 3)}) == 3


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_a_batch_are_the_batch(size: int):
    pairs = small_pairs(9)
    pairs[1] = Pair(pairs[1].id, pairs[1].image, pairs[0].captions, pairs[0].group, pairs[1].meta)
    reader = live_reader(pairs)
    parts = [
        PairLoader(PartReader(pairs, reader.image, reader.text, rank, size), batch_size=9, seed=3)
        for rank in range(size)
    ]
    (whole,) = batches(pairs, batch_size=9).epoch(1)
    found = [next(iter(loader.epoch(1))) for loader in parts]
    assert sum((part.ids for part in found), ()) == whole.ids
    assert torch.equal(torch.cat([pixels(part) for part in found]), pixels(whole))
    groups = torch.cat([part.groups for part in found])
    for column in range(2):  # equal where they were equal, whatever the part
        same_before = whole.groups[:, None, column] == whole.groups[None, :, column]
        assert torch.equal(groups[:, None, column] == groups[None, :, column], same_before)


def test_a_batch_larger_than_the_data_is_an_error_that_names_both():
    with pytest.raises(UserError, match="batch = 64, and there are 5 samples"):
        batches(small_pairs(5), batch_size=64)
    with pytest.raises(UserError, match="batch = 0"):
        batches(small_pairs(5), batch_size=0)
    with pytest.raises(UserError, match="no pairs"):
        batches([], batch_size=1, drop_last=False)


def test_the_short_batch_at_the_end_is_dropped_or_kept():
    pairs = small_pairs(10)
    assert [len(batch.ids) for batch in batches(pairs).epoch(0)] == [4, 4]
    assert [len(batch.ids) for batch in batches(pairs, drop_last=False).epoch(0)] == [4, 4, 2]
    assert [len(batch.ids) for batch in batches(pairs, batch_size=10).epoch(0)] == [10]
    # whoever keeps short batches may have one alone
    assert [len(batch.ids) for batch in batches(pairs, batch_size=64, drop_last=False).epoch(0)] == [10]


# --- bad samples -----------------------------------------------------------------------------------------------------


def test_a_bad_sample_leaves_its_batch_and_is_named(tmp_path: Path):
    pairs = small_pairs(12, damaged={3})
    pairs[7] = Pair("gone", MissingSource(tmp_path / "gone.png"), pairs[7].captions, pairs[7].group)
    stream = batches(pairs)
    got = list(stream.epoch(0))
    named = {skipped.id: skipped.reason for batch in got for skipped in batch.skipped}
    assert set(named) == {"pair 3", "gone"}
    assert "not an image" in named["pair 3"] and "gone.png" in named["gone"]
    assert stream.bad_samples.found == named
    assert sum(len(batch.ids) for batch in got) == 10
    for batch in got:
        assert len(batch.ids) + len(batch.skipped) == 4
        assert (
            len(set(batch.ids)) == len(pixels(batch)) == len(tokens(batch).ids) == len(batch.groups) == len(batch.ids)
        )
    list(stream.epoch(1))
    assert stream.bad_samples.found == named, "met again, not counted again"


def test_pairs_on_disk_in_workers_with_a_file_that_went_away(tmp_path: Path):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png(number) if number != 2 else b"")
        (tmp_path / f"{number}.txt").write_text(f"a w{number}")
    pairs = open_pairs(tmp_path)
    (tmp_path / "5.png").unlink()
    here, there = batches(pairs, augment=AUGMENT), batches(pairs, augment=AUGMENT, workers=1)
    for one, two in zip(here.epoch(0), there.epoch(0), strict=True):
        assert same(one, two)
    there.close()
    assert there.bad_samples.found == here.bad_samples.found and set(there.bad_samples.found) == {"2.png", "5.png"}
    assert "5.png cannot be read: No such file" in there.bad_samples.found["5.png"]


READS: list[bytes] = []


@dataclass
class CountedSource:
    """A source whose reads are counted."""

    encoded: bytes
    name: str = ""
    version: str = ""

    def read(self) -> bytes:
        READS.append(self.encoded)
        return self.encoded


class HashedSource(CountedSource):
    """Equal ones have one hash."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(self.encoded)


@pytest.mark.parametrize(
    ("kind", "augment", "reads"),
    [(HashedSource, None, 2), (CountedSource, None, 4), (HashedSource, AUGMENT, 4), (CountedSource, AUGMENT, 4)],
)
def test_an_image_of_several_samples_is_decoded_once_unless_augmented(
    kind: type[CountedSource], augment: Augment | None, reads: int
):
    """To the bit of each alone; unreadable ones are named for each sample."""
    sources = [kind(png(0)), kind(png(0)), kind(png(1)), kind(b"bad"), kind(b"bad")]
    images = [(str(number), source, number) for number, source in enumerate([*sources, sources[0]])]
    reader = LiveImageReader(TRANSFORM, augment)
    READS.clear()
    together = reader.decode(images)
    assert len([encoded for encoded in READS if encoded != b"bad"]) == reads
    assert together.kept == [0, 1, 2, 5] and [each.id for each in together.skipped] == ["3", "4"]
    assert isinstance(together.inputs, Pixels)
    for place, row in enumerate(together.kept):
        alone = reader.decode([images[row]]).inputs
        assert isinstance(alone, Pixels) and torch.equal(together.inputs.values[place], alone.values[0])
        assert augment is not None or together.inputs.contents[place] == alone.contents[0]  # type: ignore[index]


def test_a_batch_may_be_empty_and_keeps_its_place():
    pairs = small_pairs(6, damaged={0, 1})
    for seed in range(100):
        got = list(batches(pairs, batch_size=2, seed=seed).epoch(0))
        assert len(got) == 3
        empty = [batch for batch in got if not batch.ids]
        if empty:
            assert pixels(empty[0]).shape == (0, 3, 8, 8) and tokens(empty[0]).ids.shape == (0, 0)
            assert empty[0].groups.shape == (0, 2) and len(empty[0].skipped) == 2
            return
    raise AssertionError("no seed put the two bad ones together")


def test_too_many_bad_samples_stop_the_run_with_the_list():
    stream = batches(small_pairs(100, damaged=set(range(0, 100, 7))), max_bad_fraction=0.1)
    with pytest.raises(UserError) as caught:
        list(stream.epoch(0))
    message = str(caught.value)
    assert "\n" not in message and "of 100 images cannot be read" in message and "max_bad_fraction = 0.1" in message
    assert message.count("(not an image") == 10 and " more" in message


def test_the_tally_counts_ids_and_allows_a_few():
    tally = BadSampleLimit(1000, 0.0)
    for _ in range(5):
        tally.add([SkippedSample("a", "x"), SkippedSample("b", "y"), SkippedSample("c", "z")])
    with pytest.raises(UserError, match=r"4 of 1,000 .* allows: a \(x\), b \(y\), c \(z\), d \(w\)$"):
        tally.add([SkippedSample("d", "w")])
    with pytest.raises(UserError, match="2 of 2"):
        BadSampleLimit(2, 0.5).add([SkippedSample("a", "x"), SkippedSample("b", "y")])
    large = BadSampleLimit(1000, 0.02)
    large.add([SkippedSample(str(number), "x") for number in range(20)])
    with pytest.raises(UserError, match=r"21 of 1,000 .* and 11 more$"):
        large.add([SkippedSample("one more", "x")])


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    """A worker is looked after every fifth of a second, and one that is to end has as long; else five seconds."""
    monkeypatch.setattr("clasp.data.workers._POLL_SECONDS", 0.2)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


def end_the_process(ask: int) -> int:
    os._exit(3)


def refuse(ask: int) -> int:
    raise UserError(f"no {ask} here")


def test_a_worker_that_hangs_becomes_an_error():
    pairs = [Pair(str(number), SlowSource(), (Caption("a"),), str(number)) for number in range(2)]
    stream = WorkerPool(live_reader(pairs), workers=1, timeout_seconds=1.0)
    one = SampleIndices(*np.zeros((3, 1), dtype=np.int64))
    with pytest.raises(UserError, match=r"workers = 1: .*timed out.*workers = 0"):
        next(stream([one, one]))
    del stream
    gc.collect()  # waits for the worker here, not in the midst of another test


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_becomes_an_error():
    with pytest.raises(UserError, match=r"workers = 1: .*exited unexpectedly"):
        list(WorkerPool(end_the_process, workers=1, timeout_seconds=60.0)([1]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_in_a_worker_stays_one_line(workers):
    with pytest.raises(UserError, match=r"^no 1 here$"):
        list(WorkerPool(refuse, workers=workers)([1]))


def test_one_pass_at_a_time():
    stream = batches(small_pairs(8))
    old = stream.epoch(0)
    next(old)
    next(stream.epoch(1))
    with pytest.raises(AssertionError, match="newer pass"):
        next(old)


# --- images or texts alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_images_come_in_order_with_the_ids_of_those_that_could_be_read(workers):
    pairs = small_pairs(7, damaged={1, 4, 5})
    bad: list[SkippedSample] = []
    got = list(
        iter_image_batches([(p.id, p.image) for p in pairs], TRANSFORM, 2, workers=workers, on_skipped=bad.extend)
    )
    assert [ids for ids, _ in got] == [["pair 0"], ["pair 2", "pair 3"], ["pair 6"]]
    assert [name for name, _ in bad] == ["pair 1", "pair 4", "pair 5"]
    assert torch.equal(got[1][1].values[1], TRANSFORM(pairs[3].image.read()))


def test_an_image_that_nobody_asks_about_is_in_the_log(caplog):
    list(iter_image_batches([("x", MemorySource("x", b""))], TRANSFORM, 2))
    assert "skipped x: not an image" in caplog.text


def test_texts_come_longest_first_and_can_be_put_back():
    texts = ["a", "the red cat", "two dog", "a a a a", "cat", "the dog"]
    tokenizer = word_tokenizer()
    got = list(iter_text_batches(texts, tokenizer, 4))
    assert sorted(place for places, _ in got for place in places) == list(range(6))
    assert [tuple(batch.ids.shape) for _, batch in got] == [(1, 4), (1, 3), (2, 2), (2, 1)], "at most four tokens"
    for places, batch in got:
        for place, ids, mask in zip(places, batch.ids, batch.mask, strict=True):
            assert [ids[mask].tolist()] == tokenizer.encode([texts[place]])
    assert list(iter_text_batches([], tokenizer, 2)) == []


def test_a_listing_holds_what_its_pairs_say():
    pairs = small_pairs(5)
    listing = PairIndex(pairs)
    assert list(listing.ids) == [pair.id for pair in pairs] and listing.group.tolist() == [0, 0, 1, 1, 2]
    for number, pair in enumerate(pairs):
        codes = listing.caption[listing.caption_offsets[number] : listing.caption_offsets[number + 1]]
        assert [listing.texts[code] for code in codes] == [caption.text for caption in pair.captions]
    assert len(set(listing.texts)) == len(listing.texts)
    assert list(pickle.loads(pickle.dumps(listing)).ids) == list(listing.ids)
    assert listing[3] is pairs[3] and len(listing) == 5


def test_reading_is_lazy():
    pairs = small_pairs(8)
    assert list(islice(batches(pairs).epoch(0), 1))
    assert sum(len(p.image.reads) for p in pairs if isinstance(p.image, MemorySource)) == 4
    assert np.unique(philox_integers((1, 2), 1000)).size == 1000
