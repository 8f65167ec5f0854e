"""Pooled outputs of a frozen tower, computed once, kept on disk, replayed as one side of a batch.

In: a tower and the images or captions it shall see. Out: ``Features``, memory-mapped float32 rows under a key of all
that decides them: tower, transform or tokenizer, pairs or texts, augmentation. Unusual: a caption is encoded once
however often it repeats, and captions longest first; an image may have several augmented views; an unreadable image
has NaN rows, is named in the file and skipped at replay. What is left for other kinds of features (token states at a
frozen boundary) is another ``pooled_*`` and another side; ``cache`` and the picks stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.batches import Tally, draws, text_batches
from clasp.data.cache import Kept, Writer, cached
from clasp.data.images import Augment, ImageTransform
from clasp.data.pairs import Pairs
from clasp.data.sides import ImageRows, Listing, LiveImages, Picks, TextRows
from clasp.data.text import Tokenizer
from clasp.data.workers import Stream
from clasp.types import Pair, Pixels, Pooled, Skipped, Tokens

Progress = Callable[[int, int], None]
Inputs = TypeVar("Inputs", contravariant=True)

_VIEW = 3  # what a stream of random numbers is for; the first three are those of ``batches``


@runtime_checkable
class Pooling(Protocol[Inputs]):
    """A frozen tower, in eval mode: ``Pixels`` or ``Tokens`` to one vector each."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever ``pooled`` could answer differently: with the weights, the pooling, the layer."""
        ...

    @property
    def width(self) -> int:
        """``D`` of the pooled output."""
        ...

    def pooled(self, inputs: Inputs) -> Float[Tensor, "B D"]: ...


