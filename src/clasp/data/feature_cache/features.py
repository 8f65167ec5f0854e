"""The output of the frozen part of a tower, computed once and cached on disk.

In: a request (a frozen part with the images or texts it is to read) and the cache folder. Out: ``CachedFeatures``,
memory-mapped rows under the key of the request. Note: a caption is encoded once however often it repeats, longest
first; an image may have several augmented views; an unreadable image has NaN rows and is named in the file; a build
that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clasp.data.feature_cache.arrays import ArrayWriter, load_or_compute
from clasp.data.feature_cache.dtypes import StorageDtype
from clasp.data.feature_cache.replay import CachedFeatures
from clasp.data.feature_cache.requests import ImageFeatureRequest, TextFeatureRequest
from clasp.data.loader import BadSampleLimit, iter_text_batches, philox_integers
from clasp.data.pairs import Pairs
from clasp.data.readers import ImageBatch, LiveImageReader, SampleIndices
from clasp.data.workers import WorkerPool
from clasp.types import HiddenStates, Pixels, PooledFeatures, ProgressCallback, SkippedSample, Tokens

_VIEW_STREAM = 3  # what a stream of random numbers is for; the first three are those of ``loader``
TOKENS_PER_FORWARD = 4096  # tokens of captions in one call of a tower


@dataclass(frozen=True, slots=True)
class ImageReadSettings:
    """How images are read where nothing trains; none of it changes a feature."""

    batch_size: int
    """Images in one call of a tower."""
    workers: int = 0
    """Processes that read and decode; 0: this one."""
    max_bad_fraction: float = 0.02
    """Of all images that may be unreadable."""


def image_features(
    request: ImageFeatureRequest,
    reading: ImageReadSettings,
    *,
    cache_folder: Path,
    storage: StorageDtype = "float32",
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
) -> CachedFeatures:
    """The features of every image, entry i those of pair i, in the views of the request.

    ``progress(done, total)`` counts images times views, and is not called when nothing is computed. ``device`` is
    where the tower is. Raises ``UserError`` when too many images are unreadable or the disk is full.
    """
    part, transform, views, count = request.part, request.transform, request.views, request.count
    rows = part.tokens
    place = np.arange(rows)

    def fill(writer: ArrayWriter) -> None:
        writer.notes = {"skipped": [], **writer.notes, "depth": part.depth, "size": transform.size}
        tally = BadSampleLimit(count, reading.max_bad_fraction)
        skipped: dict[int, SkippedSample] = {
            number: SkippedSample(name, why) for number, name, why in writer.notes["skipped"]
        }
        tally.add(skipped.values())
        readers = [LiveImageReader(transform), *[LiveImageReader(transform, request.augment)] * (views - 1)]
        asks, done = _view_batches(request, reading.batch_size, start=writer.done), writer.done
        with closing(WorkerPool(_ViewReader(request.pairs, readers), workers=reading.workers)) as stream:
            for (view, picks), images in zip(asks, stream(asks), strict=True):
                tally.add(images.skipped)
                missing = sorted(set(range(len(picks))) - set(images.kept))
                skipped.update(zip(picks.pair[missing].tolist(), images.skipped, strict=True))
                values = torch.full((len(picks), rows, part.width), torch.nan)
                if images.kept:
                    values[images.kept] = _rows_on_cpu(part(Pixels(images.inputs.values.to(device)))).unflatten(
                        0, (len(images.kept), rows)
                    )
                at = (picks.pair * views + view)[:, None] * rows + place
                writer.write(at.reshape(-1), values.flatten(0, 1))
                done += len(picks)
                writer.notes["skipped"] = [[number, *skipped[number]] for number in sorted(skipped)]
                writer.save_progress(done)
                if progress is not None:
                    progress(done, count * views)

    shape = (request.rows, part.width)
    with torch.inference_mode():
        kept = load_or_compute(cache_folder / "features", request.key, shape, fill, storage=storage)
    return CachedFeatures(kept, np.arange(count), np.arange(count * views + 1) * rows, views)


def text_features(
    request: TextFeatureRequest,
    *,
    cache_folder: Path,
    storage: StorageDtype = "float32",
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
) -> CachedFeatures:
    """The features of every text; those that repeat are encoded once.

    ``progress(done, total)`` counts distinct texts, and is not called when nothing is computed. ``device`` is where
    the tower is. Raises ``UserError`` when the disk is full.
    """
    part, texts, first = request.part, request.index, request.offsets

    def fill(writer: ArrayWriter) -> None:
        writer.notes = {"skipped": [], "depth": part.depth, "size": 0}
        done = 0
        for places, tokens in iter_text_batches(texts.distinct, request.tokenizer, TOKENS_PER_FORWARD):
            done += len(places)
            if done <= writer.done:
                continue
            values = _rows_on_cpu(part(Tokens(tokens.ids.to(device), tokens.mask.to(device))), tokens.mask)
            at = [np.arange(first[place], first[place + 1]) for place in places]
            writer.write(np.concatenate(at), values)
            writer.save_progress(done)
            if progress is not None:
                progress(done, request.count)

    shape = (request.rows, part.width)
    with torch.inference_mode():
        kept = load_or_compute(cache_folder / "features", request.key, shape, fill, storage=storage)
    return CachedFeatures(kept, texts.entry, first)


def _rows_on_cpu(features: HiddenStates | PooledFeatures, mask: Tensor | None = None) -> Float[Tensor, "rows D"]:
    """The output of a part, one row a token or a vector; only the tokens in ``mask``, where one is given."""
    values = features.values.float().cpu()
    if isinstance(features, PooledFeatures):
        return values
    return values.flatten(0, 1) if mask is None else values[mask]


@dataclass(frozen=True, slots=True)
class _ViewReader:
    """One view of some images; runs in a worker where there are any."""

    pairs: Pairs
    readers: Sequence[LiveImageReader]

    def __call__(self, ask: tuple[int, SampleIndices]) -> ImageBatch:
        view, picks = ask
        return self.readers[view](picks, self.pairs.__getitem__)


def _view_batches(request: ImageFeatureRequest, batch_size: int, *, start: int) -> list[tuple[int, SampleIndices]]:
    """Every image in every view, a batch at a time; all views of some images, then the next images.

    ``start`` images times views are left out: they have been done.
    """
    count, views = request.count, request.views
    order = np.arange(count)
    all_ = [
        SampleIndices(order, np.zeros_like(order), philox_integers((request.seed, view, _VIEW_STREAM), count))
        for view in range(views)
    ]
    asks = [(view, all_[view][at : at + batch_size]) for at in range(0, count, batch_size) for view in range(views)]
    done = np.cumsum([len(picks) for _, picks in asks])
    return [ask for ask, end in zip(asks, done, strict=True) if end > start]
