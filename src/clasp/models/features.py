"""What a model reads of some pairs: live pixels and tokens, or what the frozen part of a tower said of them once.

The one place that decides between the two, from the selection alone, for training and for evaluation alike. In go pairs
and a model with its transform and tokenizer, out come the sides of a batch and the streams that evaluations read; or,
before any of it is computed, what would be kept (``CachePlan``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clasp.data.device import to_device
from clasp.data.feature_cache.dtypes import StorageDtype as StorageName
from clasp.data.feature_cache.features import (
    TOKENS_PER_FORWARD,
    CachedFeatures,
    CachedImageReader,
    CachedTextReader,
    DistinctTexts,
    image_cache_bytes,
    image_cache_key,
    image_features,
    text_cache_bytes,
    text_cache_key,
    text_features,
)
from clasp.data.images import Augment, ImageTransform
from clasp.data.loader import BadSampleLimit, inference_batch_size, iter_image_batches, iter_text_batches, log_skipped
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageReader, LiveImageReader, LiveTextReader, PairIndex, TextReader
from clasp.data.tokenizer import Tokenizer
from clasp.models.frozen import FrozenPrefix, FrozenTower, find_frozen_part
from clasp.models.tower import Tower
from clasp.types import (
    ImageInput,
    MessageCallback,
    Pixels,
    ProgressFactory,
    SkippedSample,
    TextInput,
    no_progress_bar,
)

FeatureCacheMode = Literal["auto", "off"] | StorageName

_MAX_DISK_FRACTION = 0.25  # of what is free, which "auto" may fill with the states of a trunk
_CACHED_BATCH_SIZE = 256  # cached inputs of an evaluation in one call of what is left of a tower


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What keeping some features means. ``bytes`` are those of their rows on disk; ``storage`` is how they are written,
    ``None`` where they would take too much and are computed anew each time; ``file`` has them, where they are there."""

    what: Literal["images", "captions"]
    count: int
    storage: StorageName | None
    bytes: int
    file: Path | None
    key: Mapping[str, Any]

    @property
    def bytes_to_write(self) -> int:
        """That are still to be written."""
        return self.bytes if self.storage and not self.file else 0


