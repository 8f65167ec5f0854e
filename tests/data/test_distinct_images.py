"""Pairs of one image: known by name and version, numbered by appearance, read by nobody."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from PIL import Image

from clasp.data.distinct_images import number_images
from clasp.data.pairs import Pairs, open_pairs
from clasp.types import Caption, Pair
from toypairs import MemorySource

NAMED = {
    "one a row": (["a1", "b1", "c1"], [0, 1, 2]),
    "side by side": (["b1", "b1", "a1", "a1"], [0, 0, 1, 1]),
    "apart": (["b1", "a1", "c1", "a1", "b1", "b1"], [0, 1, 2, 1, 0, 0]),
    "of two versions": (["a1", "a2", "a1"], [0, 1, 0]),
    "of two names": (["a1", "b1", "a1"], [0, 1, 0]),
    "no pairs": ([], []),
}


def pairs_of(images: list[str]) -> Pairs:
    sources = [MemorySource(name[0], b"", name[1:]) for name in images]
    return Pairs("p", [[Pair(str(at), source, (Caption("x"),), "g") for at, source in enumerate(sources)]])


@pytest.mark.parametrize("case", NAMED)
def test_images_are_numbered_by_name_and_version(case: str):
    images, numbers = NAMED[case]
    pairs = pairs_of(images)
    assert pairs.images.entry.tolist() == numbers
    assert pairs.images.pairs.ids[:] == [str(numbers.index(number)) for number in sorted(set(numbers))]
    for number in set(numbers):
        assert pairs.images.pairs_with(number) == [at for at, other in enumerate(numbers) if other == number]
    assert not any(pair.image.reads for pair in pairs), "an image was read"


def test_many_numbers_are_those_of_a_dictionary():
    images = [f"{chr(97 + number * 7919 % 26)}{number * 104729 % 37}" for number in range(3000)]
    seen: dict[str, int] = {}
    assert pairs_of(images).images.entry.tolist() == [seen.setdefault(image, len(seen)) for image in images]


def test_images_of_the_first_rows_are_themselves():
    pairs = pairs_of(["b1", "a1", "b1"])
    first = pairs.images.pairs
    assert first.images.pairs is first and first.version == pairs.subset([0, 1]).version != pairs.version


def test_a_subset_and_a_copy_for_a_worker_number_their_own():
    pairs = pairs_of(["b1", "a1", "b1", "a1"])
    assert pairs.images.entry.tolist() == [0, 1, 0, 1]
    assert pairs[1:].images.entry.tolist() == [0, 1, 0]
    plain, numbered = pickle.dumps(pairs_of(["b1", "a1", "b1", "a1"])), pickle.dumps(pairs)
    assert len(plain) == len(numbered) and pickle.loads(numbered).images.entry.tolist() == [0, 1, 0, 1]


def test_rows_of_a_table_name_files(tmp_path: Path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "p.csv").write_text("filepath,title\na.png,one\nb.png,two\na.png,three\n")
    assert number_images(open_pairs(tmp_path / "p.csv")).entry.tolist() == [0, 1, 0]
