"""The data loader: shuffled, collated batches, deterministic and resumable at any batch of any epoch.

Input: pairs with an image reader and a text reader, live or cached (``BatchReader``). Output: ``Batch``es. Order,
caption and augmentation of a sample come from a counter-based generator at (seed, epoch, index), in the main process:
they do not depend on the number of workers, and starting at batch k reads nothing before it. Note: an unreadable sample
is removed from its batch, which may become short or even empty but is never dropped or refilled; so batch k of an epoch
is always made from the same samples.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Int

from clasp.data.formats.skipped_files import escape_name
from clasp.data.images import ImageTransform
from clasp.data.missing_images import too_many
from clasp.data.pair_sequence import Pairs
from clasp.data.process_group import SINGLE, ProcessGroup, own_share
from clasp.data.readers import ImageReader, LiveImageReader, PairIndex, SampleIndices, TextReader
from clasp.data.shard_windows import ShardWindows
from clasp.data.tokenizer import Tokenizer
from clasp.data.workers import WorkerPool
from clasp.errors import counted
from clasp.types import Batch, ImageSource, Pair, Pixels, SkippedSample, Tokens, UserError

CaptionMode = Literal["sample", "all"]
_T = TypeVar("_T")

_ORDER, _CAPTION, _AUGMENT, _SHARDS = 0, 1, 2, 4  # ids of the random streams; 3 is in ``feature_cache.features``
_log = logging.getLogger(__name__)


def philox_integers(key: Sequence[int], count: int) -> Int[np.ndarray, " n"]:
    """``count`` random numbers in [0, 2^63); the i-th depends on ``key`` (non-negative) and i only, not on ``count``.

    The raw output of Philox (Salmon et al., SC 2011), which numpy keeps stable between versions, unlike
    ``permutation`` and ``integers``.
    """
    raw = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count)
    raw >>= np.uint64(1)
    return raw.view(np.int64)


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Samples to a collated ``Batch`` of both modalities. Runs in a worker process if there are workers."""

    pairs: Sequence[Pair]
    image: ImageReader
    text: TextReader

    def __call__(self, indices: SampleIndices) -> Batch:
        read = functools.cache(self.pairs.__getitem__)
        image = self.image(indices, read)
        if image.skipped:
            indices = indices[image.kept]
        text = self.text(indices, read)
        numbers = indices.pair.tolist()
        groups: list[Hashable]
        if isinstance(self.pairs, PairIndex):
            ids = tuple(self.pairs.ids.take(indices.pair))
            groups = self.pairs.group[indices.pair].tolist()
        else:
            ids = tuple([read(number).id for number in numbers])
            groups = [read(number).group for number in numbers]
        columns = np.array((self.group_ids(groups), self.group_ids(text.texts)), dtype=np.int64)
        return Batch(ids, image.inputs, text.inputs, torch.from_numpy(columns.T.copy()), image.skipped)

    def group_ids(self, keys: Sequence[Hashable]) -> list[int]:
        """Integers that are equal where the keys are."""
        return _factorize(keys)


