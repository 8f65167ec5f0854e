"""The output of the frozen part of a tower, computed once and cached on disk.

Input: a request (a frozen part with its images or texts) and the cache folder. Output: ``CachedFeatures``,
memory-mapped rows under the key of the request. Note: each distinct caption is encoded once, longest first, and each
distinct image; an image may have several augmented views; an unreadable image has NaN rows and is listed in the
metadata; an interrupted build resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.feature_cache.arrays import ArrayWriter, load_or_compute
from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.feature_cache.requests import ImageFeatureRequest, TextFeatureRequest
from clasp.data.loader import BadSampleLimit, iter_text_batches, philox_integers
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageBatch, LiveImageReader, SampleIndices
from clasp.data.shard_windows import fetch_following
from clasp.data.workers import WorkerPool
from clasp.plain_types import StorageDtype
from clasp.types import HiddenStates, Pixels, PooledFeatures, ProgressCallback, SkippedSample, Tokens

_VIEW_STREAM = 3  # id of the random stream; the first three are those of ``loader``
TOKENS_PER_FORWARD = 4096  # tokens of captions, padding included, in one forward pass


@dataclass(frozen=True, slots=True)
class ImageReadSettings:
    """How images are read for inference; does not affect the features."""

    batch_size: int
    """Images in one forward pass."""
    workers: int = 0
    """Worker processes that read and decode; 0: the main process."""
    max_bad_fraction: float = 0.02
    """Fraction of the images that may be unreadable."""


def image_features(
    request: ImageFeatureRequest,
    reading: ImageReadSettings,
    *,
    cache_folder: Path,
    storage: StorageDtype = "float32",
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
) -> CachedFeatures:
    """The features of every image, in all views of the request; an image that several pairs name is computed once.

    ``progress(done, total)`` counts distinct images times views, and is not called when nothing is computed. ``device``
    is that of the tower. Raises ``UserError`` when too many images are unreadable or the disk is full.
    """
    images = request.pairs.images
    part, transform, views, count = request.part, request.transform, request.views, request.count
    rows = part.tokens
    place = np.arange(rows)

    def rows_of(view: int, indices: SampleIndices) -> Int[np.ndarray, " n"]:
        return ((indices.pair * views + view)[:, None] * rows + place).reshape(-1)

    def fill(writer: ArrayWriter) -> None:
        writer.notes = {"skipped": [], **writer.notes, "depth": part.depth, "size": transform.size}
        limit = BadSampleLimit(len(request.pairs), reading.max_bad_fraction)
        skipped: dict[int, SkippedSample] = {
            number: SkippedSample(name, why) for number, name, why in writer.notes["skipped"]
        }
        limit.add(_samples_of(request.pairs, skipped))
        readers = [LiveImageReader(transform), *[LiveImageReader(transform, request.augment)] * (views - 1)]
        batches, done = _view_batches(request, reading.batch_size, start=writer.done), writer.done
        batches = [(view, indices) for view, indices in batches if writer.needs(rows_of(view, indices))]
        with closing(WorkerPool(_ViewReader(images.pairs, readers), workers=reading.workers)) as stream:
            for (view, indices), read in zip(batches, stream(_announced(batches, images.pairs)), strict=True):
                missing = sorted(set(range(len(indices))) - set(read.kept))
                new = dict(zip(indices.pair[missing].tolist(), read.skipped, strict=True))
                limit.add(_samples_of(request.pairs, new))
                skipped.update(new)
                values = torch.full((len(indices), rows, part.width), torch.nan)
                if read.kept:
                    values[read.kept] = _rows_on_cpu(part(Pixels(read.inputs.values.to(device)))).unflatten(
                        0, (len(read.kept), rows)
                    )
                writer.write(rows_of(view, indices), values.flatten(0, 1))
                done += len(indices)
                writer.notes["skipped"] = [[number, *skipped[number]] for number in sorted(skipped)]
                writer.save_progress(done)
                if progress is not None:
                    progress(done, count * views)

    folder, shape = cache_folder / "features", (request.rows, part.width)
    with torch.inference_mode():
        cached = load_or_compute(folder, request.key, shape, fill, storage=storage, batch_size=reading.batch_size)
    return CachedFeatures(cached, images.entry, np.arange(count * views + 1) * rows, views)


def text_features(
    request: TextFeatureRequest,
    *,
    cache_folder: Path,
    storage: StorageDtype = "float32",
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
) -> CachedFeatures:
    """The features of every text; duplicates are encoded once.

    ``progress(done, total)`` counts distinct texts, and is not called when nothing is computed. ``device`` is that of
    the tower. Raises ``UserError`` when the disk is full.
    """
    part, texts, first = request.part, request.index, request.offsets

    def fill(writer: ArrayWriter) -> None:
        writer.notes = {"skipped": [], "depth": part.depth, "size": 0}
        done = 0
        for places, tokens in iter_text_batches(texts.distinct, request.tokenizer, TOKENS_PER_FORWARD):
            done += len(places)
            if done <= writer.done:
                continue
            at = np.concatenate([np.arange(first[place], first[place + 1]) for place in places])
            if not writer.needs(at):
                continue
            values = _rows_on_cpu(part(Tokens(tokens.ids.to(device), tokens.mask.to(device))), tokens.mask)
            writer.write(at, values)
            writer.save_progress(done)
            if progress is not None:
                progress(done, request.count)

    shape = (request.rows, part.width)
    with torch.inference_mode():
        cached = load_or_compute(cache_folder / "features", request.key, shape, fill, storage=storage)
    return CachedFeatures(cached, texts.entry, first)


def _rows_on_cpu(features: HiddenStates | PooledFeatures, mask: Tensor | None = None) -> Float[Tensor, "rows D"]:
    """The output of a part in float32, a row per token or pooled vector; only unmasked tokens if ``mask`` is given."""
    values = features.values.float().cpu()
    if isinstance(features, PooledFeatures):
        return values
    return values.flatten(0, 1) if mask is None else values[mask]


def _samples_of(pairs: Pairs, unreadable: Mapping[int, SkippedSample]) -> Iterator[SkippedSample]:
    """Every pair of these images, which are given by number."""
    for image, sample in unreadable.items():
        for number in pairs.images.pairs_with(image):
            yield SkippedSample(pairs[number].id, sample.reason)


@dataclass(frozen=True, slots=True)
class _ViewReader:
    """Reads one view of some images; runs in a worker process if there are workers."""

    pairs: Pairs
    readers: Sequence[LiveImageReader]

    def __call__(self, request: tuple[int, SampleIndices]) -> ImageBatch:
        view, indices = request
        return self.readers[view](indices, self.pairs.__getitem__)


def _announced(batches: Sequence[tuple[int, SampleIndices]], pairs: Pairs) -> Iterator[tuple[int, SampleIndices]]:
    """The batches; as each is requested, the shard on object storage after its own is fetched in the background."""
    for view, indices in batches:
        fetch_following(pairs, int(indices.pair[-1]))
        yield view, indices


def _view_batches(request: ImageFeatureRequest, batch_size: int, *, start: int) -> list[tuple[int, SampleIndices]]:
    """Batches of (view, samples): all views of some images, then of the next images.

    The first ``start`` samples (images times views) are left out: an earlier build has done them.
    """
    count, views = request.count, request.views
    order = np.arange(count)
    all_ = [
        SampleIndices(order, np.zeros_like(order), philox_integers((request.seed, view, _VIEW_STREAM), count))
        for view in range(views)
    ]
    batches = [(view, all_[view][at : at + batch_size]) for at in range(0, count, batch_size) for view in range(views)]
    done = np.cumsum([len(indices) for _, indices in batches])
    return [batch for batch, end in zip(batches, done, strict=True) if end > start]
