"""What a model reads of some pairs: live pixels and tokens, or what a wholly frozen tower said of them once.

The one place that decides between the two, from the selection alone, for training and for evaluation alike. In go pairs
and a model with its transform and tokenizer, out come the sides of a batch and the streams that evaluations read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from clasp.data.batches import Tally, image_batches, log_skipped, text_batches
from clasp.data.features import CachedImages, CachedTexts, Features, Progress, pooled_images, pooled_texts
from clasp.data.images import Augment, ImageTransform
from clasp.data.pairs import Pairs
from clasp.data.sides import ImageSide, Listing, LiveImages, LiveTexts, TextSide
from clasp.data.text import Tokenizer
from clasp.nn.towers import Tower
from clasp.types import Pixels, Pooled, Skipped, TextInput, Tokens

Bar = Callable[[str], AbstractContextManager[Progress]]


def no_bar(title: str) -> AbstractContextManager[Progress]:
    """Nobody is watching."""
    return nullcontext(lambda done, total: None)


class Inputs:
    """Reads pairs for one model.

    ``image_frozen`` and ``text_frozen``: the tower's weights are those of its base and nothing in it trains, so its
    pooled output may be computed once and kept under ``cache``. ``report`` hears of images that an evaluation could not
    read, once of each.
    """

    def __init__(
        self,
        *,
        image: Tower,
        text: Tower,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        image_frozen: bool,
        text_frozen: bool,
        cache: Path,
        bar: Bar = no_bar,
        report: Callable[[Iterable[Skipped]], None] = log_skipped,
        workers: int = 0,
        max_bad_fraction: float = 0.02,
    ):
        self.image, self.text = image, text
        self.transform, self.tokenizer = transform, tokenizer
        self.image_frozen, self.text_frozen = image_frozen, text_frozen
        self._cache, self._bar, self._report = cache, bar, report
        self._workers, self._max_bad = workers, max_bad_fraction
        self._told: set[str] = set()
        self._ahead: list[tuple[dict[str, int], Features]] = []

    @cached_property
    def _device(self) -> torch.device:
        return next(self.image.parameters()).device

    # --- training ------------------------------------------------------------------------------------------------

    def image_side(self, pairs: Pairs, augment: Augment | None) -> ImageSide:
        """The image side of training batches. Augmented images are read each time."""
        if self.image_frozen and augment is None:
            return CachedImages(self.image_features(pairs), pairs)
        return LiveImages(self.transform, augment)

    def text_side(self, listing: Listing) -> TextSide:
        """The text side of training batches."""
        if self.text_frozen:
            return CachedTexts(self.text_features(listing.texts), listing)
        return LiveTexts(self.tokenizer)

    def image_features(self, pairs: Pairs) -> Features:
        """The frozen image tower's output for every image, computed at most once."""
        with self._bar(f"images of {Path(pairs.name).name} through {self.image.name}") as progress:
            return pooled_images(
                self.image,
                pairs,
                self.transform,
                batch=32,
                cache=self._cache,
                progress=progress,
                workers=self._workers,
                device=self._device,
                max_bad_fraction=self._max_bad,
            )

    def text_features(self, texts: Sequence[str]) -> Features:
        """The frozen text tower's output for every text, computed at most once."""
        for rows, features in self._ahead:
            if all(text in rows for text in texts):
                return Features(features.kept, np.array([rows[text] for text in texts], dtype=np.int64))
        with self._bar(f"captions through {self.text.name}") as progress:
            features = pooled_texts(
                self.text, self.tokenizer, texts, batch=64, cache=self._cache, progress=progress, device=self._device
            )
        self._ahead.append((dict(zip(texts, features.index.tolist(), strict=True)), features))
        return features

    def read_ahead(self, texts: Iterable[str]) -> None:
        """Put the texts of many small questions through a frozen text tower at once; the questions then find them."""
        different = sorted(set(texts))
        if self.text_frozen and different:
            self.text_features(different)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def images(self, pairs: Pairs) -> Callable[[], Iterable[tuple[Sequence[str], Pixels | Pooled]]]:
        """A stream of the images of ``pairs`` with their ids, to be read as often as one likes."""
        if not self.image_frozen:
            tally = Tally(len(pairs), self._max_bad)
            return lambda: self._live_images(pairs, tally)
        features = self.image_features(pairs)
        self._tell(features.skipped.values())
        ids = [pairs[number].id for number in range(len(pairs))]
        readable = [number for number in range(len(pairs)) if number not in features.skipped]

        def cached() -> Iterable[tuple[Sequence[str], Pooled]]:
            for part in _chunks(readable, 1024):
                rows = features.take(np.array(part, dtype=np.int64)).to(self._device)
                yield [ids[number] for number in part], Pooled(rows)

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
            yield ids, Pixels(pixels.values.to(self._device))

    def _read_texts(self, ids: list[str], texts: list[str]) -> Iterable[tuple[Sequence[str], TextInput]]:
        if self.text_frozen:
            features = self.text_features(texts)
            for part in _chunks(range(len(ids)), 4096):
                yield [ids[n] for n in part], Pooled(features.take(np.array(part, dtype=np.int64)).to(self._device))
        else:
            for places, tokens in text_batches(texts, self.tokenizer, 64):
                moved = Tokens(tokens.ids.to(self._device), tokens.mask.to(self._device))
                yield [ids[n] for n in places], moved


def _chunks(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
