"""Readers of the two modalities of a batch: sample indices in, their images or captions out.

``SampleIndices`` fixes everything random about a sample. The live readers load images and captions each time; the
cached ones in ``data.feature_cache`` look up rows by the same indices. Also ``PairIndex``: the metadata of all pairs in
memory, for readers that must not read the pairs. Note: an image that cannot be read is dropped from its batch and
reported, never replaced; captions are then read for the rest only.
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
    """Some samples with all their random choices: three aligned columns."""

    pair: Int[np.ndarray, " n"]
    """Index of the pair."""
    caption_draw: Int[np.ndarray, " n"]
    """Selects the caption: number ``caption_draw`` modulo the captions of the pair."""
    seed: Int[np.ndarray, " n"]
    """Seed of the augmentation; with cached views, selects the view."""

    def __len__(self) -> int:
        return len(self.pair)

    def __getitem__(self, part: slice | list[int]) -> SampleIndices:
        return SampleIndices(self.pair[part], self.caption_draw[part], self.seed[part])


class PairIndex(Sequence[Pair]):
    """Pairs with their ids, groups and captions indexed in memory: all pairs are read once, on construction.

    For cached features, where even parsing a line of JSON would dominate the time, and for ``captions="all"``. Takes
    some hundred bytes per pair, so it is not used for live images with sampled captions.
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
        """Group id of each pair."""
        self.caption_offsets = np.array(first, dtype=np.int64)
        """Captions of pair i are numbered ``caption_offsets[i]`` to ``caption_offsets[i + 1]``."""
        self.caption = np.array(caption, dtype=np.int64)
        """Index in ``texts`` of each caption."""
        self.texts = list(texts)
        """The unique captions, in the order of the pairs."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: Any) -> Any:
        return self._pairs[number]

    def text_indices(self, picks: SampleIndices) -> Int[np.ndarray, " n"]:
        """Index in ``texts`` of the selected captions."""
        first = self.caption_offsets[picks.pair]
        return self.caption[first + picks.caption_draw % (self.caption_offsets[picks.pair + 1] - first)]


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """The images of some samples that could be read: ``kept`` are their positions among the samples, in order."""

    inputs: ImageInput
    kept: list[int]
    skipped: tuple[SkippedSample, ...]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The captions of some samples; ``texts`` are keys that are equal for equal captions."""

    inputs: TextInput
    texts: Sequence[Hashable]


@runtime_checkable
class ImageReader(Protocol):
    """Sample indices to images. ``get_pair`` returns the pair of an index; it is called at most once per pair and
    batch."""

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch: ...


@runtime_checkable
class TextReader(Protocol):
    """Sample indices to captions; ``get_pair`` as for images."""

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> TextBatch: ...


@dataclass(frozen=True, slots=True)
class LiveImageReader:
    """Reads, decodes and (with ``augment``) augments images each time."""

    transform: ImageTransform
    augment: Augment | None = None

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch:
        pairs = [get_pair(number) for number in indices.pair.tolist()]
        seeds = indices.seed.tolist()
        return self.decode([(pair.id, pair.image, seed) for pair, seed in zip(pairs, seeds, strict=True)])

    def decode(self, images: Sequence[tuple[str, ImageSource, int]]) -> ImageBatch:
        """Decode images given as id, source and seed. Unreadable ones are skipped and reported."""
        values, kept, skipped = [], [], []
        for position, (name, source, seed) in enumerate(images):
            try:
                encoded = source.read()
                if self.augment is None:
                    values.append(self.transform(encoded))
                else:
                    values.append(self.transform.augmented(encoded, self.augment, seed))
                kept.append(position)
            except (ImageError, OSError, UserError) as error:  # a source raises UserError for a missing file
                skipped.append(SkippedSample(name, " ".join(str(error).split()) or type(error).__name__))
        size = self.transform.size
        pixels = torch.stack(values) if values else torch.empty(0, 3, size, size)
        return ImageBatch(Pixels(pixels), kept, tuple(skipped))


@dataclass(frozen=True, slots=True)
class LiveTextReader:
    """Tokenises captions each time, padded to the longest of the batch; repeated captions are tokenised once."""

    tokenizer: Tokenizer

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> TextBatch:
        captions = [get_pair(number).captions for number in indices.pair.tolist()]
        texts = [
            all_[draw % len(all_)].text for all_, draw in zip(captions, indices.caption_draw.tolist(), strict=True)
        ]
        unique: dict[str, int] = {}
        rows = [unique.setdefault(text, len(unique)) for text in texts]
        tokens = self.tokenizer(list(unique))
        return TextBatch(tokens if len(unique) == len(texts) else replace(tokens, rows=torch.tensor(rows)), texts)
