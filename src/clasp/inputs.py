"""What a model reads of some pairs: live pixels and tokens, or what the frozen part of a tower said of them once.

The one place that decides between the two, from the selection alone, for training and for evaluation alike. In go pairs
and a model with its transform and tokenizer, out come the sides of a batch and the streams that evaluations read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from clasp.data.batches import Tally, image_batches, log_skipped, text_batches
from clasp.data.device import on_device
from clasp.data.features import (
    ENCODED_AT_ONCE,
    CachedImages,
    CachedTexts,
    Features,
    Progress,
    bytes_of_images,
    bytes_of_texts,
    image_features,
    text_features,
)
from clasp.data.images import Augment, ImageTransform
from clasp.data.pairs import Pairs
from clasp.data.sides import ImageSide, Listing, LiveImages, LiveTexts, TextSide
from clasp.data.storage import Name as StorageName
from clasp.data.text import Tokenizer
from clasp.nn.frozen import Trunk, Whole, frozen_part
from clasp.nn.towers import Tower
from clasp.types import ImageInput, Pixels, Skipped, TextInput

FeatureChoice = Literal["auto", "off"] | StorageName

SHARE_OF_DISK = 0.25  # of what is free, which "auto" may fill with the states of a trunk
AT_ONCE = 256  # cached inputs of an evaluation in one call of what is left of a tower

Bar = Callable[[str], AbstractContextManager[Progress]]
Say = Callable[[str], None]


def no_bar(title: str) -> AbstractContextManager[Progress]:
    """Nobody is watching."""
    return nullcontext(lambda done, total: None)


class Inputs:
    """Reads pairs for one model.

    ``features`` decides whether what a tower's frozen part says is computed once and kept under ``cache``, and how it
    is written: "auto" keeps the vectors of a wholly frozen tower in float32, and the states of a trunk in float16 where
    they fill at most a quarter of the free disk. ``say`` hears what is kept, or why not; ``report`` hears of images
    that an evaluation could not read, once of each.
    """

    def __init__(
        self,
        *,
        image: Tower,
        text: Tower,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        features: FeatureChoice,
        cache: Path,
        bar: Bar = no_bar,
        say: Say = lambda line: None,
        report: Callable[[Iterable[Skipped]], None] = log_skipped,
        workers: int = 0,
        views: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.02,
    ):
        self.image, self.text = image, text
        self.transform, self.tokenizer = transform, tokenizer
        on = features != "off"
        self.image_part = frozen_part(image, transform.size) if on else None
        self.text_part = frozen_part(text, 0) if on else None
        self._features: FeatureChoice = features
        self._cache, self._bar, self._say, self._report = cache, bar, say, report
        self._workers, self._views, self._seed, self._max_bad = workers, views, seed, max_bad_fraction
        self._told: set[str] = set()
        self._ahead: list[tuple[dict[str, int], Features]] = []

    @property
    def all_pooled(self) -> bool:
        """Whether both towers are wholly frozen: all that is left of them are vectors, which cost nothing."""
        return isinstance(self.image_part, Whole) and isinstance(self.text_part, Whole)

    @cached_property
    def _device(self) -> torch.device:
        return next(self.image.parameters()).device

    # --- training ------------------------------------------------------------------------------------------------

    def image_side(self, pairs: Pairs, augment: Augment | None) -> ImageSide:
        """The image side of training batches. Augmented images are read anew, unless ``views`` of them are kept."""
        if augment is None or self._views:
            features = self.image_features(pairs, augment)
            if features is not None:
                return CachedImages(features, pairs)
        return LiveImages(self.transform, augment)

    def text_side(self, listing: Listing) -> TextSide:
        """The text side of training batches."""
        features = self.text_features(listing.texts)
        return LiveTexts(self.tokenizer) if features is None else CachedTexts(features, listing)

    def image_features(self, pairs: Pairs, augment: Augment | None = None) -> Features | None:
        """What the image tower's frozen part says of every image, computed at most once; ``None`` to read them live."""
        part, views = self.image_part, 1 + (self._views if augment else 0)
        if part is None:
            return None
        storage = self._storage(part, lambda name: bytes_of_images(part, len(pairs), views, name), "images")
        if storage is None:
            return None
        with self._bar(f"images of {Path(pairs.name).name} through {self.image.name}") as progress:
            return image_features(
                part,
                pairs,
                self.transform,
                batch=32,
                cache=self._cache,
                progress=progress,
                augment=augment if views > 1 else None,
                views=views,
                seed=self._seed,
                workers=self._workers,
                device=self._device,
                max_bad_fraction=self._max_bad,
                storage=storage,
            )

    def text_features(self, texts: Sequence[str]) -> Features | None:
        """What the text tower's frozen part says of every text, computed at most once; ``None`` to read them live."""
        part = self.text_part
        if part is None:
            return None
        for entries, features in self._ahead:
            if all(text in entries for text in texts):
                return replace(features, entry=np.array([entries[text] for text in texts], dtype=np.int64))
        storage = self._storage(part, lambda name: bytes_of_texts(part, self.tokenizer, texts, name), "captions")
        if storage is None:
            return None
        with self._bar(f"captions through {self.text.name}") as progress:
            features = text_features(
                part,
                self.tokenizer,
                texts,
                cache=self._cache,
                progress=progress,
                device=self._device,
                storage=storage,
            )
        self._ahead.append((dict(zip(texts, features.entry.tolist(), strict=True)), features))
        return features

    def read_ahead(self, texts: Iterable[str]) -> None:
        """Put the texts of many small questions through a frozen text tower at once; the questions then find them."""
        different = sorted(set(texts))
        if different:
            self.text_features(different)

    def _storage(self, part: Whole | Trunk, takes: Callable[[StorageName], int], what: str) -> StorageName | None:
        """How features are written, or ``None`` where they would take too much."""
        if self._features != "auto" and self._features != "off":
            return self._features
        if isinstance(part, Whole):
            return "float32"
        folder = next(folder for folder in (self._cache, *self._cache.parents) if folder.exists())
        free, size = shutil.disk_usage(folder).free, takes("float16")
        states = f"states of {what} after {part.depth} blocks of {part.tower.name}"
        if size > SHARE_OF_DISK * free:
            self._say(f"{states} are computed anew each time: {size:,} bytes of {free:,} that are free on disk")
            return None
        self._say(f"{states} are computed once and kept: {size:,} bytes in float16")
        return "float16"

    # --- evaluation ----------------------------------------------------------------------------------------------

    def images(self, pairs: Pairs) -> Callable[[], Iterable[tuple[Sequence[str], ImageInput]]]:
        """A stream of the images of ``pairs`` with their ids, to be read as often as one likes."""
        features = self.image_features(pairs)
        if features is None:
            tally = Tally(len(pairs), self._max_bad)
            return lambda: self._live_images(pairs, tally)
        self._tell(features.skipped.values())
        ids = [pairs[number].id for number in range(len(pairs))]
        readable = [number for number in range(len(pairs)) if number not in features.skipped]

        def cached() -> Iterable[tuple[Sequence[str], ImageInput]]:
            for part in _chunks(readable, AT_ONCE):
                inputs = features.read(np.array(part, dtype=np.int64))
                yield [ids[number] for number in part], on_device(inputs, self._device)

        return cached

    def texts(self, texts: Mapping[str, str]) -> Callable[[], Iterable[tuple[Sequence[str], TextInput]]]:
        """A stream of captions, given as id to text."""
        return lambda: self._read_texts(list(texts), list(texts.values()))

    def read(self, texts: Sequence[str]) -> Iterable[tuple[Sequence[str], TextInput]]:
        """A stream of texts that are their own ids (prompts of a zero-shot question)."""
        return self._read_texts(list(texts), list(texts))

    def _tell(self, skipped: Iterable[Skipped]) -> None:
        new = [sample for sample in skipped if sample.id not in self._told]
        self._told.update(sample.id for sample in new)
        self._report(new)

    def _live_images(self, pairs: Pairs, tally: Tally) -> Iterable[tuple[Sequence[str], Pixels]]:
        sources = [(pair.id, pair.image) for pair in pairs]

        def report(skipped: Iterable[Skipped]) -> None:
            self._tell(skipped)
            tally.add(skipped)

        for ids, pixels in image_batches(sources, self.transform, 64, workers=self._workers, report=report):
            yield ids, on_device(pixels, self._device)

    def _read_texts(self, ids: list[str], texts: list[str]) -> Iterable[tuple[Sequence[str], TextInput]]:
        features = self.text_features(texts)
        if features is None:
            for places, tokens in text_batches(texts, self.tokenizer, ENCODED_AT_ONCE):
                yield [ids[n] for n in places], on_device(tokens, self._device)
        else:
            for part in _chunks(range(len(ids)), AT_ONCE):
                inputs = features.read(np.array(part, dtype=np.int64))
                yield [ids[n] for n in part], on_device(inputs, self._device)


def _chunks(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
