"""Pairs in, shuffled and collated ``Batch`` out: random access by index, resumable at any batch of any epoch.

Order, caption and augmentation of a sample are read off a counter-based generator at (seed, epoch, index), in this
process, before anything is loaded: no number of workers can change them, and starting at batch k reads nothing before
it. The two sides of a batch, live or cached, are parts handed in (``BatchReader``). Note: what cannot be read leaves
its batch, which may become short and even empty but is never dropped or filled up; so batch k of an epoch always means
the same samples.
"""

from __future__ import annotations

import functools
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
from clasp.data.readers import ImageReader, LiveImageReader, PairIndex, SampleIndices, TextReader
from clasp.data.tokenizer import Tokenizer
from clasp.data.workers import WorkerPool
from clasp.types import Batch, ImageSource, Pair, Pixels, SkippedSample, Tokens, UserError

CaptionMode = Literal["sample", "all"]
_T = TypeVar("_T")

_ORDER, _CAPTION, _AUGMENT = range(3)  # what a stream of random numbers is for
_log = logging.getLogger(__name__)


def philox_integers(key: Sequence[int], count: int) -> Int[np.ndarray, " n"]:
    """``count`` random numbers in [0, 2^63); the i-th depends on ``key`` (non-negative) and i only, not on ``count``.

    Philox (Salmon et al., SC 2011) read raw, which numpy keeps stable between versions, as it does not its
    ``permutation`` and ``integers``.
    """
    raw = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count)
    return (raw >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Both sides of training batches: samples to a ``Batch``. Runs in a worker where there are any."""

    pairs: Sequence[Pair]
    image: ImageReader
    text: TextReader

    def __call__(self, picks: SampleIndices) -> Batch:
        read = functools.cache(self.pairs.__getitem__)
        image = self.image(picks, read)
        if image.skipped:
            picks = picks[image.kept]
        text = self.text(picks, read)
        numbers = picks.pair.tolist()
        groups: list[Hashable]
        if isinstance(self.pairs, PairIndex):
            ids = tuple([self.pairs.ids[number] for number in numbers])
            groups = self.pairs.group[picks.pair].tolist()
        else:
            ids = tuple([read(number).id for number in numbers])
            groups = [read(number).group for number in numbers]
        columns = torch.tensor([_factorize(groups), _factorize(text.texts)], dtype=torch.int64)
        return Batch(ids, image.inputs, text.inputs, columns.T.contiguous(), image.skipped)


def _factorize(keys: Sequence[Hashable]) -> list[int]:
    """Equal keys to equal numbers, counted from 0 in order of appearance."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


class BadSampleLimit:
    """Counts the distinct samples that cannot be read, and stops the run when they are too many.

    ``found`` maps their ids to the reasons, in the order met. A few (3) are always allowed, all never.
    """

    def __init__(self, total: int, max_bad_fraction: float) -> None:
        self.found: dict[str, str] = {}
        self._total = total
        self._fraction = max_bad_fraction

    def add(self, skipped: Iterable[SkippedSample]) -> None:
        """Raises ``UserError`` with the list when there are more than ``max(3, max_bad_fraction * total)``."""
        before = len(self.found)
        self.found.update(skipped)
        bad = len(self.found)
        if bad > before and (bad > max(3, self._fraction * self._total) or bad >= self._total):
            named = ", ".join(f"{name} ({reason})" for name, reason in list(self.found.items())[:10])
            more = f" and {bad - 10} more" if bad > 10 else ""
            raise UserError(
                f"{bad} of {self._total} images cannot be read, which is more than max_bad_fraction = "
                f"{self._fraction:g} allows: {named}{more}"
            )


class PairLoader:
    """Shuffled batches of ``reader``; ``epoch(n)`` gives the n-th shuffle of ``seed``, ``len`` the batches in each.

    ``captions="sample"`` takes one caption of each pair, drawn anew every epoch; ``"all"`` makes every caption a
    sample. The last short batch is left out when ``drop_last``. Skipped samples are named in ``Batch.skipped`` and
    counted in ``bad_samples``. Raises ``UserError`` when ``drop_last`` would leave nothing (a batch larger than the
    data), and while reading as ``BadSampleLimit`` and ``WorkerPool`` do. One epoch at a time.
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
        if self.num_samples == 0:
            raise UserError("there are no pairs to make batches of")
        if batch_size < 1 or (drop_last and batch_size > self.num_samples):
            raise UserError(
                f"batch = {batch_size}, and there are {self.num_samples} samples: a batch holds 1 to {self.num_samples}"
            )
        self.bad_samples = BadSampleLimit(len(pairs), max_bad_fraction)
        self._stream = WorkerPool(reader, workers=workers)

    def __len__(self) -> int:
        return self.num_samples // self._batch if self._drop_last else -(-self.num_samples // self._batch)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number`` from batch ``start`` on; those before it are not read."""
        assert 0 <= start <= len(self), f"epoch {number} has {len(self)} batches; {start} is not one of them"
        for batch in self._stream(self._sample_indices(number, start)):
            self.bad_samples.add(batch.skipped)
            yield batch

    def close(self) -> None:
        """End the workers, if there are any."""
        self._stream.close()

    def _sample_indices(self, epoch: int, start: int) -> Iterator[SampleIndices]:
        # sorting random numbers shuffles; the sort is stable, so the order is the same on every machine
        order = np.argsort(philox_integers((self._seed, epoch, _ORDER), self.num_samples), kind="stable")
        seeds = philox_integers((self._seed, epoch, _AUGMENT), self.num_samples)[order]
        if self._captions == "all":
            assert isinstance(self._pairs, PairIndex)
            pair = np.searchsorted(self._pairs.caption_offsets, order, side="right") - 1
            picks = SampleIndices(pair, order - self._pairs.caption_offsets[pair], seeds)
        else:
            picks = SampleIndices(order, philox_integers((self._seed, epoch, _CAPTION), self.num_samples)[order], seeds)
        for number in range(start, len(self)):
            yield picks[number * self._batch : (number + 1) * self._batch]


# --- images or texts alone -------------------------------------------------------------------------------------------


def log_skipped(skipped: Iterable[SkippedSample]) -> None:
    """Names each in the log."""
    for name, reason in skipped:
        _log.warning("skipped %s: %s", escape_name(name), reason)


def inference_batch_size(size: int, device: torch.device | str) -> int:
    """How many images of ``size`` pixels a side go through a tower at once, where nothing trains.

    On a processor few enough that one layer's activations fit in its cache and in blocks that are used again
    (``clasp.commands.environment``; measured with EfficientNet-Lite0 at 192 pixels: 8 take three quarters of the time
    of 32).
    """
    return max(1, 300_000 // size**2) if torch.device(device).type == "cpu" else 128


def iter_image_batches(
    sources: Sequence[tuple[str, ImageSource]],
    transform: ImageTransform,
    batch_size: int,
    *,
    workers: int = 0,
    on_skipped: Callable[[Iterable[SkippedSample]], None] = log_skipped,
) -> Iterator[tuple[list[str], Pixels]]:
    """Images in the order given, each batch with the ids of those that could be read; the others go to ``on_skipped``.

    A batch of which nothing could be read is left out. ``BadSampleLimit(len(sources), fraction).add`` as ``on_skipped``
    stops when too many are bad.
    """
    images = [(name, source, 0) for name, source in sources]
    chunks = list(_chunks(images, batch_size))
    with closing(WorkerPool(LiveImageReader(transform).decode, workers=workers)) as stream:
        for chunk, rows in zip(chunks, stream(chunks), strict=True):
            on_skipped(rows.skipped)
            if rows.kept:
                yield [chunk[place][0] for place in rows.kept], rows.inputs


def iter_text_batches(
    texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[list[int], Tokens]]:
    """All texts, longest first, so that little is padding and the largest batch is met first.

    A batch has at most ``max_tokens`` tokens, padding included, and at least one text. Each comes with the places of
    its rows in ``texts``. Every text is tokenised before the first batch.
    """
    ids = tokenizer.encode(texts)
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    start = 0
    while start < len(order):
        places = order[start : start + max(1, max_tokens // len(ids[order[start]]))]
        yield places, tokenizer.pad([ids[place] for place in places])
        start += len(places)


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
