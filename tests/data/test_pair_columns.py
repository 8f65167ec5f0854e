"""The columns of many pairs: those of the pairs, read once, stored, and a few bytes a row of memory."""

import errno
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from clasp.config.run_plan import hash_pairs
from clasp.data import pair_columns, pair_sequence
from clasp.data.formats import index_cache
from clasp.data.formats.tables import TextTable
from clasp.data.loader import BatchReader, PairLoader
from clasp.data.pairs import Pairs, open_pairs, split_by_group
from clasp.data.readers import LiveImageReader, LiveTextReader, PairIndex
from clasp.types import Pair, UserError
from toypairs import TRANSFORM, word_tokenizer

MANY = 50_000


def write_rows(file: Path, count: int) -> Path:
    """Rows in groups of two, of one to three captions in three languages, some given twice."""
    rows = (
        {
            "image": f"{number:07}.png",
            "group": f"g{number // 2}",
            "caption": [
                {"text": f"a w{number % 40} of {n}", "language": ("en", "sw", "")[n]} for n in range(1 + number % 3)
            ],
        }
        for number in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def slow_index(pairs: Pairs) -> tuple[list, ...]:
    """The obvious way: a dictionary of everything."""
    groups: dict[str, int] = {}
    texts: dict[str, int] = {}
    ids, group, caption, offsets = [], [], [], [0]
    for pair in pairs:
        ids.append(pair.id)
        group.append(groups.setdefault(pair.group, len(groups)))
        caption += [texts.setdefault(text, len(texts)) for text, _ in pair.captions]
        offsets.append(len(caption))
    return ids, group, caption, offsets, list(texts)


def fast_index(pairs: Pairs) -> tuple[list, ...]:
    index = PairIndex(pairs)
    return list(index.ids), index.group.tolist(), index.caption.tolist(), index.caption_offsets.tolist(), index.texts[:]


@pytest.fixture(params=["in memory", "stored"])
def some(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pairs:
    monkeypatch.setattr(pair_sequence, "MIN_STORED_PAIRS", 1 if request.param == "stored" else 1000)
    return open_pairs(write_rows(tmp_path / "pairs.jsonl", 60), cache=tmp_path / "cache")


def test_an_index_numbers_as_a_dictionary_does(some: Pairs):
    rng = np.random.default_rng(0)
    for pairs in (some, some[::-2], some.subset(rng.integers(0, 60, 90)), *split_by_group(some, 0.3)):
        assert fast_index(pairs) == slow_index(pairs)
        assert pairs.caption_counts.tolist() == [len(pair.captions) for pair in pairs]
        assert list(pairs.ids) == [pair.id for pair in pairs]


def test_languages_are_chosen_without_reading(some: Pairs):
    chosen = some.subset([5, 4, 0, 2]).in_languages(["sw", "de"])
    assert [pair.id for pair in chosen] == [some[5].id, some[4].id, some[2].id]
    assert [[caption.language for caption in pair.captions] for pair in chosen] == [["sw"]] * 3
    assert fast_index(chosen) == slow_index(chosen)
    assert str(chosen.skipped_files) == "passed over 1 × pair without a caption in sw, de (0000000.png)"
    assert some.count_languages() == {"en": 60, "sw": 40, "": 20} and chosen.count_languages() == {"sw": 3}
    assert len(some.in_languages(["de"])) == 0


def test_joined_tables_whose_ids_collide_have_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair_sequence, "MIN_STORED_PAIRS", 1)
    (tmp_path / "b").mkdir()
    one, two = write_rows(tmp_path / "a.jsonl", 6), write_rows(tmp_path / "b" / "a.jsonl", 6)
    for _ in range(2):
        for source in (one, f"{one}::{two}", two):
            pairs = open_pairs(source, cache=tmp_path / "cache")
            assert list(pairs.ids) == [pair.id for pair in pairs]
            assert fast_index(pairs) == slow_index(pairs)


def test_a_changed_table_has_new_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair_sequence, "MIN_STORED_PAIRS", 1)
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    for count in (7, 5, 9):
        pairs = open_pairs(write_rows(file, count), cache=cache)
        assert fast_index(pairs) == slow_index(pairs)


