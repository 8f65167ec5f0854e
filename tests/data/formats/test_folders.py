"""Folders: captions beside images, class folders, what lies between the two, and images without captions."""

import json
from pathlib import Path

import pytest

from bad_inputs import refused
from clasp.data.pairs import list_images, open_pairs
from clasp.types import Caption, UserError
from toydata import toys, write_classes, write_folder

TOYS = toys(13, seed=3)


def test_a_plain_folder_may_be_nested_and_hold_json_and_other_files(tmp_path: Path):
    write_folder(TOYS[:2], tmp_path / "deep" / "er")
    (tmp_path / "a.JPG").write_bytes(b"x")
    (tmp_path / "a.json").write_text(json.dumps({"captions": {"en": ["one", "two"], "sw": "moja"}, "year": 1999}))
    for left_behind in (".DS_Store", "._a.jpg", "README.txt", "deep/notes.pdf"):
        (tmp_path / left_behind).write_bytes(b"x")
    pairs = open_pairs(tmp_path)
    assert [pair.id for pair in pairs] == ["a.JPG", *sorted(f"deep/er/{toy.key}.png" for toy in TOYS[:2])]
    assert pairs[0].captions == (Caption("one", "en"), Caption("two", "en"), Caption("moja", "sw"))
    assert pairs[0].meta == {"year": 1999} and pairs[0].group == "a.JPG"


def test_class_folders_caption_their_images_and_each_image_is_a_group(tmp_path: Path):
    pairs = open_pairs(write_classes(TOYS, tmp_path))
    for pair in pairs:
        assert pair.captions == (Caption(pair.meta["class"]),) and pair.group == pair.id
        assert pair.id.split("/")[0] == pair.meta["class"].replace("a ", "a_").replace(" ", "-", 1)
    both = open_pairs(f"{write_classes(TOYS, tmp_path / 'one')}::{write_classes(TOYS, tmp_path / 'two')}")
    assert len({pair.group for pair in both}) == len({pair.id for pair in both}) == 2 * len(TOYS)
    assert sorted({pair.meta["label"] for pair in pairs}) == list(range(len({toy.caption for toy in TOYS})))


def test_folders_between_the_two_kinds_are_refused(tmp_path: Path):
    mixed = write_folder(TOYS[:2], tmp_path / "mixed")
    (mixed / "cat").mkdir()
    (mixed / "cat" / "1.jpg").write_bytes(b"x")
    refused(mixed, "mixes", "1 of 3 images have no .txt or .json", "cat/1.jpg")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "1.jpg").write_bytes(b"x")
    refused(flat, "no captions", "1 of 1 images", "1.jpg")
    deep = tmp_path / "deep"
    (deep / "train" / "cat").mkdir(parents=True)
    (deep / "train" / "cat" / "1.jpg").write_bytes(b"x")
    refused(deep, "one level down", "train/cat/1.jpg")
    unnamed = tmp_path / "unnamed"
    (unnamed / "_").mkdir(parents=True)
    (unnamed / "_" / "1.jpg").write_bytes(b"x")
    refused(unnamed, "'_'", "empty caption")
    twice = write_folder(TOYS[:1], tmp_path / "twice")
    (twice / f"{TOYS[0].key}.jpg").write_bytes(b"x")
    refused(twice, f"{TOYS[0].key}.jpg", f"{TOYS[0].key}.png", "one sample")


def test_folder_images_need_no_captions(tmp_path: Path):
    write_classes(TOYS, tmp_path)
    (tmp_path / "top.WEBP").write_bytes(b"w")
    (tmp_path / "notes.txt").write_bytes(b"no image")
    found = dict(list_images(tmp_path))
    assert len(found) == 14 and found["top.WEBP"].read() == b"w"
    assert {id: source.read() for id, source in found.items() if "/" in id} == {
        pair.id: pair.image.read() for pair in open_pairs(_without(tmp_path, "top.WEBP"))
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.pdf").touch()
    for path, wanted in (
        (empty, "found 1 .pdf"),
        (tmp_path / "top.webp", "does not exist"),
        (__file__, "not a folder"),
    ):
        with pytest.raises(UserError, match=wanted):
            list_images(path)


def _without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder
