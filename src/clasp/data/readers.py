"""Readers of the two modalities of a batch: sample indices in, their images or captions out.

``SampleIndices`` fixes everything random about a sample. The live readers load images and captions each time; the
cached ones in ``data.feature_cache`` look up rows by the same indices. Also ``PairIndex``: the columns of all pairs,
for readers that must not read the pairs. Note: an image that cannot be read is dropped from its batch and
reported, never replaced; captions are then read for the rest only. A shard that cannot be read is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clasp.data.images import Augment, ImageError, ImageTransform
from clasp.data.pair_columns import PairColumns
from clasp.data.pair_sequence import Pairs
from clasp.data.shard_stage import ShardError
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
    """Pairs with columns of their ids, groups and captions: no pair is read to know these.

    For cached features, where even parsing a line of JSON would dominate the time, and for ``captions="all"``. Takes
    28 bytes per pair of one caption beside the stored columns of a large source, which are mapped (``PairColumns``).
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        if isinstance(pairs, Pairs):
            columns, rows = pairs.columns, pairs.rows
        else:
            columns, rows = PairColumns.of(pairs), np.arange(len(pairs))
        self.ids = columns.ids.select(rows)
        self.group, _ = _number_by_appearance(columns.group[rows], len(columns.groups))
        """Group id of each pair."""
        captions, self.caption_offsets = _select_captions(columns, rows)
        """Captions of pair i are numbered ``caption_offsets[i]`` to ``caption_offsets[i + 1]``."""
        self.caption, chosen = _number_by_appearance(captions, len(columns.texts))
        """Index in ``texts`` of each caption."""
        self.texts = columns.texts.select(chosen)
        """The unique captions, in the order of the pairs."""

    def __reduce__(self) -> tuple[type[PairIndex], tuple[Sequence[Pair]]]:
        return PairIndex, (self.pairs,)  # a worker maps its own columns

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: Any) -> Any:
        return self.pairs[number]

    def text_indices(self, picks: SampleIndices) -> Int[np.ndarray, " n"]:
        """Index in ``texts`` of the selected captions."""
        first = self.caption_offsets[picks.pair]
        return self.caption[first + picks.caption_draw % (self.caption_offsets[picks.pair + 1] - first)]


def _number_by_appearance(
    codes: Int[np.ndarray, " n"], distinct: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " present"]]:
    """The codes numbered anew in the order in which they first appear, and the old code of each number."""
    assert len(codes) < 1 << 31, "numbers are 32 bits wide"
    first = np.full(distinct, len(codes), np.int32)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1, dtype=np.int32)  # the last assignment to a place remains
    present = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(codes))].astype(np.int32)
    numbers = first  # of codes that are present; the others are not looked up
    numbers[present] = np.arange(len(present), dtype=np.int32)
    return numbers[codes], present


_PAIRS_AT_ONCE = 1 << 18


def _select_captions(
    columns: PairColumns, rows: Int[np.ndarray, " pairs"]
) -> tuple[Int[np.ndarray, " captions"], Int[np.ndarray, " bounds"]]:
    """The captions of these rows one after the other, and the bounds of each row among them."""
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(columns.caption_offsets[rows + 1] - columns.caption_offsets[rows], out=bounds[1:])
    captions = np.empty(int(bounds[-1]), np.int32)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        first, stop = columns.caption_offsets[rows[some]], columns.caption_offsets[rows[some] + 1]
        base = int(bounds[start])
        shift = np.repeat(first - bounds[start : start + len(first)], stop - first)
        place = np.arange(base, base + len(shift))
        captions[place] = columns.caption[place + shift]
    return captions, bounds


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
    """Reads, decodes and (with ``augment``) augments images each time; without, an image that several samples name is
    decoded once."""

    transform: ImageTransform
    augment: Augment | None = None

    def __call__(self, indices: SampleIndices, get_pair: Callable[[int], Pair]) -> ImageBatch:
        pairs = [get_pair(number) for number in indices.pair.tolist()]
        seeds = indices.seed.tolist()
        return self.decode([(pair.id, pair.image, seed) for pair, seed in zip(pairs, seeds, strict=True)])

    def decode(self, images: Sequence[tuple[str, ImageSource, int]]) -> ImageBatch:
        """Decode images given as id, source and seed. Unreadable ones are skipped and reported; ``ShardError`` where
        the storage fails."""
        values, contents, kept, skipped = [], [], [], []
        decoded: dict[Hashable, tuple[Tensor, int]] = {}
        for position, (name, source, seed) in enumerate(images):
            key = _equal_sources(source)
            try:
                if self.augment is not None or key not in decoded:
                    decoded[key] = self._decode(source, seed)
                value, content = decoded[key]
                values.append(value)
                contents.append(content)
                kept.append(position)
            except ShardError:
                raise
            except (ImageError, OSError, UserError) as error:  # a source raises UserError for a missing file
                skipped.append(SkippedSample(name, " ".join(str(error).split()) or type(error).__name__))
        size = self.transform.size
        pixels = torch.stack(values) if values else torch.empty(0, 3, size, size)
        return ImageBatch(Pixels(pixels, None if self.augment else tuple(contents)), kept, tuple(skipped))

    def _decode(self, source: ImageSource, seed: int) -> tuple[Float[Tensor, "3 height width"], int]:
        """An image, and the hash of its bytes."""
        encoded = source.read()
        if self.augment is None:
            value = self.transform(encoded)
        else:
            value = self.transform.augmented(encoded, self.augment, seed)
        return value, int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())


def _equal_sources(source: ImageSource) -> Hashable:
    """A key that is equal for equal sources; those without a hash are equal to no other."""
    try:
        hash(source)
    except TypeError:
        return object()
    return source


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
