"""Pooled features of tables in which images have different numbers of captions, and some cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from clasp.commands import fit_run
from clasp.data.loader import BadSampleLimit, BatchReader
from clasp.data.readers import ImageBatch, ImageReader, PairIndex, SampleIndices
from clasp.models.dual_encoder import DualEncoder
from clasp.models.head_settings import HeadSettings
from clasp.training import initialize, pooled_features
from clasp.training import moments as moments_module
from clasp.training.initialize import initialize_heads, standardized_moments
from clasp.training.moments import PairMoments
from clasp.training.pooled_features import PairFeatures
from clasp.types import Pair, UserError
from toydata import toys
from toyruns import recipe, run, save_towers

COUNTS = [1, 3, 2, 5, 1, 1, 4, 2, 3, 1, 2, 2, 1, 1, 3, 2, 2, 1, 5, 4, 1, 2]
UNREADABLE = (2, 6)
WORDS = ("photo", "the", "an", "of", "photo of")


class CountingReader:
    """An image reader that notes which pairs it was asked for."""

    def __init__(self, reader: ImageReader):
        self.reader, self.asked = reader, list[int]()

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch:
        self.asked += indices.pair.tolist()
        return self.reader(indices, get_pair)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[DualEncoder, BatchReader]:
    """A model with fitted standardisation, and live readers of 21 pairs, two of whose images cannot be read."""
    folder, seen = tmp_path_factory.mktemp("unequal"), {}
    (folder / "images").mkdir()
    rows = []
    for number, (toy, count) in enumerate(zip(toys(len(COUNTS)), COUNTS, strict=True)):
        (folder / f"images/{number}.png").write_bytes(b"" if number in UNREADABLE else toy.png)
        rows.append({"image": f"images/{number}.png", "caption": [f"{word} {toy.caption}" for word in WORDS[:count]]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_towers(folder)
    given = ["head.init=cca", "head.width=3", "train.epochs=0", "data.feature_cache=off", "data.val_fraction=0.01"]

    def watched(model, sides, settings, tally, classes):
        initialize_heads(model, sides, settings, tally, classes)
        seen.update(model=model, sides=sides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASP_CACHE", str(folder / "cache"))
        patch.setattr(fit_run, "initialize_heads", watched)
        run(recipe(folder, folder / "pairs.jsonl", *given), folder / "run")
    return seen["model"], seen["sides"]


def tally() -> BadSampleLimit:
    return BadSampleLimit(len(COUNTS), 0.5)


@pytest.mark.parametrize("wide", [10_000, 4], ids=["float64", "float32"])
def test_the_moments_are_those_of_every_caption_with_its_image(
    opened: tuple[DualEncoder, BatchReader], wide: int, monkeypatch: pytest.MonkeyPatch
):
    model, sides = opened
    assert isinstance(sides.pairs, PairIndex)
    monkeypatch.setattr(pooled_features, "_PAIRS_AT_ONCE", 5)
    monkeypatch.setattr(pooled_features, "_PAIRS_IN_A_READ", 2)
    monkeypatch.setattr(moments_module, "WIDE", wide)
    counts = np.diff(sides.pairs.caption_offsets)
    image, text = model.image_head.standardize, model.text_head.standardize
    assert image is not None and text is not None
    features, slowly = PairFeatures(model, sides, sides.pairs, tally()), []
    for draw in range(max(COUNTS)):
        images, texts = features.rows(np.flatnonzero(counts > draw), draw)
        slowly.append((image(images).detach(), text(texts).detach()))
    counting = CountingReader(sides.image)
    found, wanted = standardized_moments(model, replace(sides, image=counting), tally()), PairMoments.of(iter(slowly))
    assert found.weight == wanted.weight > len(COUNTS)
    for name in ("image", "text", "image_image", "image_text", "text_text"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-3)
    assert sorted(counting.asked) == list(range(len(sides.pairs))), "each image once"


def test_images_of_which_none_can_be_read_are_one_line(
    opened: tuple[DualEncoder, BatchReader], monkeypatch: pytest.MonkeyPatch
):
    model, sides = opened
    assert isinstance(sides.pairs, PairIndex)
    bad = np.array([row for row in range(len(sides.pairs)) if not sides.pairs[row].image.read()])
    assert len(bad) == len(UNREADABLE)
    monkeypatch.setattr(initialize, "_evenly_spaced", lambda index, most: bad)
    with pytest.raises(
        UserError, match=r"none of the images that the heads are initialised from can be read: .*2\.png"
    ):
        initialize_heads(model, sides, HeadSettings(standardize=True), tally())
