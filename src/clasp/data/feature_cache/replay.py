"""Cached features as one side of a batch.

In: rows on disk (``CachedArray``) and, at replay, samples (``SampleIndices``). Out: ``CachedFeatures``, which item has
which rows, and the two readers that look rows up in place of reading images and tokenising captions. An item has one
row where the frozen part pools, a row a token where it stops at a block. Note: an image that could not be read when
the cache was written is skipped at replay and named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int

from clasp.data.feature_cache.arrays import CachedArray
from clasp.data.feature_cache.requests import DistinctTexts
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageBatch, PairIndex, SampleIndices, TextBatch
from clasp.types import HiddenStates, Pair, PooledFeatures, SkippedSample


@dataclass(frozen=True, eq=False)
class CachedFeatures:
    """Rows on disk, and which of them belong to which item (pair or text) they were asked for."""

    kept: CachedArray
    """Of each entry the rows of its views, view 0 being the plain one. ``metadata`` is the ``.json`` beside them."""
    entry: Int[np.ndarray, " items"]
    """Which entry each item is."""
    offsets: Int[np.ndarray, " bounds"]
    """Where the rows of each view of each entry begin, and where the last ones end."""
    views: int = 1
    """How many times each item was encoded."""

    def __len__(self) -> int:
        return len(self.entry)

    @property
    def pooled(self) -> bool:
        """Whether an item is one vector of a whole tower; else it is the states after a block."""
        return self.kept.metadata["depth"] == 0

    @cached_property
    def skipped(self) -> dict[int, SkippedSample]:
        """Item -> why it has no features."""
        return {item: SkippedSample(name, reason) for item, name, reason in self.kept.metadata["skipped"]}

    def read(
        self, items: Int[np.ndarray, " B"], view: Int[np.ndarray, " B"] | int = 0
    ) -> PooledFeatures | HiddenStates:
        """A copy in memory of the features of ``items``, each in its ``view``; captions padded to the longest."""
        at = self.entry[items] * self.views + view
        if self.pooled:
            return PooledFeatures(self.kept.take(self.offsets[at]).float())
        lengths = self.offsets[at + 1] - self.offsets[at]
        place = np.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        # padding repeats the last real token: no mask lets anything see it
        rows = self.offsets[at][:, None] + np.minimum(place, lengths[:, None] - 1)
        metadata = self.kept.metadata
        return HiddenStates(self.kept.take(rows), torch.from_numpy(mask), metadata["depth"], metadata["size"])


class CachedImageReader:
    """An image side that looks rows up; the views of an image take turns by the seed of the sample.

    ``pairs`` are those of the batch. Raises ``ValueError`` when the features are of other pairs.
    """

    def __init__(self, features: CachedFeatures, pairs: Pairs) -> None:
        if features.kept.metadata["key"].get("pairs") != pairs.version:
            raise ValueError(f"{features.kept.path} holds features of other pairs than these")
        self.features = features

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch:
        features, numbers = self.features, indices.pair.tolist()
        skipped = tuple(features.skipped[number] for number in numbers if number in features.skipped)
        kept = [place for place, number in enumerate(numbers) if number not in features.skipped]
        indices = indices[kept] if skipped else indices
        return ImageBatch(features.read(indices.pair, indices.seed % features.views), kept, skipped)


class CachedTextReader:
    """A text side that looks rows up: ``listing`` is of the pairs of the batch.

    Raises ``ValueError`` when the features are not of exactly the texts in ``listing``.
    """

    def __init__(self, features: CachedFeatures, listing: PairIndex) -> None:
        texts = DistinctTexts(listing.texts)
        if features.kept.metadata["key"].get("texts") != texts.version:
            raise ValueError(f"{features.kept.path} holds features of other texts than these")
        # its own index: the texts may have been asked for in another order
        self.features = replace(features, entry=texts.entry)
        self._listing = listing

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> TextBatch:
        texts = self._listing.text_indices(indices)
        if self.features.pooled:
            return TextBatch(self.features.read(texts), texts.tolist())
        different, rows = np.unique(texts, return_inverse=True)  # blocks are still to be run: once for each
        states = self.features.read(different)
        assert isinstance(states, HiddenStates)
        return TextBatch(replace(states, rows=torch.from_numpy(rows)), texts.tolist())