class FeatureSource:
    """Reads pairs for one model.

    ``feature_cache`` decides whether what a tower's frozen part says is computed once and kept under ``cache_folder``,
    and how it is written: "auto" keeps the vectors of a wholly frozen tower in float32, and the states of a trunk in
    float16 where they fill at most a quarter of the free disk. ``notify`` hears what is kept, or why not;
    ``on_skipped`` hears of images that an evaluation could not read, once of each.
    """

    def __init__(
        self,
        *,
        image: Tower,
        text: Tower,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        feature_cache: FeatureCacheMode,
        cache_folder: Path,
        bar: ProgressFactory = no_progress_bar,
        notify: MessageCallback = lambda line: None,
        on_skipped: Callable[[Iterable[SkippedSample]], None] = log_skipped,
        workers: int = 0,
        cached_augmentations: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.02,
    ):
        self.image, self.text = image, text
        self.transform, self.tokenizer = transform, tokenizer
        on = feature_cache != "off"
        self.frozen_image_part = find_frozen_part(image, transform.size) if on else None
        self.frozen_text_part = find_frozen_part(text, 0) if on else None
        self._features: FeatureCacheMode = feature_cache
        self._cache, self._bar, self._notify, self._report = cache_folder, bar, notify, on_skipped
        self._workers, self._views, self._seed, self._max_bad = workers, cached_augmentations, seed, max_bad_fraction
        self._reported: set[str] = set()
        self._precomputed: list[tuple[dict[str, int], CachedFeatures]] = []

    @property
    def both_towers_frozen(self) -> bool:
        """Whether both towers are wholly frozen: all that is left of them are vectors, which cost nothing."""
        return isinstance(self.frozen_image_part, FrozenTower) and isinstance(self.frozen_text_part, FrozenTower)

    @cached_property
    def _device(self) -> torch.device:
        return next(self.image.parameters()).device

    # --- training ------------------------------------------------------------------------------------------------

    def image_reader(self, pairs: Pairs, augment: Augment | None) -> ImageReader:
        """The image side of training batches. Augmented images are read anew, unless ``views`` of them are kept."""
        if augment is None or self._views:
            features = self.image_features(pairs, augment)
            if features is not None:
                return CachedImageReader(features, pairs)
        return LiveImageReader(self.transform, augment)

    def text_reader(self, listing: PairIndex) -> TextReader:
        """The text side of training batches."""
        features = self.text_features(listing.texts)
        return LiveTextReader(self.tokenizer) if features is None else CachedTextReader(features, listing)

    def image_features(self, pairs: Pairs, augment: Augment | None = None) -> CachedFeatures | None:
        """What the image tower's frozen part says of every image, computed at most once; ``None`` to read them live."""
        part, keeping = self.frozen_image_part, self.image_cache_plan(pairs, augment)
        if part is None or keeping is None or (storage := self._storage_for(part, keeping)) is None:
            return None
        views = self._views_of(augment)
        with self._bar(f"images of {Path(pairs.name).name} through {self.image.name}") as progress:
            return image_features(
                part,
                pairs,
                self.transform,
                batch_size=inference_batch_size(self.transform.size, self._device),
                cache_folder=self._cache,
                progress=progress,
                augment=augment if views > 1 else None,
                views=views,
                seed=self._seed,
                workers=self._workers,
                device=self._device,
                max_bad_fraction=self._max_bad,
                storage=storage,
            )

    def text_features(self, texts: Sequence[str]) -> CachedFeatures | None:
        """What the text tower's frozen part says of every text, computed at most once; ``None`` to read them live."""
        part = self.frozen_text_part
        if part is None:
            return None
        for entries, features in self._precomputed:
            if all(text in entries for text in texts):
                return replace(features, entry=np.array([entries[text] for text in texts], dtype=np.int64))
        keeping = self.text_cache_plan(texts)
        if keeping is None or (storage := self._storage_for(part, keeping)) is None:
            return None
        with self._bar(f"captions through {self.text.name}") as progress:
            features = text_features(
                part,
                self.tokenizer,
                texts,
                cache_folder=self._cache,
                progress=progress,
                device=self._device,
                storage=storage,
            )
        self._precomputed.append((dict(zip(texts, features.entry.tolist(), strict=True)), features))
        return features

    def precompute_texts(self, texts: Iterable[str]) -> None:
        """Put the texts of many small questions through a frozen text tower at once; the questions then find them."""
        different = sorted(set(texts))
        if different:
            self.text_features(different)

    # --- what is kept --------------------------------------------------------------------------------------------

    def image_cache_plan(self, pairs: Pairs, augment: Augment | None = None) -> CachePlan | None:
        """What ``image_features`` would keep, before it does; ``None`` where no part of the tower is frozen."""
        part, views = self.frozen_image_part, self._views_of(augment)
        if part is None:
            return None
        key = image_cache_key(part, pairs, self.transform, augment, views=views, seed=self._seed)
        return self._cache_plan(
            part, "images", len(pairs), key, lambda name: image_cache_bytes(part, len(pairs), views, name)
        )

    def text_cache_plan(self, texts: Sequence[str]) -> CachePlan | None:
        """What ``text_features`` would keep, before it does; ``None`` where no part of the tower is frozen."""
        part = self.frozen_text_part
        if part is None:
            return None
        asked = DistinctTexts(texts)
        key = text_cache_key(part, self.tokenizer, asked)
        takes = lambda name: text_cache_bytes(part, self.tokenizer, asked.distinct, name)  # noqa: E731
        return self._cache_plan(part, "captions", len(asked.distinct), key, takes)

    def free_bytes(self) -> int:
        """What is free where features are kept."""
        return shutil.disk_usage(next(at for at in (self._cache, *self._cache.parents) if at.exists())).free

    def _views_of(self, augment: Augment | None) -> int:
        return 1 + (self._views if augment else 0)

    def _cache_plan(
        self,
        part: FrozenTower | FrozenPrefix,
        what: Literal["images", "captions"],
        count: int,
        key: dict[str, Any],
        bytes_for: Callable[[StorageName], int],
    ) -> CachePlan:
        name: StorageName = "float32" if isinstance(part, FrozenTower) else "float16"
        if self._features != "auto" and self._features != "off":
            name = self._features
        key, size = {**key, "storage": name}, bytes_for(name)
        file = _find_cache_file(self._cache / "features", key)
        may_be_live = self._features == "auto" and isinstance(part, FrozenPrefix) and file is None
        live = may_be_live and size > _MAX_DISK_FRACTION * self.free_bytes()
        return CachePlan(what, count, None if live else name, size, file, key)

    def _storage_for(self, part: FrozenTower | FrozenPrefix, keeping: CachePlan) -> StorageName | None:
        """How they are kept, if they are; says so of the states of a trunk, where that was for us to choose."""
        if self._features == "auto" and isinstance(part, FrozenPrefix):
            size = f"{keeping.bytes:,} bytes of {self.free_bytes():,} that are free on disk"
            how = "computed once and kept" if keeping.storage else "computed anew each time"
            self._notify(f"states of {keeping.what} after {part.depth} blocks of {part.tower.name} are {how}: {size}")
        return keeping.storage

    # --- evaluation ----------------------------------------------------------------------------------------------

    def images(self, pairs: Pairs) -> Callable[[], Iterable[tuple[Sequence[str], ImageInput]]]:
        """A stream of the images of ``pairs`` with their ids, to be read as often as one likes."""
        features = self.image_features(pairs)
        if features is None:
            tally = BadSampleLimit(len(pairs), self._max_bad)
            return lambda: self._live_images(pairs, tally)
        self._report_new(features.skipped.values())
        ids = [pairs[number].id for number in range(len(pairs))]
        readable = [number for number in range(len(pairs)) if number not in features.skipped]

        def cached() -> Iterable[tuple[Sequence[str], ImageInput]]:
            for part in _chunks(readable, _CACHED_BATCH_SIZE):
                inputs = features.read(np.array(part, dtype=np.int64))
                yield [ids[number] for number in part], to_device(inputs, self._device)

        return cached

    def texts(self, texts: Mapping[str, str]) -> Callable[[], Iterable[tuple[Sequence[str], TextInput]]]:
        """A stream of captions, given as id to text."""
        return lambda: self._read_texts(list(texts), list(texts.values()))

    def read(self, texts: Sequence[str]) -> Iterable[tuple[Sequence[str], TextInput]]:
        """A stream of texts that are their own ids (prompts of a zero-shot question)."""
        return self._read_texts(list(texts), list(texts))

    def _report_new(self, skipped: Iterable[SkippedSample]) -> None:
        new = [sample for sample in skipped if sample.id not in self._reported]
        self._reported.update(sample.id for sample in new)
        self._report(new)

    def _live_images(self, pairs: Pairs, tally: BadSampleLimit) -> Iterable[tuple[Sequence[str], Pixels]]:
        sources = [(pair.id, pair.image) for pair in pairs]

        def report(skipped: Iterable[SkippedSample]) -> None:
            self._report_new(skipped)
            tally.add(skipped)

        few = inference_batch_size(self.transform.size, self._device)
        for ids, pixels in iter_image_batches(sources, self.transform, few, workers=self._workers, on_skipped=report):
            yield ids, to_device(pixels, self._device)

    def _read_texts(self, ids: list[str], texts: list[str]) -> Iterable[tuple[Sequence[str], TextInput]]:
        features = self.text_features(texts)
        if features is None:
            for places, tokens in iter_text_batches(texts, self.tokenizer, TOKENS_PER_FORWARD):
                yield [ids[n] for n in places], to_device(tokens, self._device)
        else:
            for part in _chunks(range(len(ids)), _CACHED_BATCH_SIZE):
                inputs = features.read(np.array(part, dtype=np.int64))
                yield [ids[n] for n in part], to_device(inputs, self._device)


def _chunks(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _find_cache_file(folder: Path, key: Mapping[str, Any]) -> Path | None:
    """The whole file of features whose ``.json`` has this key."""
    wanted = json.loads(json.dumps(key)).items()  # as it is read back: no tuples
    for about in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, AttributeError):  # not ours, damaged, or just being replaced
            if wanted <= json.loads(about.read_text(encoding="utf-8"))["key"].items():
                if (file := about.with_suffix(".npy")).exists():
                    return file
    return None
