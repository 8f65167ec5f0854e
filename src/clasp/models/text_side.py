"""The text side of a model's inputs: live tokens, or the cached output of the frozen text tower or prefix.

Input: a text tower with its tokenizer, and texts. Output: the text side of training batches (``reader``), a stream for
evaluations (``stream``), or the request for the feature cache (``request``). Note: a request whose texts are all among
those of an earlier one reuses its features, so many small requests can be computed at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from clasp.data.device import to_device
from clasp.data.feature_cache.features import TOKENS_PER_FORWARD, text_features
from clasp.data.feature_cache.replay import CachedFeatures, CachedTextReader
from clasp.data.feature_cache.requests import DistinctTexts, TextFeatureRequest
from clasp.data.loader import iter_text_batches
from clasp.data.process_group import SINGLE, ProcessGroup, own_share
from clasp.data.readers import LiveTextReader, PairIndex, TextReader
from clasp.data.tokenizer import Tokenizer
from clasp.models.feature_settings import FeatureCallbacks, FeatureSettings, choose_storage
from clasp.models.frozen import find_frozen_part
from clasp.models.packed_weights import packed_weights
from clasp.models.tower import Tower
from clasp.types import TextInput

TextStream = Iterable[tuple[Sequence[str], TextInput]]
"""Batches of texts with their ids"""

_CACHED_BATCH_SIZE = 256  # cached texts per forward pass of the trainable blocks in an evaluation


class TextSide:
    """Reads texts for one tower."""

    def __init__(
        self, tower: Tower, tokenizer: Tokenizer, settings: FeatureSettings, callbacks: FeatureCallbacks
    ) -> None:
        self.tokenizer = tokenizer
        precision, self.cache = settings.tower_precision(tower), settings.cache_of(tower)
        self.frozen_part = find_frozen_part(tower, 0, precision) if self.cache.mode != "off" else None
        self._tower, self._settings, self._callbacks = tower, settings, callbacks
        self._first: TextFeatureRequest | None = None
        self._cached: list[tuple[DistinctTexts, CachedFeatures]] = []

    def request(self, texts: Sequence[str]) -> TextFeatureRequest | None:
        """The request for the cached features of these texts; ``None`` where no prefix of the tower is frozen."""
        if self.frozen_part is None:
            return None
        if self._first is None:  # the training captions, planned before they are read, and sorted once
            self._first = TextFeatureRequest(self.frozen_part, self.tokenizer, texts)
        if texts is self._first.texts:
            return self._first
        return TextFeatureRequest(self.frozen_part, self.tokenizer, texts)

    def features(self, texts: Sequence[str]) -> CachedFeatures | None:
        """The cached features of every text, computed at most once; ``None``: texts are tokenized live."""
        request = self.request(texts)
        if request is None:
            return None
        for index, features in self._cached:
            entry = index.distinct.find(texts)
            if (entry >= 0).all():
                return replace(features, entry=entry)
        storage = choose_storage(request, self.cache, self._tower.name, self._callbacks.notify)
        if storage is None:
            return None
        if not self._cached:
            self._settings.report_precision(self._tower, self._callbacks.notify)
        with packed_weights(), self._callbacks.bar(f"captions through {self._tower.name}") as progress:
            features = text_features(
                request, cache_folder=self.cache.folder, storage=storage, device=self._device, progress=progress
            )
        self._cached.append((request.index, features))
        return features

    def reader(self, index: PairIndex) -> TextReader:
        """The text side of training batches."""
        features = self.features(index.texts)
        return LiveTextReader(self.tokenizer) if features is None else CachedTextReader(features, index)

    def stream(self, ids: Sequence[str], texts: Sequence[str]) -> TextStream:
        """``texts``, each with its id: in order from the cache, longest first where they are read live."""
        return self.share(ids, texts, self.features(texts), SINGLE)

    def share(
        self, ids: Sequence[str], texts: Sequence[str], features: CachedFeatures | None, group: ProcessGroup
    ) -> TextStream:
        """The share of the stream that this process of a group encodes; ``features``: those of ``texts``, on all of the
        processes or on none."""
        return self._live(ids, texts, group) if features is None else self._from_cache(ids, features, group)

    def _live(self, ids: Sequence[str], texts: Sequence[str], group: ProcessGroup) -> TextStream:
        for places, tokens in iter_text_batches(texts, self.tokenizer, TOKENS_PER_FORWARD, group=group):
            yield [ids[place] for place in places], to_device(tokens, self._device)

    def _from_cache(self, ids: Sequence[str], features: CachedFeatures, group: ProcessGroup) -> TextStream:
        own = own_share(range(len(ids)), group)
        for start in range(0, len(own), _CACHED_BATCH_SIZE):
            some = own[start : start + _CACHED_BATCH_SIZE]
            inputs = features.read(np.array(some, dtype=np.int64))
            yield [ids[place] for place in some], to_device(inputs, self._device)

    @cached_property
    def _device(self) -> torch.device:
        return next(self._tower.parameters()).device
