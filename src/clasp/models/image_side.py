"""The image side of a model's inputs: live pixels, or the cached output of the frozen image tower or prefix.

Input: an image tower with its transform, and pairs. Output: the image side of training batches (``reader``), a stream
for evaluations (``stream``), or the request for the feature cache (``request``). Note: an image that an evaluation
cannot read is reported once, whatever the number of streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from clasp.data.device import to_device
from clasp.data.feature_cache.features import ImageReadSettings, image_features
from clasp.data.feature_cache.replay import CachedFeatures, CachedImageReader
from clasp.data.feature_cache.requests import ImageFeatureRequest
from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import BadSampleLimit, inference_batch_size, iter_image_batches
from clasp.data.pairs import Pairs
from clasp.data.process_group import SINGLE, ProcessGroup, own_share
from clasp.data.readers import ImageReader, LiveImageReader
from clasp.models.feature_settings import FeatureCallbacks, FeatureSettings, choose_storage
from clasp.models.frozen import find_frozen_part
from clasp.models.packed_weights import packed_weights
from clasp.models.tower import Tower
from clasp.types import ImageInput, Pixels, SkippedSample

ImageStream = Iterable[tuple[Sequence[str], ImageInput]]
"""Batches of images with their ids"""
SkippedCallback = Callable[[Iterable[SkippedSample]], None]
"""Receives samples that cannot be read"""

_CACHED_BATCH_SIZE = 256  # cached images per forward pass of the trainable blocks in an evaluation


class ImageSide:
    """Reads the images of pairs for one tower."""

    def __init__(
        self, tower: Tower, transform: ImageTransform, settings: FeatureSettings, callbacks: FeatureCallbacks
    ) -> None:
        self.transform = transform
        precision, self.cache = settings.tower_precision(tower), settings.cache_of(tower)
        self.frozen_part = find_frozen_part(tower, transform.size, precision) if self.cache.mode != "off" else None
        self._tower, self._settings, self._callbacks = tower, settings, callbacks
        self._reported: set[str] = set()
        self._told = False

    def request(self, pairs: Pairs, augment: Augment | None = None) -> ImageFeatureRequest | None:
        """The request for the cached features of these images; ``None`` where they are read live under any policy: no
        prefix of the tower is frozen, or they are augmented in every epoch."""
        settings = self._settings
        if self.frozen_part is None or (augment is not None and settings.cached_augmentations == 0):
            return None
        views = 1 if augment is None else 1 + settings.cached_augmentations
        return ImageFeatureRequest(self.frozen_part, pairs, self.transform, augment, views, settings.seed)

    def features(self, pairs: Pairs, augment: Augment | None = None) -> CachedFeatures | None:
        """The cached features of every image, computed at most once; ``None``: images are read live."""
        request = self.request(pairs, augment)
        if request is None:
            return None
        name, folder = self._tower.name, self.cache.folder
        storage = choose_storage(request, self.cache, name, self._callbacks.notify)
        if storage is None:
            return None
        if not self._told:
            self._told = True
            self._settings.report_precision(self._tower, self._callbacks.notify)
        reading = ImageReadSettings(self._batch_size, self._settings.workers, self._settings.max_bad_fraction)
        with packed_weights(), self._callbacks.bar(f"images of {Path(pairs.name).name} through {name}") as progress:
            return image_features(
                request, reading, cache_folder=folder, storage=storage, device=self._device, progress=progress
            )

    def reader(self, pairs: Pairs, augment: Augment | None) -> ImageReader:
        """The image side of training batches."""
        features = self.features(pairs, augment)
        return LiveImageReader(self.transform, augment) if features is None else CachedImageReader(features, pairs)

    def stream(self, pairs: Pairs) -> Callable[[], ImageStream]:
        """A stream of the images of ``pairs`` in order; each call starts it anew."""
        features = self.features(pairs)
        return self.share(pairs, features, SINGLE, self.reporter(pairs, features))

    def share(
        self, pairs: Pairs, features: CachedFeatures | None, group: ProcessGroup, on_skipped: SkippedCallback
    ) -> Callable[[], ImageStream]:
        """The share of the stream that this process of a group encodes; ``features``: those of ``pairs``, on all of the
        processes or on none. Images of the share that cannot be read go to ``on_skipped``, each time it is read."""
        if features is None:
            return lambda: self._live(pairs, group, on_skipped)
        ids = [pairs[number].id for number in range(len(pairs))]
        return lambda: self._cached(features, ids, own_share(range(len(pairs)), group), on_skipped)

    def reporter(self, pairs: Pairs, features: CachedFeatures | None) -> SkippedCallback:
        """Reports images of ``pairs`` that cannot be read, each once. Raises ``UserError`` where they are too many, and
        ``features``, which were refused in that case, are ``None``."""
        tally = BadSampleLimit(len(pairs), self._settings.max_bad_fraction)

        def report(skipped: Iterable[SkippedSample]) -> None:
            found = list(skipped)
            new = [sample for sample in found if sample.id not in self._reported]
            self._reported.update(sample.id for sample in new)
            self._callbacks.on_skipped(new)
            if features is None:
                tally.add(found)

        return report

    def _cached(
        self, features: CachedFeatures, ids: Sequence[str], own: Sequence[int], on_skipped: SkippedCallback
    ) -> ImageStream:
        reasons = features.unreadable
        on_skipped([SkippedSample(ids[number], reasons[number]) for number in own if number in reasons])
        readable = [number for number in own if number not in reasons]
        for start in range(0, len(readable), _CACHED_BATCH_SIZE):
            some = readable[start : start + _CACHED_BATCH_SIZE]
            inputs = features.read(np.array(some, dtype=np.int64))
            yield [ids[number] for number in some], to_device(inputs, self._device)

    def _live(
        self, pairs: Pairs, group: ProcessGroup, on_skipped: SkippedCallback
    ) -> Iterable[tuple[Sequence[str], Pixels]]:
        sources = [(pair.id, pair.image) for pair in pairs]
        workers = self._settings.workers
        for ids, pixels in iter_image_batches(
            sources, self.transform, self._batch_size, workers=workers, on_skipped=on_skipped, group=group
        ):
            yield ids, to_device(pixels, self._device)

    @cached_property
    def _device(self) -> torch.device:
        return next(self._tower.parameters()).device

    @property
    def _batch_size(self) -> int:
        precision = self._settings.tower_precision(self._tower)
        parts = self._tower.row_parts if precision == "bfloat16" else 1
        return parts * inference_batch_size(self.transform.size, self._device)
