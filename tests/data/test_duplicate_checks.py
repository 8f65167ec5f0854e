"""Near-duplicates: smaller and recompressed copies are found, other drawings are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from clasp.data import duplicate_checks
from clasp.data.duplicate_checks import check_near_duplicates
from clasp.data.images import thumbnail
from clasp.data.pairs import open_pairs
from clasp.types import no_progress_bar
from toydata import toys, write_folder

TOYS = toys(40, size=128)


def copy_of(png: bytes, side: int = 64, quality: int = 80) -> bytes:
    made = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").resize((side, side)).save(made, "JPEG", quality=quality)
    return made.getvalue()


def test_copies_are_nearer_than_other_drawings() -> None:
    originals = np.stack([unit(toy.png) for toy in TOYS])
    for side, quality in ((64, 80), (96, 60)):
        copies = np.stack([unit(copy_of(toy.png, side, quality)) for toy in TOYS])
        assert (originals * copies).sum(1).min() > duplicate_checks._MIN_CORRELATION
    assert np.triu(originals @ originals.T, 1).max() < duplicate_checks._MIN_CORRELATION


def unit(image: bytes) -> np.ndarray:
    values = np.asarray(thumbnail(image, duplicate_checks._SIDE), dtype=np.float32).reshape(-1)
    return (values - values.mean()) / np.linalg.norm(values - values.mean())


def test_copies_in_another_group_and_in_validation_are_found(tmp_path: Path) -> None:
    folders = [write_folder(some, tmp_path / name) for some, name in ((TOYS[:30], "train"), (TOYS[30:], "val"))]
    train, val = map(open_pairs, folders)
    report = check_near_duplicates(train, val, no_progress_bar)
    assert [finding.level for finding in report.findings] == ["ok"] and report.facts["compared"] == 40

    first = train[0].image.read()
    (folders[0] / train[3].id).write_bytes(copy_of(first))
    (folders[1] / val[1].id).write_bytes(copy_of(first, side=96, quality=60))
    (folders[1] / val[2].id).write_bytes(b"no image")
    report = check_near_duplicates(*map(open_pairs, folders), no_progress_bar)
    assert report.facts["pairs_of_images"] == 3 and report.facts["leaked_into_validation"] == 1
    duplicates, leaked = (finding.text for finding in report.findings)
    assert duplicates.startswith("2 are nearly the picture of another group") and train[0].id in duplicates
    assert leaked.startswith("1 to validate on are near-duplicates of pictures trained on")


def test_blank_pictures_are_not_alike(tmp_path: Path) -> None:
    folder = write_folder(TOYS[:6], tmp_path / "pairs")
    for number in range(4):
        Image.new("RGB", (32, 32), (250, 250, 250 - number)).save(folder / open_pairs(folder)[number].id)
    pairs = open_pairs(folder)
    report = check_near_duplicates(pairs, pairs, no_progress_bar)
    assert report.facts["compared"] == 2 * 2 and [finding.level for finding in report.findings] == ["ok"]


def test_no_pairs_of_one_group(tmp_path: Path) -> None:
    folder = write_folder(TOYS[:4], tmp_path / "pairs")
    pairs = open_pairs(folder)
    assert check_near_duplicates(pairs, pairs, no_progress_bar).facts["pairs_of_images"] == 0
