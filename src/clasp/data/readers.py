"""The two sides of a batch, exchangeable one by one: some picks in, their images or their captions out.

A pick is one sample with everything random about it decided. The live sides read images and captions each time; the
cached ones in ``features`` look up rows, with the same picks. Also ``PairIndex``: what a side or a batch must know of
its pairs when it may not read them. Unusual: an image that cannot be read leaves its batch and is named, never
replaced; captions are then fetched for the rest only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int

from clasp.data.images import Augment, ImageError, ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.types import ImageInput, ImageSource, Pair, Pixels, SkippedSample, TextInput, UserError


@dataclass(frozen=True, slots=True)
class SampleIndices:
    """Some samples, everything random about them decided: three aligned columns."""

    pair: Int[np.ndarray, " n"]
    """Number of the pair."""
    caption_draw: Int[np.ndarray, " n"]
    """Chooses the caption: the one numbered ``caption_draw`` modulo the captions of the pair."""
    seed: Int[np.ndarray, " n"]
    """Of the augmentation; with cached views, chooses the view."""

    def __len__(self) -> int:
        return len(self.pair)

    def __getitem__(self, part: slice | list[int]) -> SampleIndices:
        return SampleIndices(self.pair[part], self.caption_draw[part], self.seed[part])


class PairIndex(Sequence[Pair]):
    """Pairs whose ids, groups and captions are held in memory: all of them are read once, here.

    For replaying cached features, where even reading a line of JSON would be most of the time, and for
    ``captions="all"``. Takes some hundred bytes a pair, so live images with drawn captions do without.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self.ids: list[str] = []
        groups: dict[str, int] = {}
        texts: dict[str, int] = {}
        group, caption, first = [], [], [0]
        for number in range(len(pairs)):
            pair = pairs[number]
            self.ids.append(pair.id)
            group.append(groups.setdefault(pair.group, len(groups)))
            caption.extend(texts.setdefault(text, len(texts)) for text, _ in pair.captions)
            first.append(len(caption))
        self.group = np.array(group, dtype=np.int64)
        """Of each pair: equal numbers, one group."""
        self.caption_offsets = np.array(first, dtype=np.int64)
        """Captions of pair i are numbered ``caption_offsets[i]`` to ``caption_offsets[i + 1]``."""
        self.caption = np.array(caption, dtype=np.int64)
        """Of each caption: its place in ``texts``."""
        self.texts = list(texts)
        """Every different caption once, in the order of the pairs."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: Any) -> Any:
        return self._pairs[number]

    def text_indices(self, picks: SampleIndices) -> Int[np.ndarray, " n"]:
        """Where in ``texts`` the picked captions are."""
        first = self.caption_offsets[picks.pair]
        return self.caption[first + picks.caption_draw % (self.caption_offsets[picks.pair + 1] - first)]


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """The images of some picks that could be had: ``kept`` are their places among the picks, in order."""

    inputs: ImageInput
    kept: list[int]
    skipped: tuple[SkippedSample, ...]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The captions of some picks; ``texts`` says which are the same, by any value that is equal then."""

    inputs: TextInput
    texts: Sequence[Hashable]


@runtime_checkable
class ImageReader(Protocol):
    """Picks to images. ``read`` gives the pair of a number; a pair is read at most once a batch, if at all."""

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch: ...


@runtime_checkable
class TextReader(Protocol):
    """Picks to captions; ``read`` as for the images."""

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> TextBatch: ...


@dataclass(frozen=True, slots=True)
class LiveImageReader:
    """Images read, decoded and (where ``augment`` is given) augmented anew each time."""

    transform: ImageTransform
    augment: Augment | None = None

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch:
        pairs = [get_pair(number) for number in indices.pair.tolist()]
        seeds = indices.seed.tolist()
        return self.decode([(pair.id, pair.image, seed) for pair, seed in zip(pairs, seeds, strict=True)])

    def decode(self, images: Sequence[tuple[str, ImageSource, int]]) -> ImageBatch:
        """Images given as id, source and seed. What cannot be read is left out and named."""
        values, kept, skipped = [], [], []
        for place, (name, source, seed) in enumerate(images):
            try:
                encoded = source.read()
                if self.augment is None:
                    values.append(self.transform(encoded))
                else:
                    values.append(self.transform.augmented(encoded, self.augment, seed))
                kept.append(place)
            except (ImageError, OSError, UserError) as error:  # a source says with UserError that a file is gone
                skipped.append(SkippedSample(name, " ".join(str(error).split()) or type(error).__name__))
        side = self.transform.size
        pixels = torch.stack(values) if values else torch.empty(0, 3, side, side)
        return ImageBatch(Pixels(pixels), kept, tuple(skipped))


@dataclass(frozen=True, slots=True)
class LiveTextReader:
    """Captions tokenised each time, padded to the longest of the batch; those that repeat are held once."""

    tokenizer: Tokenizer

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> TextBatch:
        captions = [get_pair(number).captions for number in indices.pair.tolist()]
        texts = [
            all_[draw % len(all_)].text for all_, draw in zip(captions, indices.caption_draw.tolist(), strict=True)
        ]
        places: dict[str, int] = {}
        rows = [places.setdefault(text, len(places)) for text in texts]
        tokens = self.tokenizer(list(places))
        return TextBatch(tokens if len(places) == len(texts) else replace(tokens, rows=torch.tensor(rows)), texts)