@pytest.fixture(scope="module")
def table(unchecked: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many pairs in csv, opened and indexed once."""
    folder = tmp_path_factory.mktemp("many")
    file = folder / "pairs.csv"
    file.write_text("filepath,title\n" + "".join(f"{n:07}.png,thing {n - n % 2}\n" for n in range(MANY)))
    start(file)
    return file


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """Without checks of types, which take most of the time where there are many rows."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def start(file: Path) -> tuple[Pairs, PairIndex, PairLoader]:
    train, val = split_by_group(open_pairs(file, cache=file.parent / "cache"), 0.01)
    index = PairIndex(train)
    hash_pairs(index, val)
    reader = BatchReader(index, LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer()))
    return train, index, PairLoader(reader, batch_size=1024, seed=0)


def test_a_warm_start_reads_no_pair_and_takes_few_bytes_a_row(table: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object) -> Pair:
        raise AssertionError("a pair was read")

    monkeypatch.setattr(TextTable, "__getitem__", never)
    tracemalloc.start()
    try:
        train, index, loader = start(table)
        order = loader._sample_indices(0, 0)
        picks = next(order)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 56 * MANY + 10**6 and peak < 64 * MANY + 4 * 10**6, "bytes a row, and blocks of texts"
    assert len(train) > 0.98 * MANY and index.ids.take(picks.pair) == train.subset(picks.pair).ids[:]
    assert len(index.texts) < 0.51 * MANY


def test_damaged_columns_are_read_again(table: Path, caplog: pytest.LogCaptureFixture):
    before = hash_pairs(start(table)[1], start(table)[0])
    largest = max((table.parent / "cache").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    train, index, _ = start(table)
    assert hash_pairs(index, train) == before and "damaged" in caplog.text and "another checksum" in caplog.text


def test_a_worker_gets_row_numbers_and_maps_offsets_and_columns(table: Path, monkeypatch: pytest.MonkeyPatch):
    train, *_ = start(table)
    assert len(pickle.dumps(train)) < 4 * MANY + 10_000
    there: Pairs = pickle.loads(pickle.dumps(train))
    assert there[5] == train[5] and there.ids[7] == train.ids[7]
    index = PairIndex(train)
    assert len(pickle.dumps(index)) < len(pickle.dumps(train)) + 1000
    assert fast_index(pickle.loads(pickle.dumps(index)).pairs) == fast_index(train)
    starts = train._joined.parts[0].starts  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(starts[3:])).tolist() == starts.tolist()[3:], "a part is another array"
    monkeypatch.setattr(index_cache, "_mapped_in_worker", index_cache._map_arrays)  # as in a new worker
    shutil.copytree(table.parent / "cache", table.parent / "kept")
    sent = pickle.dumps(train)
    shutil.rmtree(table.parent / "cache")
    with pytest.raises(UserError, match=r"index-.*\.arrow was deleted or damaged while it was in use"):
        pickle.loads(sent)
    (table.parent / "kept").rename(table.parent / "cache")


def test_a_worker_in_another_folder_maps_a_relative_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_cache, "_MIN_MAPPED_BYTES", 0)
    monkeypatch.setattr(index_cache, "_mapped_in_worker", index_cache._map_arrays)  # as in a new worker
    monkeypatch.chdir(tmp_path)
    arrays = index_cache.load_or_build_index(Path("cache"), ("toy", "source"), lambda: {"starts": np.arange(9)})
    sent = pickle.dumps(arrays["starts"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert pickle.loads(sent).tolist() == list(range(9))


def test_a_part_without_a_key_has_none_in_some_languages():
    class Unkeyed(list[Pair]):
        key = ()

    assert pair_sequence._InLanguages(Unkeyed(), ("sw",)).key == ()


def test_a_full_disk_and_a_read_only_one_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(pair_sequence, "MIN_STORED_PAIRS", 1)
    file = write_rows(tmp_path / "pairs.jsonl", 60)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"no space left to write .*index-.*\.arrow"):
        patch.setattr(index_cache, "_write_arrays", full)
        open_pairs(file, cache=tmp_path / "cache")
    pairs = open_pairs(file, cache=tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"no space left to write .*cache;"):
        patch.setattr(pair_columns.tempfile, "TemporaryFile", full)
        len(pairs.ids)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cache cannot be written: Read-only file"):
        patch.setattr(pair_columns.tempfile, "TemporaryFile", read_only)
        len(pairs.ids)
    assert fast_index(pairs) == slow_index(pairs)