@dataclass(frozen=True, eq=False)
class Features:
    """Rows on disk, and which of them belongs to which item (pair or text) they were asked for."""

    kept: Kept
    """``rows views D``, memory-mapped; view 0 is the plain one. Its ``about`` is what the ``.json`` says."""
    index: Int[np.ndarray, " items"]
    """The row of each item."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def views(self) -> int:
        """How many times each item was encoded."""
        return self.kept.values.shape[1]

    @property
    def width(self) -> int:
        """``D``."""
        return self.kept.values.shape[2]

    @cached_property
    def skipped(self) -> dict[int, Skipped]:
        """Item -> why it has no features."""
        return {item: Skipped(name, reason) for item, name, reason in self.kept.about["skipped"]}

    def take(self, items: Int[np.ndarray, " B"], view: Int[np.ndarray, " B"] | int = 0) -> Float[Tensor, "B D"]:
        """A copy of the rows of ``items`` in memory, each in its ``view``."""
        return torch.from_numpy(np.asarray(self.kept.values[self.index[items], view]))


# --- replay ----------------------------------------------------------------------------------------------------------


class CachedImages:
    """An image side that looks rows up; the views of an image take turns by the seed of the pick.

    ``pairs`` are those of the batch. Raises ``ValueError`` when the features are of other pairs.
    """

    def __init__(self, features: Features, pairs: Pairs) -> None:
        if features.kept.about["key"].get("pairs") != pairs.version:
            raise ValueError(f"{features.kept.path} holds features of other pairs than these")
        self._features = features

    def __call__(self, picks: Picks, read: Callable[[int], Pair]) -> ImageRows:
        features, numbers = self._features, picks.pair.tolist()
        skipped = tuple(features.skipped[number] for number in numbers if number in features.skipped)
        kept = [place for place, number in enumerate(numbers) if number not in features.skipped]
        picks = picks[kept] if skipped else picks
        return ImageRows(Pooled(features.take(picks.pair, picks.seed % features.views)), kept, skipped)


class CachedTexts:
    """A text side that looks rows up: ``listing`` is of the pairs of the batch.

    Raises ``ValueError`` when the features are not of exactly the texts in ``listing``.
    """

    def __init__(self, features: Features, listing: Listing) -> None:
        texts = _Texts(listing.texts)
        if features.kept.about["key"].get("texts") != texts.version:
            raise ValueError(f"{features.kept.path} holds features of other texts than these")
        # its own index: the texts may have been asked for in another order
        self._features = Features(features.kept, texts.index)
        self._listing = listing

    def __call__(self, picks: Picks, read: Callable[[int], Pair]) -> TextRows:
        texts = self._listing.caption_of(picks)
        return TextRows(Pooled(self._features.take(texts)), texts.tolist())


# --- computing, once -------------------------------------------------------------------------------------------------


def pooled_images(
    tower: Pooling[Pixels],
    pairs: Pairs,
    transform: ImageTransform,
    *,
    batch: int,
    cache: Path,
    progress: Progress | None = None,
    augment: Augment | None = None,
    views: int = 1,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    max_bad_fraction: float = 0.02,
) -> Features:
    """The features of every image, row i of pair i, in ``views`` views: the plain one, then augmented ones.

    ``progress(done, total)`` counts images times views, and is not called when nothing is computed. ``device`` is
    where the tower is. Raises ``UserError`` when too many images are unreadable or the disk is full.
    """
    assert views == 1 or augment is not None, "further views need an augmentation"
    key = {"what": "pooled image", "tower": tower.fingerprint, "transform": transform.fingerprint}
    key |= {"pairs": pairs.version, "views": views}
    if views > 1 and augment is not None:
        key |= {"augment": asdict(augment), "seed": seed}
    count = len(pairs)

    def fill(writer: Writer) -> None:
        tally = Tally(count, max_bad_fraction)
        skipped: dict[int, Skipped] = {}
        sides = [LiveImages(transform), *[LiveImages(transform, augment)] * (views - 1)]
        asks, done = _views(count, batch, views, seed), 0
        with closing(Stream(_ViewReader(pairs, sides), workers=workers)) as stream:
            for (view, picks), images in zip(asks, stream(asks), strict=True):
                tally.add(images.skipped)
                missing = sorted(set(range(len(picks))) - set(images.kept))
                skipped.update(zip(picks.pair[missing].tolist(), images.skipped, strict=True))
                values = np.full((len(picks), tower.width), np.nan, dtype=np.float32)
                if images.kept:
                    values[images.kept] = _array(tower.pooled(Pixels(images.inputs.values.to(device))))
                writer.write(picks.pair * views + view, values)
                done += len(picks)
                if progress is not None:
                    progress(done, count * views)
        writer.notes["skipped"] = [[number, *skipped[number]] for number in sorted(skipped)]

    with torch.inference_mode():
        return Features(cached(cache / "features", key, (count, views, tower.width), fill), np.arange(count))


def pooled_texts(
    tower: Pooling[Tokens],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch: int,
    cache: Path,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Features:
    """The features of every text; those that repeat are encoded once. The order of ``texts`` is not part of the key.

    ``progress(done, total)`` counts different texts, and is not called when nothing is computed. ``device`` is where
    the tower is. Raises ``UserError`` when the disk is full.
    """
    rows = _Texts(texts)
    count = len(rows.different)
    key = {"what": "pooled text", "tower": tower.fingerprint, "tokenizer": tokenizer.fingerprint, "texts": rows.version}

    def fill(writer: Writer) -> None:
        done = 0
        for places, tokens in text_batches(rows.different, tokenizer, batch):
            values = tower.pooled(Tokens(tokens.ids.to(device), tokens.mask.to(device)))
            writer.write(np.array(places), _array(values))
            done += len(places)
            if progress is not None:
                progress(done, count)
        writer.notes["skipped"] = []

    with torch.inference_mode():
        return Features(cached(cache / "features", key, (count, 1, tower.width), fill), rows.index)


class _Texts:
    """Which row each text has: the different ones are sorted, so that their order in the data is of no account."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.different = sorted(set(texts))
        row = {text: number for number, text in enumerate(self.different)}
        self.index = np.array([row[text] for text in texts], dtype=np.int64)
        self.version = hashlib.sha256(json.dumps(self.different).encode()).hexdigest()


def _array(values: Float[Tensor, "B D"]) -> Float[np.ndarray, "B D"]:
    return values.float().cpu().numpy()


@dataclass(frozen=True, slots=True)
class _ViewReader:
    """One view of some images; runs in a worker where there are any."""

    pairs: Pairs
    sides: Sequence[LiveImages]

    def __call__(self, ask: tuple[int, Picks]) -> ImageRows:
        view, picks = ask
        return self.sides[view](picks, self.pairs.__getitem__)


def _views(count: int, batch: int, views: int, seed: int) -> list[tuple[int, Picks]]:
    """Every image in every view, a batch at a time; all views of some images, then the next images."""
    order = np.arange(count)
    all_ = [Picks(order, np.zeros_like(order), draws((seed, view, _VIEW), count)) for view in range(views)]
    return [(view, all_[view][at : at + batch]) for at in range(0, count, batch) for view in range(views)]