@dataclass(frozen=True, slots=True)
class PartReader(BatchReader):
    """A ``BatchReader`` of part ``rank`` of ``size`` of each batch: consecutive samples, as many in each but for one.

    Group ids are hashes, so that they are comparable between the parts.
    """

    rank: int
    size: int

    def __call__(self, indices: SampleIndices) -> Batch:
        bounds = [len(indices) * part // self.size for part in (self.rank, self.rank + 1)]
        # not super(): a dataclass with slots is another class than the one that super() without arguments names
        return BatchReader.__call__(self, indices[slice(*bounds)])

    def group_ids(self, keys: Sequence[Hashable]) -> list[int]:
        """The first 63 bits of a hash of each key."""
        return [int.from_bytes(hashlib.blake2b(ascii(key).encode(), digest_size=8).digest()) >> 1 for key in keys]


def _factorize(keys: Sequence[Hashable]) -> list[int]:
    """Integer codes of the keys, numbered from 0 in order of appearance."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


class BadSampleLimit:
    """Counts the distinct unreadable samples, and raises when there are too many.

    ``found`` maps their ids to the reasons, in order of discovery.
    """

    def __init__(self, total: int, max_bad_fraction: float) -> None:
        self.found: dict[str, str] = {}
        self._total = total
        self._fraction = max_bad_fraction

    def add(self, skipped: Iterable[SkippedSample]) -> None:
        """Raises ``UserError`` listing them when there are ``too_many``."""
        before = len(self.found)
        self.found.update(skipped)
        bad = len(self.found)
        if bad > before and too_many(bad, self._total, self._fraction):
            named = ", ".join(f"{name} ({reason})" for name, reason in list(self.found.items())[:10])
            more = f" and {bad - 10} more" if bad > 10 else ""
            raise UserError(
                f"{bad} of {counted(self._total, 'image')} cannot be read, which is more than max_bad_fraction = "
                f"{self._fraction:g} allows: {named}{more}"
            )


class PairLoader:
    """Shuffled batches of ``reader``; ``epoch(n)`` iterates over epoch n, ``len`` is the number of batches in each.

    ``captions="sample"`` draws one caption of each pair anew every epoch; with ``"all"`` every caption is a sample.
    ``drop_last`` drops the last short batch. Skipped samples are listed in ``Batch.skipped`` and counted in
    ``bad_samples``. Raises ``UserError`` when ``drop_last`` would leave no batch (a batch larger than the data), and
    while reading as ``BadSampleLimit`` and ``WorkerPool`` do. Iterate over one epoch at a time.
    """

    def __init__(
        self,
        reader: BatchReader,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        captions: CaptionMode = "sample",
        max_bad_fraction: float = 0.02,
        drop_last: bool = True,
    ) -> None:
        if captions == "all" and not isinstance(reader.pairs, PairIndex):
            reader = replace(reader, pairs=PairIndex(reader.pairs))
        pairs = reader.pairs
        self._pairs = pairs
        self._captions: CaptionMode = captions
        self._batch = batch_size
        self._seed = seed
        self._drop_last = drop_last
        if isinstance(pairs, PairIndex) and captions == "all":
            self.num_samples = int(pairs.caption_offsets[-1])
        else:
            self.num_samples = len(pairs)
        assert self.num_samples < 1 << 31, "sample numbers are 32 bits wide"
        if self.num_samples == 0:
            raise UserError("there are no pairs to make batches of")
        if batch_size < 1 or (drop_last and batch_size > self.num_samples):
            raise UserError(
                f"batch = {batch_size}, and there are {self.num_samples} samples: a batch holds 1 to {self.num_samples}"
            )
        source = pairs.pairs if isinstance(pairs, PairIndex) else pairs
        reads_images = isinstance(reader.image, LiveImageReader)  # cached features need no shard
        self._windows = ShardWindows.of(source) if reads_images and isinstance(source, Pairs) else None
        self.bad_samples = BadSampleLimit(len(pairs), max_bad_fraction)
        self._stream = WorkerPool(reader, workers=workers)

    def __len__(self) -> int:
        return self.num_samples // self._batch if self._drop_last else -(-self.num_samples // self._batch)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number`` from batch ``start`` (from 0) on; earlier ones are not read."""
        for batch in self.uncounted_epoch(number, start=start):
            self.bad_samples.add(batch.skipped)
            yield batch

    def uncounted_epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The same, for a caller that adds skipped samples to ``bad_samples`` itself."""
        assert 0 <= start <= len(self), f"epoch {number} has {len(self)} batches; {start} is not one of them"
        yield from self._stream(self._sample_indices(number, start))

    def close(self) -> None:
        """Stop the worker processes, if there are any."""
        self._stream.close()

    def _sample_indices(self, epoch: int, start: int) -> Iterator[SampleIndices]:
        # shuffle by sorting random numbers; the sort is stable, so the order is the same on every machine
        order = self._shuffle(epoch).astype(np.int32)  # all three are kept for the epoch: 20 bytes a sample
        seeds = philox_integers((self._seed, epoch, _AUGMENT), self.num_samples)
        draws = None if self._captions == "all" else philox_integers((self._seed, epoch, _CAPTION), self.num_samples)
        for number in range(start, len(self)):
            some = order[number * self._batch : (number + 1) * self._batch].astype(np.int64)
            self._fetch_ahead(epoch, some[:1])
            if draws is None:
                assert isinstance(self._pairs, PairIndex)
                pair = self._pair_of(some)
                yield SampleIndices(pair, some - self._pairs.caption_offsets[pair], seeds[some])
            else:
                yield SampleIndices(some, draws[some], seeds[some])

    def _shuffle(self, epoch: int) -> Int[np.ndarray, " samples"]:
        random = philox_integers((self._seed, epoch, _ORDER), self.num_samples)
        if self._windows is None:
            return np.argsort(random, kind="stable")
        part = self._windows.part[self._pair_of(np.arange(self.num_samples))]
        return np.lexsort((random, self._windows_of_shards(epoch)[part]))

    def _windows_of_shards(self, epoch: int) -> Int[np.ndarray, " shards"]:
        assert self._windows is not None
        return self._windows.number(philox_integers((self._seed, epoch, _SHARDS), len(self._windows.shards)))

    def _fetch_ahead(self, epoch: int, first: Int[np.ndarray, " one"]) -> None:
        """Begin to fetch the shards of the window of the first sample of a batch, and of the window after it."""
        if self._windows is not None:
            windows = self._windows_of_shards(epoch)
            self._windows.fetch_ahead(windows, int(windows[self._windows.part[self._pair_of(first)]][0]))

    def _pair_of(self, samples: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The number of the pair of each sample."""
        if self._captions == "sample":
            return samples
        assert isinstance(self._pairs, PairIndex)
        return np.searchsorted(self._pairs.caption_offsets, samples, side="right") - 1


# --- images or texts alone -------------------------------------------------------------------------------------------


def log_skipped(skipped: Iterable[SkippedSample]) -> None:
    """Log a warning for each skipped sample."""
    for name, reason in skipped:
        _log.warning("skipped %s: %s", escape_name(name), reason)


def inference_batch_size(size: int, device: torch.device | str) -> int:
    """Batch size for inference with images of ``size`` by ``size`` pixels.

    On a CPU it is small, so that the activations of one layer fit in the processor's cache and in memory blocks that
    are reused (``clasp.commands.environment``; measured with EfficientNet-Lite0 at 192 pixels: batches of 8 take three
    quarters of the time of batches of 32).
    """
    return max(1, 300_000 // size**2) if torch.device(device).type == "cpu" else 128


def iter_image_batches(
    sources: Sequence[tuple[str, ImageSource]],
    transform: ImageTransform,
    batch_size: int,
    *,
    workers: int = 0,
    on_skipped: Callable[[Iterable[SkippedSample]], None] = log_skipped,
    group: ProcessGroup = SINGLE,
) -> Iterator[tuple[list[str], Pixels]]:
    """Batches of pixels in the order of ``sources``, with the ids of the readable images; others go to ``on_skipped``.
    Of several processes each reads its share of the batches.

    A batch without any readable image is left out. Pass ``BadSampleLimit(len(sources), fraction).add`` as
    ``on_skipped`` to raise when too many are unreadable.
    """
    images = [(name, source, 0) for name, source in sources]
    chunks = own_share(list(_chunks(images, batch_size)), group)
    with closing(WorkerPool(LiveImageReader(transform).decode, workers=workers)) as stream:
        for chunk, rows in zip(chunks, stream(chunks), strict=True):
            on_skipped(rows.skipped)
            if rows.kept:
                yield [chunk[place][0] for place in rows.kept], rows.inputs


def iter_text_batches(
    texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int, *, group: ProcessGroup = SINGLE
) -> Iterator[tuple[list[int], Tokens]]:
    """Batches of tokens, longest texts first: little padding, and the largest batch comes first.

    A batch has at most ``max_tokens`` tokens, padding included, and at least one text. Each comes with the indices of
    its rows in ``texts``. All texts are tokenised before the first batch. Of several processes each has its share of
    the batches.
    """
    ids = tokenizer.encode(texts)
    for places in own_share(_text_batches(ids, max_tokens), group):
        yield places, tokenizer.pad([ids[place] for place in places])


def _text_batches(ids: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Texts by number, in the batches of ``iter_text_batches``."""
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        batches.append(order[start : start + max(1, max_tokens // len(ids[order[start]]))])
        start += len(batches[-1])
    return batches


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
