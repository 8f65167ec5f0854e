"""Cached features in training batches: lookup in place of image decoding and tokenisation.

Input: rows on disk (``CachedArray``) and, at replay, samples (``SampleIndices``). Output: ``CachedFeatures``, the map
from items to rows, and the two readers that look them up. An item has one row if the frozen part pools, and a row per
token if it stops at a block. Note: an image that was unreadable when the cache was written is skipped and reported at
replay.
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
    """Rows on disk, and the rows of each item (pair or text)."""

    kept: CachedArray
    """The rows, by entry and then by view; view 0 is not augmented."""
    entry: Int[np.ndarray, " items"]
    """The entry of each item."""
    offsets: Int[np.ndarray, " bounds"]
    """First row of each view of each entry, and the end of the last."""
    views: int = 1
    """Number of views of each entry."""

    def __len__(self) -> int:
        return len(self.entry)

    @property
    def pooled(self) -> bool:
        """Whether an item is one pooled vector; else it is the hidden states after a block."""
        return self.kept.metadata["depth"] == 0

    @cached_property
    def unreadable(self) -> dict[int, str]:
        """Item -> the reason it has no features."""
        reasons: dict[int, str] = {entry: reason for entry, _, reason in self.kept.metadata["skipped"]}
        if not reasons:
            return {}
        items = np.flatnonzero(np.isin(self.entry, list(reasons)))
        return {item: reasons[entry] for item, entry in zip(items.tolist(), self.entry[items].tolist(), strict=True)}

    def read(
        self, items: Int[np.ndarray, " B"], view: Int[np.ndarray, " B"] | int = 0
    ) -> PooledFeatures | HiddenStates:
        """A copy in memory of the features of ``items`` in ``view``; hidden states are padded to the longest."""
        at = self.entry[items] * self.views + view
        if self.pooled:
            return PooledFeatures(self.kept.take(self.offsets[at]).float())
        lengths = self.offsets[at + 1] - self.offsets[at]
        place = np.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        # padding repeats the last real token; it is masked
        rows = self.offsets[at][:, None] + np.minimum(place, lengths[:, None] - 1)
        metadata = self.kept.metadata
        return HiddenStates(self.kept.take(rows), torch.from_numpy(mask), metadata["depth"], metadata["size"])


class CachedImageReader:
    """An image reader that looks up cached features; the seed of a sample selects its view.

    ``pairs`` are those of the loader. Raises ``ValueError`` when the features are of other pairs.
    """

    def __init__(self, features: CachedFeatures, pairs: Pairs) -> None:
        if features.kept.metadata["key"].get("pairs") != pairs.images.pairs.version:
            raise ValueError(f"{features.kept.path} holds features of other pairs than these")
        # re-indexed: other pairs may be of the same images
        self.features = replace(features, entry=pairs.images.entry)

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch:
        features, numbers = self.features, indices.pair.tolist()
        reasons = features.unreadable
        skipped = tuple(SkippedSample(get_pair(number).id, reasons[number]) for number in numbers if number in reasons)
        kept = [place for place, number in enumerate(numbers) if number not in reasons]
        indices = indices[kept] if skipped else indices
        return ImageBatch(features.read(indices.pair, indices.seed % features.views), kept, skipped)


class CachedTextReader:
    """A text reader that looks up cached features; ``listing`` is the index of the pairs of the loader.

    Raises ``ValueError`` when the features are not of exactly the texts of ``listing``.
    """

    def __init__(self, features: CachedFeatures, listing: PairIndex) -> None:
        texts = DistinctTexts(listing.texts)
        if features.kept.metadata["key"].get("texts") != texts.version:
            raise ValueError(f"{features.kept.path} holds features of other texts than these")
        # re-indexed: the texts may be in another order than when they were cached
        self.features = replace(features, entry=texts.entry)
        self._listing = listing

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> TextBatch:
        texts = self._listing.text_indices(indices)
        if self.features.pooled:
            return TextBatch(self.features.read(texts), texts.tolist())
        distinct, rows = np.unique(texts, return_inverse=True)  # run the remaining blocks once for each distinct text
        states = self.features.read(distinct)
        assert isinstance(states, HiddenStates)
        return TextBatch(replace(states, rows=torch.from_numpy(rows)), texts.tolist())
